"""Loop nests of convolutions on flat FP32 buffers, written into the TIR builder that is open.

Accumulators are one buffer per vector, in ``global`` scope and far below the 1024 bytes under which TVM's
LowerTVMBuiltin leaves an allocation on the stack: that is what lets LLVM keep them in registers.  The
scope ``local`` would turn each into a heap allocation.  StorageRewrite may lay buffers whose lives do not overlap
over each other and then fails if their element types differ: a function uses one vector width for all of its
accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.shape import Epilogue

Index = Any  # an int or a TIR expression

# DLPack's codes for the CPU and for floats.
_CPU, _FLOAT = 1, 2


def vector_type(lanes: int) -> str:
    """The TIR name of a vector of floats."""
    return "float32" if lanes == 1 else f"float32x{lanes}"


def splat(value: Any, lanes: int) -> Any:
    """A scalar in every lane."""
    scalar = tirx.const(value, "float32") if isinstance(value, float) else value
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def load(buffer: Any, index: Index, lanes: int) -> Any:
    """``lanes`` neighbouring elements."""
    return buffer[index] if lanes == 1 else buffer.vload([index], vector_type(lanes))


def store(buffer: Any, index: Index, value: Any, lanes: int) -> None:
    """Write ``lanes`` neighbouring elements."""
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def accumulator(lanes: int, value: Any) -> Any:
    """A register with a first value."""
    register = T.alloc_buffer((1,), vector_type(lanes))
    T.buffer_store(register, value, [0])
    return register


@contextmanager
def workspace(count: int) -> Iterator[Any]:
    """Scratch memory of ``count`` elements, from TVM's pool of the running thread.

    Asked for here and not through an allocation node: with one, CompactBufferAllocation spends up to a second on
    the accesses of a kernel, and StorageRewrite may lay it over the accumulators.
    """
    pointer = T.handle("float32", "global").ty
    size = tirx.const(4 * max(count, 1), "uint64")
    data = tirx.call_intrin(pointer, "tirx.TVMBackendAllocWorkspace", _CPU, 0, size, _FLOAT, 32)
    buffer = T.decl_buffer((max(count, 1),), "float32", data=data)
    yield buffer
    T.evaluate(T.TVMBackendFreeWorkspace(_CPU, 0, buffer.data))


@contextmanager
def loop(extent: Index) -> Iterator[Index]:
    """A serial loop, or none at all where the extent is 1."""
    if isinstance(extent, int) and extent == 1:
        yield 0
    else:
        with T.serial(0, extent) as index:
            yield index


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Code under a condition; none is written for ``True``."""
    if condition is True:
        yield
    else:
        with T.If(condition), T.Then():
            yield


