"""Pooling on NVIDIA GPUs, NHWC: maxima and means over windows, or over whole images.

A thread computes a vector of channels of one pixel of the output.  Few results of large windows, such as
the means of whole images, are computed by several threads each, whose parts meet by shuffles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.block import all_of, local, unrolled, when
from tdc_tvm.schedules.cuda.intrinsics import address, call, clip, larger_of, run
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import Kernel, Prologue, Tensors

_THREADS = 128
# Threads that share a window, and how many pixels it has at least; their neighbours have the next channels.
_PARTS, _MANY_PIXELS = 8, 16
# Taps of a window whose loads are in flight together.
_UNROLL = 16


@dataclass(frozen=True)
class Pool2dShape:
    """A pooling layer.

    Parameters
    ----------
    is_max : bool
        Maxima; else means.
    batch, height, width, channels : int
        Of the input.
    kernel, stride, dilation : tuple[int, int]
        Along height and width.
    padding : tuple[int, int]
        Before the first row and column; what the output's extents imply comes behind.
    out_height, out_width : int
        Of the output.
    counts_padding : bool
        Whether means count padding as zeros.
    dtype : str
        What is read: ``"float32"``, ``"float16"`` or ``"bfloat16"``; sums are FP32.
    """

    is_max: bool
    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    out_height: int
    out_width: int
    counts_padding: bool
    dtype: str

    @property
    def taps(self) -> int:
        """Pixels of a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_identity(self) -> bool:
        """Whether each window is a pixel, in order."""
        same = (self.out_height, self.out_width) == (self.height, self.width)
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0) and same

    def reaches_out(self, axis: int) -> bool:
        """Whether windows reach out of the image along an axis."""
        extent, out = ((self.height, self.out_height), (self.width, self.out_width))[axis]
        end = (out - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] - self.padding[axis]
        return self.padding[axis] > 0 or end >= extent


def make_kernel(
    shape: Pool2dShape, device: DeviceSpec, name: str, prologue: Prologue | None = None, tensors: Tensors | None = None
) -> Kernel:
    """Build the kernel: parameters ``(x, [prologue], out)``.

    The input has ``tensors.in_width`` channels, of which the first are read; the output is written from
    ``tensors.out_start`` on.
    """
    tensors = tensors or Tensors()
    in_width, out_width = tensors.in_width or shape.channels, tensors.out_width or shape.channels
    out_dtype = tensors.out_dtype or shape.dtype
    vector = 16 // (4 if shape.dtype == "float32" else 2)
    if math.gcd(shape.channels, in_width, out_width, tensors.out_start) % vector:
        vector = 1
    pool = _Pool(shape, vector, _PARTS if shape.taps >= _MANY_PIXELS else 1, prologue)
    constants = []
    if prologue is not None:
        constants.append(np.concatenate([prologue.scale, prologue.shift]).astype(np.float32))
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8, "tdc.config": "pool"})
        if device.compute_capability >= 90:
            T.func_attr({"tirx.kernel_launch_params": ["tirx.use_programtic_dependent_launch"]})
        x = T.arg("x", T.buffer((shape.batch, shape.height, shape.width, in_width), shape.dtype))
        given = [T.arg("prologue", T.buffer((array.size,), "float32")) for array in constants]
        out = T.arg("out", T.buffer((shape.batch, shape.out_height, shape.out_width, out_width), out_dtype))
        with (
            T.thread_binding(ceil_div(pool.items * pool.parts, _THREADS), thread="blockIdx.x") as block,
            T.thread_binding(_THREADS, thread="threadIdx.x") as thread,
            T.sblock(name),
        ):
            T.reads(*(buffer[tuple(slice(0, extent) for extent in buffer.shape)] for buffer in (x, *given)))
            T.writes(out[tuple(slice(0, extent) for extent in out.shape)])
            run("tdc_launch_dependents")
            pool.emit(x, given[0] if given else None, out, tensors.out_start, T.Bind(block * _THREADS + thread))
    return Kernel(builder.get(), tuple(constants))


