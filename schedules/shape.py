"""Convolutions as values: what a kernel computes, free of graphs, weights and schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdc_tvm.errors import TdcError

# What each precision stores.
DTYPES = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Elements of a tensor that kernels' 32-bit indices reach.
MAX_ELEMENTS = 2**31 - 1
_WHOLE = ("batch", "height", "width", "in_channels", "out_channels", "groups")
_TUPLES = {
    "kernel": ("height", "width"),
    "stride": ("height", "width"),
    "padding": ("top", "left", "bottom", "right"),
    "dilation": ("height", "width"),
}


@dataclass(frozen=True, order=True)
class Conv2dShape:
    """A 2-D convolution on NHWC activations.

    Parameters
    ----------
    batch, height, width, in_channels : int
        Extents of the input, ``(batch, height, width, in_channels)``.
    out_channels : int
        Channels of the output.
    kernel, stride, dilation : tuple[int, int]
        Height and width of the window, its step, and the distance between its taps.
    padding : tuple[int, int, int, int]
        Zeros added at the top, left, bottom and right (ONNX's ``pads`` order).
    groups : int
        Channel groups; 1 is a dense convolution.
    precision : str
        Arithmetic and storage: ``"fp32"`` strict, ``"tf32"`` (stored as FP32, multiplied on tensor
        cores), ``"fp16"`` or ``"bf16"`` (on tensor cores, summed in FP32).
    prologue : bool
        Whether each channel of the input is scaled, shifted and clipped where it is read.
    pool : bool
        Whether the maximum of each 2x2 of the output is all that is stored, of whole 2x2 only.

    Raises
    ------
    TdcError
        If the precision is unknown, an extent is not a positive int, a tuple not of as many ints, the
        channels do not divide by the groups, the window is larger than the padded input, a prologue comes before
        groups or padding, or there are maxima of groups or of no 2x2.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    precision: str = "fp32"
    prologue: bool = False
    pool: bool = False

    def __post_init__(self) -> None:
        if self.precision not in tuple(DTYPES):
            raise TdcError(f"unknown precision {self.precision!r}; use one of {', '.join(DTYPES)}")
        _check_ints(self, *_WHOLE)
        for name, parts in _TUPLES.items():
            values = getattr(self, name)
            if type(values) is not tuple or [type(value) for value in values] != [int] * len(parts):
                raise TdcError(
                    f"found {name}={values!r}; expected a tuple of {len(parts)} ints, {name}=({', '.join(parts)})"
                )
        positive = (
            self.batch,
            self.height,
            self.width,
            self.in_channels,
            self.out_channels,
            self.groups,
            *self.kernel,
            *self.stride,
            *self.dilation,
        )
        if min(positive) < 1 or min(self.padding) < 0:
            raise TdcError(f"impossible convolution {self}: extents must be positive and padding not negative")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise TdcError(
                f"impossible convolution: {self.in_channels} -> {self.out_channels} channels "
                f"do not divide into {self.groups} groups"
            )
        if self.out_height < 1 or self.out_width < 1:
            raise TdcError(
                f"impossible convolution: a {self.kernel} window with dilation {self.dilation} does not fit "
                f"into {self.height}x{self.width} with padding {self.padding}"
            )
        if type(self.pool) is not bool:
            raise TdcError(f"found pool={self.pool!r}; expected True or False")
        if self.pool and (self.groups > 1 or min(self.out_height, self.out_width) < 2):
            raise TdcError(
                f"impossible convolution: maxima of 2x2 of {self.out_height}x{self.out_width} outputs in "
                f"{self.groups} group(s); there must be 2x2 or more, and one group"
            )
        if type(self.prologue) is not bool:
            raise TdcError(f"found prologue={self.prologue!r}; expected True or False")
        if self.prologue and (self.groups > 1 or any(self.padding)):
            # Padding is zero behind it.
            raise TdcError(f"{self} has groups or padding; only a convolution without can have a prologue")

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        window = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.height + self.padding[0] + self.padding[2] - window) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        window = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.width + self.padding[1] + self.padding[3] - window) // self.stride[1] + 1

    @property
    def out_pixels(self) -> int:
        """Output positions, batch included."""
        return self.batch * self.out_height * self.out_width

    @property
    def stored_extents(self) -> tuple[int, int, int, int]:
        """Of what is stored of the output: ``(batch, height, width, out_channels)``."""
        step = 2 if self.pool else 1
        return self.batch, self.out_height // step, self.out_width // step, self.out_channels

    @property
    def weight_count(self) -> int:
        """Elements of the kernel, biases not counted."""
        return self.out_channels * self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def macs(self) -> int:
        """Multiply-adds, padding counted as if it were data."""
        return self.out_pixels * self.weight_count

    @property
    def dtype(self) -> str:
        """What activations and weights are stored as."""
        return DTYPES[self.precision]

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a plain 1x1: stride 1, no padding, no groups."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding) and self.groups == 1

    def with_precision(self, precision: str) -> Conv2dShape:
        """The same convolution in another precision."""
        return replace(self, precision=precision)

    def __str__(self) -> str:
        text = f"{self.batch}x{self.height}x{self.width}x{self.in_channels} -> {self.out_channels}"
        text += f", {self.kernel[0]}x{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}" if self.stride[0] == self.stride[1] else f"/{self.stride[0]}x{self.stride[1]}"
        if self.dilation != (1, 1):
            text += f" dilation {self.dilation[0]}x{self.dilation[1]}"
        # What keeps the extents of an odd window's output at stride 1 goes without saying.
        usual = tuple(gap * (extent - 1) // 2 for gap, extent in zip(self.dilation, self.kernel, strict=True))
        if self.padding != usual * 2:
            extents = self.padding[:1] if len(set(self.padding)) == 1 else self.padding
            text += f" padding {'x'.join(map(str, extents))}"
        if self.groups > 1:
            text += f" groups {self.groups}"
        if self.precision != "fp32":
            text += f" {self.precision}"
        if self.prologue:
            text += " with a prologue"
        return text + " + 2x2 max" if self.pool else text


@dataclass(frozen=True, order=True)
class TuckerConvShape:
    """A Tucker-2 convolution: 1x1 to ``rank_in``, a dense core to ``rank_out``, 1x1 to the output channels.

    Source: TDC (Xiang et al., PPoPP 2023), section 2: ``conv(K)`` becomes ``conv1x1(C -> D1)``,
    ``conv RxS (D1 -> D2)``, which carries stride, padding and dilation, and ``conv1x1(D2 -> N)``.

    Parameters
    ----------
    dense : Conv2dShape
        The convolution that the three stages stand for; its groups must be 1.
    rank_in, rank_out : int
        D1 and D2, the channels before and after the core.
    reduce_bias : bool
        Whether the first stage adds a bias, which the core's padding does not have.
    """

    dense: Conv2dShape
    rank_in: int
    rank_out: int
    reduce_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dense, Conv2dShape):
            raise TdcError(f"found dense={self.dense!r}; expected the Conv2dShape that the stages stand for")
        _check_ints(self, "rank_in", "rank_out")
        if type(self.reduce_bias) is not bool:
            raise TdcError(f"found reduce_bias={self.reduce_bias!r}; expected True or False")
        if self.dense.groups != 1:
            raise TdcError(f"a Tucker convolution has no groups; found {self.dense.groups}")
        if self.dense.prologue:
            raise TdcError("a Tucker convolution has no prologue")
        if min(self.rank_in, self.rank_out) < 1:
            raise TdcError(f"impossible Tucker ranks ({self.rank_in}, {self.rank_out}): they must be at least 1")

    @property
    def stages(self) -> tuple[Conv2dShape, Conv2dShape, Conv2dShape]:
        """The reducing 1x1, the core and the expanding 1x1."""
        d = self.dense
        plain = Conv2dShape(d.batch, d.height, d.width, d.in_channels, self.rank_in, precision=d.precision)
        core = replace(d, in_channels=self.rank_in, out_channels=self.rank_out, pool=False)
        expand = replace(
            plain,
            height=d.out_height,
            width=d.out_width,
            in_channels=self.rank_out,
            out_channels=d.out_channels,
            pool=d.pool,
        )
        return plain, core, expand

    @property
    def is_mergeable(self) -> bool:
        """Whether the three stages are one dense convolution."""
        return not (self.reduce_bias and any(self.dense.padding))

    @property
    def weight_count(self) -> int:
        """Elements of the three factors."""
        return sum(stage.weight_count for stage in self.stages)

    @property
    def macs(self) -> int:
        """Multiply-adds of the three stages, halo recomputation not counted."""
        return sum(stage.macs for stage in self.stages)

    def with_precision(self, precision: str) -> TuckerConvShape:
        """The same convolution in another precision."""
        return replace(self, dense=self.dense.with_precision(precision))

    def __str__(self) -> str:
        text = f"{self.dense} at ranks ({self.rank_in}, {self.rank_out})"
        return text + " with a bias of the first stage" if self.reduce_bias else text


