"""How a warp multiplies, on tensor cores (``mma``) or CUDA cores (``fma``): operands are loaded to registers ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import local, unrolled
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.operands import Pixels, Weights

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain

# Pairs of steps in the body of the loop over them, and most instructions: those of a few thousand are not in the
# instruction cache when they are wanted.
_UNROLL, _MOST_UNROLLED = 2, 2400


def multiply(
    chain: Chain, stage: int, acc: tirx.Buffer, split: ir.Expr, channel_tile: ir.Expr, pixel_tile: ir.Expr
) -> None:
    """Add one part of the depth to the sums of one warp tile."""
    part, unit, work = chain.part, chain.unit, chain.part.works[stage]
    # Where this lane's pixels begin: vectors of shared memory, or elements of the input; and their rows and columns,
    # where the padding is not there to be read.
    places = starts, rows, columns = [local(work.columns, "int32") for _ in range(3)]
    with unrolled(work.columns) as j:
        pixel = (pixel_tile * work.columns + j) * unit.pixels + chain.pixel_lane()
        pixel = tirx.min(pixel, part.pixels(stage) - 1)
        T.buffer_store(starts, chain.start(stage, pixel), [j])
        if chain.reads_padding(stage):
            y, x = chain.position(stage, pixel)
            T.buffer_store(rows, chain.tile.in_y0 + y, [j])
            T.buffer_store(columns, chain.tile.in_x0 + x, [j])
    kept, share = part.rows_kept(stage), part.share(stage)
    windows, meetings = share // kept, kept + (kept == 1)
    weights, pixels = Weights(chain, stage, channel_tile, split), Pixels(chain, stage, places, split)
    # Two sets of operands: one is loaded while the other is multiplied.
    a = [local(4 * work.rows) for _ in range(min(2, share))]
    b = [local(4 * pixels.count) for _ in range(min(2, windows))]

    def turn(i: ir.Expr, parity: int, is_last: bool) -> None:
        """Multiply as many units as rows are kept, whose operands are loaded, and load those that follow."""
        for row in range(kept):
            number = parity * kept + row
            if row == kept // 2 and not is_last:
                pixels.follow(b[1 - parity], i + 1)
            if not (is_last and row == kept - 1):
                meets = part.chunk_units(stage) == 1 or (number + 1) % meetings == 0
                weights.follow(a[(number + 1) % 2], i * kept + row + 1, meets)
            _multiply_unit(chain, stage, acc, a[number % 2], b[parity], row)

    weights.begin(a[0])
    pixels.begin(b[0])
    if windows > 1:
        with T.serial(windows // 2, unroll=_unrolled_pairs(chain, stage, windows // 2)) as pair:
            turn(pair * 2, 0, False)
            turn(pair * 2 + 1, 1, False)
    if windows % 2:
        turn(tirx.const(windows - 1, "int32"), 0, True)
    half = chain.sums(stage) // 2
    if half == work.rows * work.columns * 2:
        with unrolled(half) as i:
            T.buffer_store(acc, acc[i] + acc[half + i], [i])


def _unrolled_pairs(chain: Chain, stage: int, pairs: int) -> int | bool:
    """How many pairs of steps of a stage the CUDA compiler unrolls; False for none."""
    work, kept = chain.part.works[stage], chain.part.rows_kept(stage)
    if kept == 1:
        return _UNROLL if pairs >= 2 * _UNROLL else False
    products = work.rows * work.columns * (4 if chain.unit.name == "fma" else 1)
    most = max(1, _MOST_UNROLLED // (2 * kept * products))
    found = max(count for count in range(1, pairs + 1) if pairs % count == 0 and count <= most)
    return found if found > 1 else False


def _multiply_unit(chain: Chain, stage: int, acc: tirx.Buffer, a: tirx.Buffer, b: tirx.Buffer, first: int) -> None:
    """Add one unit of depth: ``acc[row, column] += sum over k of a[row, k] * b[first + column, k]``."""
    work = chain.part.works[stage]
    rows, columns = work.rows, work.columns
    if chain.unit.name == "mma":
        second = rows * columns * 2 % chain.sums(stage)
        with unrolled(rows // 2) as m, unrolled(columns) as j:
            at = (m * columns + j) * 4
            operands = address(a, m * 8), address(a, m * 8 + 4), address(b, (first + j) * 4)
            run(f"tdc_mma_{chain.unit.dtype}", address(acc, at), address(acc, second + at), *operands)
        return
    with unrolled(4) as k, unrolled(rows) as row, unrolled(columns) as j:
        T.buffer_store(acc, acc[row * columns + j] + a[row * 4 + k] * b[(first + j) * 4 + k], [row * columns + j])