@dataclass(frozen=True)
class _Pool:
    """What the threads of a kernel do: ``parts`` of them compute ``vector`` channels of a pixel."""

    shape: Pool2dShape
    vector: int
    parts: int
    prologue: Prologue | None

    @property
    def vectors(self) -> int:
        return self.shape.channels // self.vector

    @property
    def items(self) -> int:
        return self.shape.batch * self.shape.out_height * self.shape.out_width * self.vectors

    def emit(
        self, x: tirx.Buffer, constants: tirx.Buffer | None, out: tirx.Buffer, out_start: int, thread: ir.Expr
    ) -> None:
        shape, parts = self.shape, self.parts
        # Lanes side by side have neighbouring channels; threads behind the end repeat the work of the last.
        lanes = 32 // parts
        number = T.Bind(thread // 32 * lanes + thread % lanes)
        part = T.Bind(thread % 32 // lanes)
        item = T.Bind(tirx.min(number, self.items - 1))
        pixel = T.Bind(item // self.vectors)
        channel = T.Bind(item % self.vectors * self.vector)
        image = T.Bind(pixel // (shape.out_height * shape.out_width))
        out_y, out_x = T.Bind(pixel // shape.out_width % shape.out_height), T.Bind(pixel % shape.out_width)
        y_0 = T.Bind(out_y * shape.stride[0] - shape.padding[0])
        x_0 = T.Bind(out_x * shape.stride[1] - shape.padding[1])
        sums, scale, shift = (local(self.vector) for _ in range(3))
        if constants is not None:
            with unrolled(self.vector) as i:
                T.buffer_store(scale, constants[channel + i], [i])
                T.buffer_store(shift, constants[shape.channels + channel + i], [i])
        with unrolled(self.vector) as i:
            T.buffer_store(sums, self.nothing, [i])
        run("tdc_wait_for_dependencies")
        trips = ceil_div(shape.taps, parts)
        with T.serial(trips, unroll=min(trips, _UNROLL)) as trip:
            tap = T.Bind(trip * parts + part)
            y = T.Bind(y_0 + tap // shape.kernel[1] * shape.dilation[0])
            column = T.Bind(x_0 + tap % shape.kernel[1] * shape.dilation[1])
            valid = all_of(
                tap < shape.taps if shape.taps % parts else True,
                *((y >= 0, y < shape.height) if shape.reaches_out(0) else ()),
                *((column >= 0, column < shape.width) if shape.reaches_out(1) else ()),
            )
            at = (image, y, column, channel)
            if self.vector == 1:
                when(valid, lambda: self.take(x, at, None, sums, scale, shift))
            else:
                # Without a branch all loads are in flight together.
                self.take(x, at, valid if valid is None else T.Bind(valid), sums, scale, shift)
        for mask in (1 << bit for bit in range(lanes.bit_length() - 1, 5)):
            with unrolled(self.vector) as i:
                other = call("tdc_swap", sums[i], mask, returns="float32")
                T.buffer_store(sums, self.both(sums[i], other), [i])
        if not shape.is_max:
            factor = T.Bind(self.share(y_0, x_0))
            with unrolled(self.vector) as i:
                T.buffer_store(sums, sums[i] * factor, [i])
        is_mine = all_of(
            number < self.items if self.items * parts % _THREADS else True, part == 0 if parts > 1 else True
        )
        when(is_mine, lambda: self.store(out, (image, out_y, out_x, out_start + channel), sums))

    def take(
        self,
        x: tirx.Buffer,
        at: tuple,
        valid: ir.Expr | None,
        sums: tirx.Buffer,
        scale: tirx.Buffer,
        shift: tirx.Buffer,
    ) -> None:
        """Add a pixel of the window, or find what is larger; where it is not ``valid``, nothing."""
        values, words = local(self.vector), local(4)
        is_read = tirx.const(True, "bool") if valid is None else valid
        if self.vector == 1:
            T.buffer_store(values, T.cast(x[at], "float32"), [0])
        elif x.dtype == "float32":
            run("tdc_load", address(values, 0), address(x, *at), is_read)
        else:
            run("tdc_load", address(words, 0), address(x, *at), is_read)
            for pair in range(4):
                run(f"tdc_unpack_{x.dtype}", address(values, pair * 2), address(words, pair))
        with unrolled(self.vector) as i:
            value = values[i]
            if self.prologue is not None:
                value = clip(value * scale[i] + shift[i], self.prologue)
            if valid is not None:
                value = tirx.Select(valid, value, self.nothing)
            T.buffer_store(sums, self.both(sums[i], T.Bind(value)), [i])

    @property
    def nothing(self) -> ir.Expr:
        """What changes no sum, or no maximum."""
        return tirx.const(-np.inf if self.shape.is_max else 0.0, "float32")

    def both(self, one: ir.Expr, other: ir.Expr) -> ir.Expr:
        """A sum, or the larger of two, or the one that is no number."""
        return larger_of(one, other) if self.shape.is_max else one + other

    def share(self, y_0: ir.Expr, x_0: ir.Expr) -> ir.Expr:
        """One over the pixels that a mean is of."""
        shape = self.shape
        if shape.counts_padding or not (shape.reaches_out(0) or shape.reaches_out(1)):
            return tirx.const(1 / shape.taps, "float32")

        def inside(axis: int, start: ir.Expr, extent: int) -> ir.Expr:
            step, kernel = shape.dilation[axis], shape.kernel[axis]
            before = tirx.max(0, (step - 1 - start) // step)
            end = tirx.min(kernel, (extent - 1 - start) // step + 1)
            return end - before

        count = inside(0, y_0, shape.height) * inside(1, x_0, shape.width)
        return tirx.const(1, "float32") / T.cast(count, "float32")

    def store(self, out: tirx.Buffer, at: tuple, sums: tirx.Buffer) -> None:
        """Store the results of a pixel."""
        if self.vector == 1:
            T.buffer_store(out, T.cast(sums[0], out.dtype), list(at))
            return
        words, count = sums, self.vector
        if out.dtype != "float32":
            words, count = local(self.vector // 2), self.vector // 2
            with unrolled(count) as i:
                packed = call(f"tdc_pack_{out.dtype}", sums[i * 2], sums[i * 2 + 1], returns="float32")
                T.buffer_store(words, packed, [i])
        for first in range(0, count, 4):
            to = address(out, *at[:3], at[3] + first * self.vector // count)
            run("tdc_move4", to, address(words, first))
