"""What a schedule is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import tirx


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


@dataclass(frozen=True, order=True)
class KernelConfig:
    """A schedule decision: a strategy and its parameters; printable, comparable, hashable."""

    strategy: str
    parameters: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, name: str) -> int:
        return dict(self.parameters)[name]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.parameters)


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