def copy(dst: Any, dst_base: Index, src: Any, src_base: Index, count: int, lanes: int) -> None:
    """Copy ``count`` contiguous elements; a ``src`` of None means zeros."""
    for start, size, width in ((0, count // lanes, lanes), (count // lanes * lanes, count % lanes, 1)):
        if size:
            with loop(size) as i:
                offset = start + i * width
                store(
                    dst,
                    dst_base + offset,
                    splat(0.0, width) if src is None else load(src, src_base + offset, width),
                    width,
                )


@dataclass(frozen=True)
class Tile:
    """A register tile: ``rows x cols`` output pixels by ``vectors`` vectors of ``lanes`` output channels."""

    rows: int
    cols: int
    vectors: int
    lanes: int

    @property
    def pixels(self) -> int:
        """Output positions."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Blocks:
    """Output channels as ``full`` blocks of ``width`` and a rest of ``rest`` channels in ``rest_vectors`` vectors."""

    channels: int
    tile: Tile

    @property
    def width(self) -> int:
        """Channels of a full block."""
        return self.tile.vectors * self.tile.lanes

    @property
    def full(self) -> int:
        """Number of full blocks."""
        return self.channels // self.width

    @property
    def rest(self) -> int:
        """Channels left over."""
        return self.channels % self.width

    @property
    def rest_vectors(self) -> int:
        """Vectors that the rest takes."""
        return -(-self.rest // self.tile.lanes)

    @property
    def count(self) -> int:
        """Blocks in all."""
        return self.full + (self.rest > 0)

    @property
    def padded(self) -> int:
        """Channels with the rest rounded up to whole vectors."""
        return self.full * self.width + self.rest_vectors * self.tile.lanes


@dataclass(frozen=True)
class Nest:
    """Where a dense convolution finds its data: distances in elements on flat buffers.

    Parameters
    ----------
    taps : tuple[int, int]
        Height and width of the window.
    channels : int
        Input channels that are reduced.
    tap_step : tuple[int, int]
        Distance of neighbouring taps in the source, down and across.
    src_step, dst_step : tuple[int, int]
        Distance of neighbouring output pixels in the source and the destination, down and across.
    """

    taps: tuple[int, int]
    channels: int
    tap_step: tuple[int, int]
    src_step: tuple[int, int]
    dst_step: tuple[int, int]

    @property
    def reduction(self) -> int:
        """Terms of one output element's sum."""
        return self.taps[0] * self.taps[1] * self.channels


@dataclass(frozen=True)
class Source:
    """A flat buffer, where to begin in it, and for outputs what is done before storing."""

    buffer: Any
    base: Index = 0


@dataclass(frozen=True)
class Sink:
    """A flat output buffer with its epilogue; ``residual`` has the same layout."""

    buffer: Any
    base: Index = 0
    epilogue: Epilogue = Epilogue()  # noqa: RUF009
    residual: Any = None

    def put(self, offset: Index, value: Any, lanes: int) -> None:
        """Finish ``lanes`` neighbouring elements."""
        index = self.base + offset
        if self.residual is not None:
            value = value + load(self.residual, index, lanes)
        # Comparisons, unlike max and min, let NaN pass.
        if self.epilogue.clip_min is not None:
            low, value = splat(float(self.epilogue.clip_min), lanes), T.bind(value)
            value = tirx.Select(value < low, low, value)
        if self.epilogue.clip_max is not None:
            high, value = splat(float(self.epilogue.clip_max), lanes), T.bind(value)
            value = tirx.Select(value > high, high, value)
        store(self.buffer, index, value, lanes)

    def put_part(self, offset: Index, value: Any, lanes: int, count: int) -> None:
        """Finish the first ``count`` of ``lanes`` elements, one by one."""
        if count == lanes:
            self.put(offset, value, lanes)
            return
        # Not through memory: StorageRewrite would lay such a buffer over an accumulator.
        vector = T.bind(value)
        for i in range(count):
            self.put(offset + i, tirx.Shuffle([vector], [i]), 1)


def dense_tile(nest: Nest, tile: Tile, src: Source, sink: Sink, weights: Source, bias: Source, channels: int) -> None:
    """One register tile: ``channels`` output channels of ``tile.pixels`` pixels, the whole reduction."""
    pixels = [(r, c) for r in range(tile.rows) for c in range(tile.cols)]
    lanes, vectors = tile.lanes, tile.vectors
    start = [T.bind(load(bias.buffer, bias.base + v * lanes, lanes)) for v in range(vectors)]
    sums = [[accumulator(lanes, start[v]) for v in range(vectors)] for _ in pixels]
    # Neighbouring taps that touch in memory make one long loop.
    merged = nest.tap_step[1] == nest.channels
    across, deep = (1, nest.taps[1] * nest.channels) if merged else (nest.taps[1], nest.channels)
    with loop(nest.taps[0]) as r, loop(across) as s, loop(deep) as c:
        row = T.bind(weights.base + ((r * across + s) * deep + c) * (vectors * lanes))
        factors = [T.bind(load(weights.buffer, row + v * lanes, lanes)) for v in range(vectors)]
        origin = T.bind(src.base + r * nest.tap_step[0] + s * nest.tap_step[1] + c)
        for (y, x), pixel_sums in zip(pixels, sums, strict=True):
            value = T.bind(splat(src.buffer[origin + (y * nest.src_step[0] + x * nest.src_step[1])], lanes))
            for total, factor in zip(pixel_sums, factors, strict=True):
                T.buffer_store(total, total[0] + value * factor, [0])
    for (y, x), pixel_sums in zip(pixels, sums, strict=True):
        for v, total in enumerate(pixel_sums):
            offset = y * nest.dst_step[0] + x * nest.dst_step[1] + v * lanes
            sink.put_part(offset, total[0], lanes, min(lanes, channels - v * lanes))


def tiles(
    rows: Index, cols: int, tile: Tile, body: Callable[[Index, Index, Tile], None], rest: int | None = None
) -> None:
    """Cover ``rows x cols`` pixels with register tiles and smaller ones at the edges.

    Parameters
    ----------
    rows : int or expression
        Rows to cover.
    rest : int, optional
        With an expression for ``rows``: what is left over by ``tile.rows``, where that is known; otherwise
        left-over rows are done one at a time.
    body : callable
        Gets the first row, the first column and the tile.
    """

    def strip(first: Index, height: int) -> None:
        full = cols // tile.cols
        if full:
            with loop(full) as i:
                body(first, i * tile.cols, Tile(height, tile.cols, tile.vectors, tile.lanes))
        if cols % tile.cols:
            body(first, full * tile.cols, Tile(height, cols % tile.cols, tile.vectors, tile.lanes))

    if isinstance(rows, int):
        groups: Index = rows // tile.rows
        rest = rows % tile.rows
    else:
        groups = rows if tile.rows == 1 else T.bind(tirx.floordiv(rows, tile.rows))
    if not (isinstance(groups, int) and groups == 0):
        with loop(groups) as i:
            strip(i * tile.rows, tile.rows)
    if tile.rows == 1:
        return
    if rest is None:
        with T.serial(0, rows - groups * tile.rows) as i:
            strip(groups * tile.rows + i, 1)
    elif rest:
        # Only the last strip has left-over rows; for the others the quotient is exact.
        with when(True if isinstance(rows, int) else groups * tile.rows < rows):
            strip(groups * tile.rows, rest)


def dense(
    nest: Nest,
    blocks: Blocks,
    src: Source,
    sink: Sink,
    weights: Source,
    bias: Source,
    rows: Index,
    cols: int,
    rest: int | None = None,
    chunk: tuple[Index, Index] | None = None,
) -> None:
    """A dense convolution of ``rows x cols`` output pixels, channel blocks outermost.

    Parameters
    ----------
    chunk : tuple, optional
        First channel block and the one after the last; all blocks by default.
    rest : int, optional
        As for `tiles`.
    """
    tile = blocks.tile

    def block(index: Index, vectors: int, channels: int) -> None:
        first = index * blocks.width

        def body(row: Index, col: Index, part: Tile) -> None:
            dense_tile(
                nest,
                part,
                Source(src.buffer, src.base + row * nest.src_step[0] + col * nest.src_step[1]),
                Sink(
                    sink.buffer,
                    T.bind(sink.base + row * nest.dst_step[0] + col * nest.dst_step[1] + first),
                    sink.epilogue,
                    sink.residual,
                ),
                Source(weights.buffer, T.bind(weights.base + first * nest.reduction)),
                Source(bias.buffer, bias.base + first),
                channels,
            )

        tiles(rows, cols, Tile(tile.rows, tile.cols, vectors, tile.lanes), body, rest)

    begin, end = chunk or (0, blocks.count)
    if blocks.full:
        if chunk is None:
            with loop(blocks.full) as i:
                block(i, tile.vectors, blocks.width)
        else:
            stop = tirx.min(end, blocks.full) if blocks.rest else end
            with T.serial(0, stop - begin) as i:
                block(begin + i, tile.vectors, blocks.width)
    if blocks.rest:
        with when(True if chunk is None else tirx.And(end == blocks.count, begin < end)):
            block(blocks.full, blocks.rest_vectors, blocks.rest)


def depthwise(
    nest: Nest,
    tile: Tile,
    src: Source,
    sink: Sink,
    weights: Source,
    bias: Source,
    channels: int,
    rows: Index,
    cols: int,
) -> None:
    """A depthwise convolution of ``rows x cols`` output pixels: vectors over channels, which lie innermost."""
    lanes = tile.lanes

    def body(row: Index, col: Index, part: Tile) -> None:
        # The last vector overlaps its neighbour where the channels are no multiple of the width.
        with loop(-(-channels // lanes)) as i:
            channel = i * lanes if channels % lanes == 0 else T.bind(tirx.min(i * lanes, channels - lanes))
            origin = T.bind(src.base + row * nest.src_step[0] + col * nest.src_step[1] + channel)
            start = T.bind(load(bias.buffer, bias.base + channel, lanes))
            sums = [accumulator(lanes, start) for _ in range(part.cols)]

            def tap(r: Index, s: Index) -> None:
                factor = T.bind(load(weights.buffer, (r * nest.taps[1] + s) * channels + channel, lanes))
                place = origin + r * nest.tap_step[0] + s * nest.tap_step[1]
                for x, total in enumerate(sums):
                    value = load(src.buffer, place + x * nest.src_step[1], lanes)
                    T.buffer_store(total, total[0] + value * factor, [0])

            if nest.taps[0] * nest.taps[1] <= 9:
                for r in range(nest.taps[0]):
                    for s in range(nest.taps[1]):
                        tap(r, s)
            else:
                with loop(nest.taps[0]) as r, loop(nest.taps[1]) as s:
                    tap(r, s)
            at = T.bind(row * nest.dst_step[0] + col * nest.dst_step[1] + channel)
            for x, total in enumerate(sums):
                sink.put(at + x * nest.dst_step[1], total[0], lanes)

    tiles(rows, cols, Tile(1, tile.cols, 1, lanes), body)


def flat(buffer: Any) -> Any:
    """A 1-D view of a parameter."""
    count = 1
    for extent in buffer.shape:
        count *= int(extent)
    return T.decl_buffer((count,), "float32", data=buffer.data)
