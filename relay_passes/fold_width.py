"""Convolutions of few channels: a row of the window becomes channels, so that units of depth are not mostly zeros.

A window of 7 pixels of 3 channels is 21 numbers that lie behind each other.  With a fourth channel of zeros each pixel
of the output reads 28 of them, which begin 8 after those of the pixel before where the stride is 2: an input of 32
channels that overlap, for a window one pixel wide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.kernel import ConvWeights
from tdc_tvm.schedules.shape import Conv2dShape

# More channels fill units of depth well enough.
_MOST_CHANNELS = 8
# What kernels load at once.
_VECTOR_BYTES = 16


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

    def packer(self) -> tvm.tirx.PrimFunc:
        """A function, not scheduled, from the input (NHWC) to the tensor that the folded convolution reads."""
        before, dtype = self.before, self.before.dtype
        extents = [tirx.IntImm("int64", n) for n in (before.batch, before.height, before.width, before.in_channels)]
        packed = [tirx.IntImm("int64", n) for n in (before.batch, before.height, self.columns, self.pitch)]
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.noalias": True})
            x = T.arg("x", T.buffer(extents, dtype))
            out = T.arg("out", T.buffer(packed, dtype))
            with T.grid(*packed) as loops, T.sblock("fold"):
                n, y, column, element = (
                    T.axis.spatial(extent, loop) for extent, loop in zip(packed, loops, strict=True)
                )
                pixel = column * before.stride[1] + element // self.channels - before.padding[1]
                channel = element % self.channels
                T.reads(x[n, y, pixel, channel])
                T.writes(out[n, y, column, element])
                inside = tirx.all(pixel >= 0, pixel < before.width, channel < before.in_channels)
                value = tirx.if_then_else(inside, x[n, y, pixel, channel], tirx.const(0, dtype))
                T.buffer_store(out, value, [n, y, column, element])
        return builder.get()