ConvShape = Conv2dShape | TuckerConvShape


def _check_ints(shape: ConvShape, *names: str) -> None:
    for name in names:
        value = getattr(shape, name)
        if type(value) is not int:
            raise TdcError(f"found {name}={value!r}; expected an int")


def stages_of(shape: ConvShape) -> tuple[Conv2dShape, ...]:
    """The convolutions that are computed one after the other: one, or the three of a Tucker convolution."""
    return shape.stages if isinstance(shape, TuckerConvShape) else (shape,)


def oversize_reason(stages: tuple[Conv2dShape, ...]) -> str:
    """Which tensor has more elements than 32-bit indices reach; empty if none, padding included, has."""
    for stage in stages:
        top, left, bottom, right = stage.padding
        counts = {
            "input": stage.batch * (stage.height + top + bottom) * (stage.width + left + right) * stage.in_channels,
            "output": stage.out_pixels * stage.out_channels,
            "weights": stage.weight_count,
        }
        for name, count in counts.items():
            if count > MAX_ELEMENTS:
                return (
                    f"the {name} of {stage} would have {count:,} elements, 32-bit indices reach {MAX_ELEMENTS:,}; "
                    "use a smaller batch or fewer channels"
                )
    return ""


@dataclass(frozen=True)
class Epilogue:
    """What is done to a convolution's output before it is stored: add the residual, then clip.

    ReLU is ``clip_min=0``, ReLU6 is ``clip_min=0, clip_max=6``.  The bias is part of the
    convolution itself.

    Raises
    ------
    TdcError
        If ``clip_min`` is above ``clip_max``.
    """

    residual: bool = False
    clip_min: float | None = None
    clip_max: float | None = None

    def __post_init__(self) -> None:
        if self.clip_min is not None and self.clip_max is not None and self.clip_min > self.clip_max:
            raise TdcError(f"found clip_min={self.clip_min} above clip_max={self.clip_max}; exchange them")

    def __str__(self) -> str:
        parts = ["add"] if self.residual else []
        if self.clip_min == 0 and self.clip_max is None:
            parts.append("relu")
        elif self.clip_min is not None or self.clip_max is not None:
            parts.append(f"clip[{self.clip_min}, {self.clip_max}]")
        return "+".join(parts) or "none"
