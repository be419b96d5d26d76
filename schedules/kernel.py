"""What a schedule is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, TuckerConvShape, stages_of


@dataclass(frozen=True)
class ConvWeights:
    """The constants of one convolution stage.

    Parameters
    ----------
    kernel : numpy.ndarray
        Shape ``(out_channels, in_channels / groups, kernel_h, kernel_w)``, ONNX's OIHW.
    bias : numpy.ndarray or None
        Shape ``(out_channels,)``.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Prologue:
    """What is done to a convolution's input where it is read: scale and shift each channel, then clip.

    A batch normalisation and a ReLU before a convolution, as in DenseNet, whose input others read too.

    Parameters
    ----------
    scale, shift : numpy.ndarray
        FP32, shape ``(in_channels,)``.
    clip_min, clip_max : float, optional
        Bounds.
    """

    scale: np.ndarray
    shift: np.ndarray
    clip_min: float | None = None
    clip_max: float | None = None


@dataclass(frozen=True)
class Tensors:
    """What a kernel reads and writes, where that is more than the convolution's input and output, or of another type.

    Parameters
    ----------
    in_width : int, optional
        Channels of the tensor that the input is the first of; by default there are no others.  Fewer than there are
        of the input overlap: each pixel then reads the next ones', too.
    in_columns : int, optional
        Pixels of a row of that tensor.
    out_width : int, optional
        Channels of the tensor that the output is a part of.
    out_start : int
        The output's first channel there.
    out_dtype : str, optional
        Type of the output: ``"float32"``; by default the precision's.
    """

    in_width: int | None = None
    in_columns: int | None = None
    out_width: int | None = None
    out_start: int = 0
    out_dtype: str | None = None


def check_prologue(shape: ConvShape, prologue: Prologue | None) -> None:
    """Raise `TdcError` unless a prologue is what a convolution has."""
    wanted = isinstance(shape, Conv2dShape) and shape.prologue
    if wanted != (prologue is not None):
        raise TdcError(f"found {'no' if wanted else 'a'} prologue for {shape}")
    if isinstance(shape, TuckerConvShape) or prologue is None:
        return
    for name, found in (("scale", prologue.scale.shape), ("shift", prologue.shift.shape)):
        if found != (shape.in_channels,):
            raise TdcError(f"found a {name} of shape {found} for {shape}, expected {(shape.in_channels,)}")


def check_weights(shape: ConvShape, weights: tuple[ConvWeights, ...]) -> None:
    """Raise `TdcError` unless there are weights for each stage of a convolution, of its shape."""
    stages = stages_of(shape)
    if len(stages) != len(weights):
        raise TdcError(f"found weights for {len(weights)} stages, expected {len(stages)}")
    for stage, w in zip(stages, weights, strict=True):
        expected = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
        if w.kernel.shape != expected:
            raise TdcError(f"found a kernel of shape {w.kernel.shape} for {stage}, expected {expected}")
        if w.bias is not None and w.bias.shape != (stage.out_channels,):
            raise TdcError(f"found a bias of shape {w.bias.shape} for {stage}, expected {(stage.out_channels,)}")


@dataclass(frozen=True, order=True)
class KernelConfig:
    """A schedule decision: a strategy and its parameters; printable, comparable, hashable."""

    strategy: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, name: str) -> int:
        return dict(self.parameters)[name]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.parameters)

    def reject_reason(self, allowed: Mapping[str, Sequence[int]]) -> str:
        """Which parameter is missing, unknown or not one of the ints ``allowed`` for it; empty if all are right."""
        names = [name for name, _ in self.parameters]
        if len(names) != len(allowed) or set(names) != set(allowed):
            return f"has the parameters {', '.join(map(str, names)) or 'none'}; expected {', '.join(allowed)}"
        for name, value in self.parameters:
            values = allowed[name]
            if type(value) is not int or value not in values:
                if isinstance(values, range):
                    steps = f" in steps of {values.step}" if values.step > 1 else ""
                    known = f"an int from {values[0]} to {values[-1]}{steps}"
                else:
                    known = " or ".join(map(str, values))
                return f"has {name}={value!r}; expected {known}"
        return ""


@dataclass(frozen=True)
class Estimate:
    """A predicted latency and the parts it is the sum of, in microseconds."""

    parts_us: dict[str, float] = field(default_factory=dict)

    @property
    def latency_us(self) -> float:
        """The whole prediction."""
        return sum(self.parts_us.values())


@dataclass(frozen=True)
class Kernel:
    """A finished operator.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Takes ``(x, *constants, [residual], out, *between)``; ``x``, ``residual`` and ``out`` are NHWC.
        It is fully scheduled and marked so (``tirx.is_scheduled``, ``op_pattern`` 8).
    constants : tuple[numpy.ndarray, ...]
        Weights and biases, packed for this kernel.
    between : tuple of shapes
        Further outputs, of the output's type: what one of several kernels hands to the next.
    """

    func: tirx.PrimFunc
    constants: tuple[np.ndarray, ...]
    between: tuple[tuple[int, ...], ...] = ()
