"""The ranks that TDC's released artifact uses for torchvision's CNNs (Xiang et al., PPoPP 2023)."""

from __future__ import annotations

_RESNET18 = {
    1: [(32, 64), (32, 32), (32, 32), (32, 32)],
    2: [(64, 64), (64, 96), (64, 96), (64, 96)],
    3: [(96, 96), (96, 128), (96, 128), (96, 128)],
    4: [(160, 160), (160, 192), (160, 192), (160, 192)],
}
_RESNET50 = {1: (3, (32, 32)), 2: (4, (32, 32)), 3: (6, (32, 64)), 4: (3, (64, 96))}
# Indices of the convolutions in ``features`` after the first, each list one resolution.
_VGG16_BN = [(3,), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40)]
_VGG16 = [(2,), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
_VGG_RANKS = [(32, 64), (32, 64), (64, 96), (96, 160), (96, 160)]

Layers = dict[str, tuple[int, int]]


def _resnet18() -> Layers:
    return {
        f"layer{stage}.{index // 2}.conv{index % 2 + 1}": ranks
        for stage, stage_ranks in _RESNET18.items()
        for index, ranks in enumerate(stage_ranks)
    }


def _resnet50() -> Layers:
    return {
        f"layer{stage}.{block}.conv2": ranks for stage, (blocks, ranks) in _RESNET50.items() for block in range(blocks)
    }


def _vgg(indices: list[tuple[int, ...]]) -> Layers:
    return {f"features.{index}": ranks for group, ranks in zip(indices, _VGG_RANKS, strict=True) for index in group}


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
    "vgg16": _vgg(_VGG16),
    "vgg16_bn": _vgg(_VGG16_BN),
    "densenet121": _densenet((6, 12, 24, 16), (32, 32)),
    "densenet201": _densenet((6, 12, 48, 32), (32, 64)),
}
