"""The ranks that TDC's authors released for torchvision's CNNs (Xiang et al., PPoPP 2023), as (rank_out, rank_in)."""

from __future__ import annotations

_RESNET18 = {
    1: [(32, 64), (32, 32), (32, 32), (32, 32)],
    2: [(64, 64), (64, 96), (64, 96), (64, 96)],
    3: [(96, 96), (96, 128), (96, 128), (96, 128)],
    4: [(160, 160), (160, 192), (160, 192), (160, 192)],
}
_RESNET50 = {
    1: [(32, 64), (32, 32), (32, 32)],
    2: [(32, 32), (32, 64), (32, 64), (32, 64)],
    3: [(32, 64)] * 6,
    4: [(64, 96)] * 3,
}
# Of the twelve convolutions after the first.
_VGG16 = [*[(32, 64)] * 5, (64, 64), *[(96, 160)] * 2, *[(96, 192)] * 4]
_VGG16_INDICES = (2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_VGG16_BN_INDICES = (3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)

Layers = dict[str, tuple[int, int]]


def _resnet18() -> Layers:
    return {
        f"layer{stage}.{index // 2}.conv{index % 2 + 1}": ranks
        for stage, stage_ranks in _RESNET18.items()
        for index, ranks in enumerate(stage_ranks)
    }


def _resnet50() -> Layers:
    return {
        f"layer{stage}.{block}.conv2": ranks
        for stage, stage_ranks in _RESNET50.items()
        for block, ranks in enumerate(stage_ranks)
    }


def _vgg16(indices: tuple[int, ...]) -> Layers:
    return {f"features.{index}": ranks for index, ranks in zip(indices, _VGG16, strict=True)}


def _densenet(blocks: tuple[int, ...], ranks: tuple[int, int]) -> Layers:
    return {
        f"features.denseblock{block}.denselayer{layer}.conv2": ranks
        for block, layers in enumerate(blocks, 1)
        for layer in range(1, layers + 1)
    }


# Layer name -> (rank_out, rank_in), by the name of torchvision's constructor.
PRESETS: dict[str, Layers] = {
    "resnet18": _resnet18(),
    "resnet50": _resnet50(),
    "vgg16": _vgg16(_VGG16_INDICES),
    "vgg16_bn": _vgg16(_VGG16_BN_INDICES),
    "densenet121": _densenet((6, 12, 24, 16), (32, 32)),
    "densenet201": _densenet((6, 12, 48, 32), (32, 64)),
}
