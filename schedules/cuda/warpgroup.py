"""How four warps multiply together (``wgmma``): operands stay in shared memory, where descriptors point to them.

A product is of 64 pixels and 32 or more channels, over half a unit of depth: 32 bytes of each.  Pixels are rows of 64
bytes, eight of them side by side, further eights all as far apart, wherever in the input a window's tap begins.  Rows
are swizzled (PTX: 64-byte swizzling mode), by address, so that neighbouring lanes copy to neighbouring banks what is
neighbouring in memory: rows of 16 bytes, without swizzling, took eight times as long to copy (seen on an H100).
Weights, which are packed ahead, have rows of 16 bytes: all channels of one vector of depth after the other.

The products of a chunk are unrolled: where operands lie is known but for where chunk and tile begin.  In a loop that
computes it, instructions that depend on each other take three times as long as the product (seen on an H100).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import unrolled
from tdc_tvm.schedules.cuda.intrinsics import address, call, run
from tdc_tvm.schedules.cuda.stream import Cursor

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain

# Descriptors count in 16 bytes; so far apart are eight rows of 16 bytes that lie one after the other.
_EIGHT_ROWS = 8
# The highest bits of a descriptor, as the highest of a signed word: rows of 64 bytes, swizzled.
_SWIZZLED = -(1 << 31)
_PRODUCTS = 2
# Shared memory of one block, in 16 bytes; the addresses of blocks of a cluster have more bits.
_ADDRESSES = 1 << 14


def multiply(chain: Chain, stage: int, acc: tirx.Buffer, channel_tile: ir.Expr, pixel_tile: ir.Expr) -> None:
    """Add the whole depth to the sums of one tile of four warps."""
    part, unit, work, conv = chain.part, chain.unit, chain.part.works[stage], chain.part.stages[stage]
    units, chunks = part.chunk_units(stage), part.chunks(stage)
    channels, unit_vectors = unit.row_lanes * work.rows, work.rows * unit.weight_lanes
    pixel, plane = unit.chunks, part.plane_words(stage) // 4
    is_windowed = stage == part.core_index and not part.core.is_pointwise
    # A tile of a windowed stage is eight rows of eight pixels.
    between_eights = pixel * (part.row_pixels * conv.stride[0] if is_windowed else 8)
    base = T.Bind(chain.base // 16 % _ADDRESSES)
    a_tile = chain.input_start(stage) // 4 + pixel_tile * (8 * between_eights)
    a_start = T.Bind(call("tdc_uniform", base + a_tile, returns="int32"))
    b_tile = channel_tile * (units * unit_vectors)
    b_start = T.Bind(call("tdc_uniform", base + b_tile + (channels << 16), returns="int32"))
    # Chunks begin and end with a tap, or lie within one.
    per_tap = part.in_channels(stage) // unit.depth
    taps, steps = max(1, units // per_tap), min(units, per_tap)
    cursor = Cursor(chain.stream, stage)
    cursor.begin()
    with T.serial(chunks, unroll=False) as chunk:
        b = T.Bind(b_start + cursor.chunk_at() // 4)
        run(f"tdc_wgmma_begin_{channels}", address(acc, 0))
        first = T.Bind(chunk * units % per_tap * plane)
        with unrolled(taps) as tap_of_chunk:
            tap = chunk * units // per_tap + tap_of_chunk
            y, x = tap // conv.kernel[1] * conv.dilation[0], tap % conv.kernel[1] * conv.dilation[1]
            a = a_start + (chain.pixel_at(stage, y, x) * pixel if is_windowed else 0) + first
            with unrolled(steps) as step, unrolled(_PRODUCTS) as half:
                a_at = a + step * plane + half * (unit.chunks // _PRODUCTS)
                b_at = b + (tap_of_chunk * steps + step) * unit_vectors + half * (unit_vectors // _PRODUCTS)
                operands = a_at, between_eights + _SWIZZLED, b_at, _EIGHT_ROWS
                run(f"tdc_wgmma_{unit.dtype}_{channels}", address(acc, 0), *operands)
        run("tdc_wgmma_commit")
        if chunks > 1:
            # A slot is filled again after the next chunk has begun: its products must be over.
            if part.placement.ring[stage]:
                run("tdc_wgmma_wait")
            with T.If(chunk < chunks - 1), T.Then():
                cursor.follow()
    run(f"tdc_wgmma_end_{channels}", address(acc, 0))


def swizzle(row: ir.Expr) -> ir.Expr:
    """What is changed in the number of a vector of a row that begins at a word: two bits, by those of its address."""
    return row // 32 % 4
