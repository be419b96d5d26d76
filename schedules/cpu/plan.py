"""What the CPU schedules agree on: views of shapes, register tiles, strips, and the price of a stage."""

from __future__ import annotations

from collections.abc import Sequence

from tdc_tvm.schedules.cpu.emit import Blocks, Nest, Tile
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import Estimate, KernelConfig
from tdc_tvm.schedules.shape import MAX_ELEMENTS, Conv2dShape

MAX_VECTORS = 4


def make_config(strategy: str, **parameters: int) -> KernelConfig:
    """A configuration from keyword arguments."""
    return KernelConfig(strategy, tuple(parameters.items()))


def as_pixels(shape: Conv2dShape) -> Conv2dShape:
    """A plain 1x1 as one column of pixels, so that register tiles may cross rows and images; others as they are."""
    if not shape.is_pointwise:
        return shape
    return Conv2dShape(1, shape.out_pixels, 1, shape.in_channels, shape.out_channels)


def is_depthwise(shape: Conv2dShape) -> bool:
    """Whether each channel is convolved on its own."""
    return shape.groups > 1 and shape.groups == shape.in_channels == shape.out_channels


def needs_copy(shape: Conv2dShape) -> bool:
    """Whether a strip of the input is copied to scratch memory to get its padding."""
    return any(shape.padding)


def full_lanes(device: DeviceSpec) -> int:
    """Floats in a SIMD register."""
    return max(device.vector_bytes, 16) // 4


def lanes_for(channels: int, device: DeviceSpec) -> int:
    """The SIMD width, or the next power of two where there are fewer channels."""
    lanes = 1
    while lanes < min(channels, full_lanes(device)):
        lanes *= 2
    return lanes


def register_count(device: DeviceSpec) -> int:
    """SIMD registers: 32 with AVX-512, else 16 (fewer than some have, never more)."""
    return 32 if device.vector_bytes >= 64 else 16


def make_tile(rows: int, cols: int, vectors: int, lanes: int, device: DeviceSpec) -> Tile:
    """The largest register tile with this many vectors, evened out over the extents.

    One register stays free for the broadcast input, ``vectors`` for the weights.
    """
    pixels = (register_count(device) - 1 - vectors) // vectors
    if cols > pixels:
        return Tile(1, -(-cols // -(-cols // pixels)), vectors, lanes)
    height = min(rows, pixels // cols)
    return Tile(-(-rows // -(-rows // height)), cols, vectors, lanes)


def vector_counts(channels: int, lanes: int) -> range:
    """How many vectors a register tile may have."""
    return range(1, min(MAX_VECTORS, -(-channels // lanes)) + 1)


def allowed(names: Sequence[str], device: DeviceSpec) -> dict[str, Sequence[int]]:
    """The values that each parameter can have, as far as one alone decides; of a stage's by what follows its name."""
    vectors = range(1, MAX_VECTORS + 1)
    lanes = [1 << i for i in range(full_lanes(device).bit_length())]
    few = {"lanes": lanes, "vectors": vectors, "reduce": vectors, "core": vectors, "expand": vectors}
    return {name: few.get(name.split("_")[-1], range(1, MAX_ELEMENTS + 1)) for name in names}


def strip_heights(height: int, step: int, device: DeviceSpec) -> list[int]:
    """Strip heights in whole tiles: from everything in one strip down to many strips per thread."""
    groups = -(-height // step)
    counts = [1, *(device.core_count * 2**i for i in range(8))]
    return sorted({-(-groups // min(groups, count)) * step for count in counts}, reverse=True)


def pad_width(shape: Conv2dShape) -> int:
    """Columns of the input that the outputs reach, padding included."""
    return (shape.out_width - 1) * shape.stride[1] + shape.dilation[1] * (shape.kernel[1] - 1) + 1


def pad_height(shape: Conv2dShape, rows: int) -> int:
    """Rows of the input that ``rows`` rows of the output reach, padding included."""
    return (rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kernel[0] - 1) + 1


def pad_elements(shape: Conv2dShape, rows: int) -> int:
    """Elements of the padded input that ``rows`` rows of the output reach."""
    return pad_height(shape, rows) * pad_width(shape) * shape.in_channels


def strip_nest(shape: Conv2dShape) -> Nest:
    """Distances of a convolution that reads the input itself, or a padded strip of it in scratch memory."""
    pixel = shape.in_channels
    row = (pad_width(shape) if needs_copy(shape) else shape.width) * pixel
    return Nest(
        shape.kernel,
        shape.in_channels // shape.groups,
        (shape.dilation[0] * row, shape.dilation[1] * pixel),
        (shape.stride[0] * row, shape.stride[1] * pixel),
        (shape.out_width * shape.out_channels, shape.out_channels),
    )


def dense_slots(reduction: int, blocks: Blocks, rows: int, cols: int) -> float:
    """Issue slots of fused multiply-adds for ``rows x cols`` pixels, one group, all channel blocks.

    A tile's step takes as many slots as it has accumulators, but never fewer than its loads or the eight that
    cover the latency of two pipelines; two more go to the loop.
    """
    tile = blocks.tile

    def step(pixels: int, vectors: int) -> int:
        return max(pixels * vectors, pixels + vectors, 8) + 2

    def area(vectors: int) -> int:
        slots = 0
        for height, times in ((tile.rows, rows // tile.rows), (rows % tile.rows, 1)):
            if height and times:
                slots += times * (cols // tile.cols) * step(height * tile.cols, vectors)
                slots += times * (step(height * (cols % tile.cols), vectors) if cols % tile.cols else 0)
        return slots

    return reduction * (blocks.full * area(tile.vectors) + (area(blocks.rest_vectors) if blocks.rest else 0))


def price(device: DeviceSpec, slots: float, copied_bytes: float, traffic_bytes: float, tasks: int) -> Estimate:
    """Latency from the busiest thread's issue slots and copied bytes, and the whole machine's traffic.

    Activations and weights of one network stay in the last-level cache, taken as four times as fast as DRAM.
    """
    slots_per_us = device.fp32_flops_per_s / device.core_count / (2 * full_lanes(device)) / 1e6
    return Estimate(
        {
            "compute": slots / slots_per_us,
            "copy": copied_bytes / (full_lanes(device) / 2) / slots_per_us,
            "memory": traffic_bytes / (4 * device.dram_bytes_per_s) * 1e6,
            "launch": device.launch_us if tasks > 1 else 0.0,
        }
    )
