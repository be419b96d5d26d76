"""How four warps multiply together (``wgmma``): operands stay in shared memory, where descriptors point to them.

A product is of 64 pixels and 32 or more channels, over a unit of depth: 32 bytes of each.  PTX's layout without
swizzling wants rows of 16 bytes, eight of them side by side, further eights all as far apart, and the second 16 bytes
of depth at another distance.  A plane of 16-byte vectors of neighbouring pixels is just that, wherever in it a
window's tap begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import local
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.operands import Pixels
from tdc_tvm.schedules.cuda.stream import Cursor

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain

# Products in the body of the loop over them.
_UNROLL = 4
# Descriptors count in 16 bytes; so far apart are eight rows that lie one after the other.
_EIGHT_ROWS = 8


def multiply(chain: Chain, stage: int, acc: tirx.Buffer, channel_tile: ir.Expr, pixel_tile: ir.Expr) -> None:
    """Add the whole depth to the sums of one tile of four warps."""
    part, unit, work = chain.part, chain.unit, chain.part.works[stage]
    share, units, chunks = part.share(stage), part.chunk_units(stage), part.chunks(stage)
    channels = unit.row_lanes * work.rows
    unit_vectors = work.rows * unit.weight_lanes
    first = T.Bind(channel_tile * (units * unit_vectors))
    is_windowed = stage == part.core_index and not part.core.is_pointwise
    # A tile of a windowed stage is eight rows of eight pixels.
    between_eights = part.halo[1] if is_windowed else _EIGHT_ROWS
    start = chain.input_start(stage) // 4 + pixel_tile * (8 * between_eights)
    base = T.Bind(chain.base // 16)
    a_start = T.Bind(base + start + (part.plane_words(stage) // 4 << 16))
    b_start = T.Bind(base + first + (channels << 16))
    pixels = Pixels(chain, stage)
    pixels.start()
    cursor = Cursor(chain.stream, stage)
    cursor.begin()
    number = local(1, "int32")
    T.buffer_store(number, 0, [0])
    run(f"tdc_wgmma_begin_{channels}", address(acc, 0))
    with T.serial(chunks, unroll=False) as chunk:
        b = T.Bind(b_start + cursor.chunk_at() // 4)
        count = units if share % units == 0 else tirx.min(units, share - chunk * units)
        with T.serial(count, unroll=min(_UNROLL, units)) as step:
            operands = a_start + pixels.at[0], between_eights, b + step * unit_vectors, _EIGHT_ROWS
            run(f"tdc_wgmma_{unit.dtype}_{channels}", address(acc, 0), *operands)
            T.buffer_store(number, number[0] + 1, [0])
            pixels.advance(number[0])
        run("tdc_wgmma_commit")
        if chunks > 1:
            # A slot is filled again after the next chunk has begun: its products must be over.
            if part.placement.ring[stage]:
                run("tdc_wgmma_wait")
            with T.If(chunk < chunks - 1), T.Then():
                cursor.follow()
    run(f"tdc_wgmma_end_{channels}", address(acc, 0))
