"""The prologue of a kernel: scale, shift and clip by channels, where the input is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda import warpgroup
from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.block import all_of, local, unrolled, when
from tdc_tvm.schedules.cuda.intrinsics import address, clip, run

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain

# Scales and shifts of a vector of channels, in registers.
Constants = tuple[tirx.Buffer, tirx.Buffer]
# Pixels whose loads are in flight together.
_UNROLL = 4


def prepare_input(chain: Chain) -> None:
    """Apply the prologue to the input in shared memory."""
    unit = chain.unit
    vectors = chain.part.in_channels(0) // unit.depth * unit.chunks
    for first in range(0, vectors, chain.part.threads):
        _prepare_vectors(chain, first, vectors)


def _prepare_vectors(chain: Chain, first: int, vectors: int) -> None:
    """A thread has a vector of channels, from ``first`` on: it loads their constants once, for all of its pixels."""
    part, unit, thread = chain.part, chain.unit, chain.thread
    pixels, lanes = part.in_pixels(0), max(1, part.threads // vectors)
    number: ir.Expr
    start: ir.Expr | int
    if vectors <= part.threads:
        number, start = T.Bind(thread % vectors), T.Bind(thread // vectors)
        has_vector = start < lanes if part.threads % vectors else True
    else:
        number, start = T.Bind(first + thread), 0
        has_vector = number < vectors if first + part.threads > vectors else True
    plane, chunk, words = T.Bind(number // unit.chunks), T.Bind(number % unit.chunks), local(4)

    def prepare(pixel: ir.Expr, constants: Constants) -> None:
        row = T.Bind(chain.input_start(0) + plane * part.plane_words(0) + pixel * unit.pixel_words)
        place = chain.place(T.Bind(row + (chunk ^ warpgroup.swizzle(row) if unit.name == "wgmma" else chunk) * 4))
        run("tdc_move4", address(words, 0), place)
        apply_prologue(chain, words, 0, constants)
        run("tdc_move4", place, address(words, 0))

    def prepare_all() -> None:
        constants = constants_of(chain, T.Bind(chain.own_channels() + number * unit.vector))
        trips = ceil_div(pixels, lanes)
        with T.serial(trips, unroll=min(_UNROLL, trips)) as trip:
            pixel = T.Bind(trip * lanes + start)
            when(all_of(pixel < pixels if pixels % lanes else True), lambda: prepare(pixel, constants))

    when(all_of(has_vector), prepare_all)


def constants_of(chain: Chain, channel: ir.Expr) -> Constants:
    """Load scales and shifts."""
    buffer, count = chain.buffers.prologue, chain.unit.vector
    assert buffer is not None
    scale, shift = local(count), local(count)
    always = tirx.const(True, "bool")
    for start in range(0, count, 4):
        run("tdc_load", address(scale, start), address(buffer, channel + start), always)
        run("tdc_load", address(shift, start), address(buffer, buffer.shape[0] // 2 + channel + start), always)
    return scale, shift


def apply_prologue(chain: Chain, words: tirx.Buffer, first: ir.Expr | int, constants: Constants) -> None:
    """Apply the prologue to a vector of channels in registers, whose first word is ``first``."""
    count, dtype, (scale, shift) = chain.unit.vector, chain.unit.dtype, constants
    assert chain.prologue is not None
    values = local(count)
    for pair in range(4) if dtype != "float32" else ():
        run(f"tdc_unpack_{dtype}", address(values, pair * 2), address(words, first + pair))
    with unrolled(count) as i:
        value = values[i] if dtype != "float32" else words[first + i]
        T.buffer_store(values, clip(value * scale[i] + shift[i], chain.prologue), [i])
    result, _ = chain.to_words(values, count)
    with unrolled(4) as i:
        T.buffer_store(words, result[i], [first + i])
