"""Convolutions of few channels: a row of the window becomes channels, so that units of depth are not mostly zeros.

A window of 7 pixels of 3 channels is 21 numbers that lie behind each other.  With a fourth channel of zeros each pixel
of the output reads 28 of them, which begin 8 after those of the pixel before where the stride is 2: an input of 32
channels that overlap, for a window one pixel wide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.block import all_of, local, when
from tdc_tvm.schedules.cuda.intrinsics import address, call, run
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Kernel
from tdc_tvm.schedules.shape import Conv2dShape

# More channels fill units of depth well enough.
_MOST_CHANNELS = 8
# What kernels load at once.
_VECTOR_BYTES = 16
_THREADS = 256


@dataclass(frozen=True)
class Folded:
    """A convolution whose window has but one column.

    Parameters
    ----------
    before : Conv2dShape
        What it computes.
    shape : Conv2dShape
        As it does.
    channels : int
        Channels of a pixel, zeros included.
    columns : int
        Of the tensor that it reads, of ``pitch`` channels each.
    """

    before: Conv2dShape
    shape: Conv2dShape
    channels: int
    columns: int

    @staticmethod
    def of(shape: Conv2dShape) -> Folded | None:
        """Fold a convolution; None if it has many channels, or pixels of the window are not neighbours."""
        if shape.groups > 1 or shape.in_channels > _MOST_CHANNELS or shape.kernel[1] == 1 or shape.dilation[1] > 1:
            return None
        vector = _VECTOR_BYTES // (4 if shape.dtype == "float32" else 2)
        channels = shape.in_channels
        while shape.stride[1] * channels % vector:
            channels += 1
        depth = -(-shape.kernel[1] * channels // vector) * vector
        pitch = shape.stride[1] * channels
        folded = replace(
            shape,
            width=shape.out_width,
            in_channels=depth,
            kernel=(shape.kernel[0], 1),
            stride=(shape.stride[0], 1),
            padding=(shape.padding[0], 0, shape.padding[2], 0),
        )
        # The last pixel, too, reads all its channels.
        columns = shape.out_width + -(-(depth - pitch) // pitch) if depth > pitch else shape.out_width
        return Folded(shape, folded, channels, columns)

    @property
    def pitch(self) -> int:
        """Channels from one pixel of the output to the next."""
        return self.before.stride[1] * self.channels

    def weights(self, weights: ConvWeights) -> ConvWeights:
        """The weights for the folded shape."""
        kernel = weights.kernel.transpose(0, 2, 3, 1)
        padded = np.zeros((*kernel.shape[:3], self.channels), np.float32)
        padded[..., : kernel.shape[3]] = kernel
        flat = padded.reshape(*kernel.shape[:2], -1)
        deep = np.zeros((*kernel.shape[:2], self.shape.in_channels), np.float32)
        deep[..., : flat.shape[2]] = flat
        return ConvWeights(np.ascontiguousarray(deep.transpose(0, 2, 1)[..., None]), weights.bias)

    def make_kernel(self, device: DeviceSpec, name: str, is_nchw: bool) -> Kernel:
        """Build the kernel from the input to the tensor that the folded convolution reads: parameters ``(x, out)``.

        The input is NHWC of the convolution's type, or NCHW in FP32.
        """
        before = self.before
        batch, height, width, channels = before.batch, before.height, before.width, before.in_channels
        extents = (batch, channels, height, width) if is_nchw else (batch, height, width, channels)
        vector = _VECTOR_BYTES // (4 if before.dtype == "float32" else 2)
        vectors = self.pitch // vector
        items = batch * height * self.columns * vectors
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8, "tdc.config": "fold"})
            if device.compute_capability >= 90:
                T.func_attr({"tirx.kernel_launch_params": ["tirx.use_programtic_dependent_launch"]})
            x = T.arg("x", T.buffer(extents, "float32" if is_nchw else before.dtype))
            out = T.arg("out", T.buffer((batch, height, self.columns, self.pitch), before.dtype))
            with (
                T.thread_binding(ceil_div(items, _THREADS), thread="blockIdx.x") as block,
                T.thread_binding(_THREADS, thread="threadIdx.x") as thread,
                T.sblock(name),
            ):
                T.reads(x[tuple(slice(0, extent) for extent in x.shape)])
                T.writes(out[tuple(slice(0, extent) for extent in out.shape)])
                run("tdc_launch_dependents")
                item = T.Bind(block * _THREADS + thread)
                first = T.Bind(item % vectors * vector)
                column = T.Bind(item // vectors % self.columns)
                y, image = T.Bind(item // (vectors * self.columns) % height), T.Bind(item // (items // batch))
                run("tdc_wait_for_dependencies")

                def pack() -> None:
                    values = local(vector)
                    for i in range(vector):
                        pixel = T.Bind(column * before.stride[1] + (first + i) // self.channels - before.padding[1])
                        channel = T.Bind((first + i) % self.channels)
                        inside = tirx.all(pixel >= 0, pixel < width, channel < channels)
                        at = (image, channel, y, pixel) if is_nchw else (image, y, pixel, channel)
                        value = tirx.if_then_else(inside, T.cast(x[at], "float32"), tirx.const(0, "float32"))
                        # Tensor cores would cut off what TF32 has no room for.
                        is_rounded = before.precision == "tf32"
                        T.buffer_store(values, call("tdc_tf32", value, returns="float32") if is_rounded else value, [i])
                    words = values
                    if before.dtype != "float32":
                        words = local(4)
                        for i in range(4):
                            pair = values[2 * i], values[2 * i + 1]
                            T.buffer_store(words, call(f"tdc_pack_{before.dtype}", *pair, returns="float32"), [i])
                    run("tdc_move4", address(out, image, y, column, first), address(words, 0))

                when(all_of(item < items if items % _THREADS else True), pack)
        return Kernel(builder.get(), ())
