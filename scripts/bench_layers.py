"""Time our kernels for convolution layers on a GPU, beside cuDNN on the same layer and on the original convolution.

The steps can run on different machines::

    python scripts/bench_layers.py build OUTDIR --gpu H200 --shapes all --batch 1 8 32   # no GPU needed
    python scripts/bench_layers.py run OUTDIR -o results.jsonl    # NumPy, PyTorch and TVM's runtime are enough
    python scripts/bench_layers.py report results.jsonl --plots FOLDER                   # no GPU needed

Times are of one launch within a CUDA graph of many, after another replay of that graph, all contenders in
turns.  Warm launches repeat on the same data; cold ones go round copies of input, weights and output that
exceed the L2 cache by half.  cuDNN is the best of two layouts, with and without its fused bias and ReLU,
and of all the algorithms that its benchmark mode tries.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_layers
from gpu_layers import Contender, Gpu

if TYPE_CHECKING:
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.shape import ConvShape

# Input channels, output channels and extent of TDC's 18 core convolutions (Xiang et al., PPoPP 2023).
CORE = (
    (64, 32, 224), (64, 32, 112), (32, 32, 56), (64, 32, 56), (64, 64, 56), (32, 32, 28), (64, 32, 28), (96, 64, 28),
    (160, 96, 28), (192, 96, 28), (32, 32, 14), (64, 32, 14), (128, 96, 14), (192, 96, 14), (32, 32, 7), (64, 32, 7),
    (96, 64, 7), (192, 160, 7),
)  # fmt: skip
NETWORKS = {
    "resnet18": ("resnet18",),
    "vgg16": ("vgg16",),
    "resnet50": ("resnet50",),
    "densenet": ("densenet121", "densenet201"),
}
LAUNCHES = 20


def core_shapes(batch: int) -> Iterator[tuple[ConvShape, str]]:
    """TDC's core convolutions: 3x3, stride 1, same padding."""
    from tdc_tvm.schedules.shape import Conv2dShape

    for channels, outputs, extent in CORE:
        yield Conv2dShape(batch, extent, extent, channels, outputs, (3, 3), padding=(1, 1, 1, 1)), "core"


def network_shapes(name: str, batch: int) -> Iterator[tuple[ConvShape, str]]:
    """The Tucker layers of one of torchvision's networks at TDC's ranks, 224x224."""
    import torch
    import torchvision

    from tdc_tvm.plan import preset_plan
    from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape

    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
        shapes: dict[str, torch.Size] = {}
        layers = {key: (model.get_submodule(key), ranks) for key, ranks in preset_plan(name).layers.items()}
        for key, (layer, _) in layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, key=key: shapes.update({key: inputs[0].shape}))
        model(torch.empty(batch, 3, 224, 224))
    for key, (layer, ranks) in layers.items():
        extents = (batch, *shapes[key][2:], layer.in_channels, layer.out_channels)
        dense = Conv2dShape(*extents, layer.kernel_size, layer.stride, layer.padding * 2, layer.dilation, layer.groups)
        yield TuckerConvShape(dense, ranks.rank_in, ranks.rank_out), name


def select(names: Sequence[str], batches: Sequence[int]) -> dict[ConvShape, list[str]]:
    """The distinct layers, batch by batch, and the groups that each belongs to."""
    wanted = ("core", *NETWORKS) if "all" in names else names
    layers: dict[ConvShape, list[str]] = {}
    for batch in batches:
        for name in wanted:
            networks = NETWORKS.get(name, ())
            sources = [core_shapes(batch)] if name == "core" else [network_shapes(one, batch) for one in networks]
            for source in sources:
                for shape, group in source:
                    groups = layers.setdefault(shape, [])
                    if group not in groups:
                        groups.append(group)
    return layers


def build(
    folder: Path,
    layers: dict[ConvShape, list[str]],
    device: DeviceSpec,
    precision: str,
    jobs: int,
    choose: Callable[[ConvShape], list[tuple[Any, bool]]],
) -> dict[str, Any]:
    """Compile what ``choose`` gives for every layer: configurations, and whether each is the model's pick."""
    described = {f"layer{index}": gpu_layers.describe(shape, groups) for index, (shape, groups) in enumerate(layers.items())}
    candidates = [
        gpu_layers.Candidate(key, shape, config, is_pick)
        for key, shape in zip(described, layers, strict=True)
        for config, is_pick in choose(shape)
    ]
    return gpu_layers.build(folder, described, candidates, device, precision, jobs)


def cudnn(gpu: Gpu, layer: dict[str, Any], stages: Sequence[dict[str, Any]], name: str) -> list[Contender]:
    """Ways to run a chain of convolutions with PyTorch: ``name/layout`` and ``name/layout/fused``.

    A chain that ends with a bias and a ReLU can end with cuDNN's operator for all three.
    """
    import torch

    weights = gpu_layers.make_weights(stages, layer["seed"])
    contenders = []
    for layout in ("nchw", "nhwc"):
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        x = gpu.input(layer).permute(0, 3, 1, 2).contiguous(memory_format=memory)
        kernels = [gpu.tensor(kernel).contiguous(memory_format=memory) for kernel, _ in weights]
        biases = [None if bias is None else gpu.tensor(bias) for _, bias in weights]
        contenders.append(_chain(gpu, f"{name}/{layout}", x, kernels, biases, stages, layer["relu"], fused=False))
        if layer["relu"]:
            contenders.append(_chain(gpu, f"{name}/{layout}/fused", x, kernels, biases, stages, True, fused=True))
    return contenders


def _chain(gpu: Gpu, name: str, x, kernels, biases, stages, relu: bool, fused: bool) -> Contender:
    import torch

    n, h, w, c = stages_out(x.shape, stages)
    out_bytes = n * h * w * c * x.element_size()
    used = x.nbytes + sum(kernel.nbytes for kernel in kernels) + out_bytes
    count = max(2, math.ceil(1.5 * gpu.l2_bytes / used))
    data: list = [(x, kernels)]

    def launch(copy: int):
        while len(data) <= copy:
            data.append((x.clone(), [kernel.clone() for kernel in kernels]))
        value, filters = data[copy]
        *inner, last = zip(filters, biases, stages, strict=True)
        for kernel, bias, stage in inner:
            value = torch.nn.functional.conv2d(value, kernel, bias, **gpu_layers.options(stage))
        kernel, bias, stage = last
        if fused:
            arguments = (stage["stride"], stage["padding"], stage["dilation"], stage["groups"])
            return torch.cudnn_convolution_relu(value, kernel, bias, *arguments)
        value = torch.nn.functional.conv2d(value, kernel, bias, **gpu_layers.options(stage))
        return torch.nn.functional.relu_(value) if relu else value

    return Contender(name, launch, count)
