"""What is done where the maximum of each 2x2 results is all that is stored.

The results of a tile meet in shared memory, as they would be stored; threads then take a vector of channels of four
pixels each.  No 2x2 is of several tiles, nor of several blocks of a cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import all_of, local, unrolled, when
from tdc_tvm.schedules.cuda.intrinsics import address, larger_of, run

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain


def put_result(chain: Chain, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer, rows: int) -> None:
    """Store neighbouring channels of one of the tile's pixels, counted from the first that this block computes."""
    words, count = (values, rows) if chain.unit.dtype == "float32" else chain.to_words(values, rows)
    run(f"tdc_move{count}", chain.place(_word(chain, pixel - _first(chain), channel)), address(words, 0))


def store_maxima(chain: Chain) -> None:
    """Store the maximum of each 2x2 results that are all of the output."""
    part, core, unit = chain.part, chain.part.core, chain.unit
    vectors, row = part.slice_channels(part.last) // unit.vector, part.row_pixels_of_tile

    def take(item: ir.Expr) -> None:
        window, own = T.Bind(item // vectors), T.Bind(item % vectors * unit.vector)
        pixel, channel = T.Bind(window // (row // 2) * (2 * row) + window % (row // 2) * 2), chain.out_channel(own)
        in_tile = T.Bind(_first(chain) + pixel)
        y, x = chain.place_in_tile(in_tile)
        y, x = T.Bind(chain.tile.out_y0 + y), T.Bind(chain.tile.out_x0 + x)
        most, more, words = local(unit.vector), local(unit.vector), local(4)

        def store() -> None:
            for number, apart in enumerate((0, 1, row, row + 1)):
                values, from_ = more if number else most, chain.place(_word(chain, pixel + apart, own))
                if unit.dtype == "float32":
                    run("tdc_move4", address(values, 0), from_)
                else:
                    run("tdc_move4", address(words, 0), from_)
                    for pair in range(4):
                        run(f"tdc_unpack_{unit.dtype}", address(values, pair * 2), address(words, pair))
                if number:
                    with unrolled(unit.vector) as i:
                        T.buffer_store(most, larger_of(most[i], T.Bind(more[i])), [i])
            chain.write(y // 2, x // 2, channel, most, unit.vector)

        inside = all_of(
            chain.tile.exists,
            chain.is_in_tile(in_tile) if _has_group(chain) else True,
            y < core.out_height - 1 if core.out_height % part.tile_h else True,
            x < core.out_width - 1 if core.out_width % part.tile_w else True,
            chain.is_stored(channel),
        )
        when(inside, store)

    chain.meet()
    chain.each(part.pooled_pixels // 4 * vectors, take)


def _has_group(chain: Chain) -> bool:
    """Whether the block has results of a group of the tile's pixels only."""
    return bool(chain.part.is_cluster and chain.part.core.pool)


def _first(chain: Chain) -> ir.Expr | int:
    """The first pixel of the tile that the block has results of."""
    return chain.rank * chain.part.group_pixels if _has_group(chain) else 0


def _word(chain: Chain, pixel: ir.Expr, channel: ir.Expr) -> ir.Expr:
    """Where a channel of one of the block's pixels lies."""
    return chain.pooled_at + pixel * chain.part.pooled_pitch + channel * chain.unit.element_bytes // 4
