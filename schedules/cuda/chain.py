"""Emits the kernel that a `Part` describes: one to three convolutions over a tile, on CUDA or tensor cores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda import warp, warpgroup
from tdc_tvm.schedules.cuda.arith import ceil_div, round_up
from tdc_tvm.schedules.cuda.block import Block, Buffers, all_of, local, unrolled, when
from tdc_tvm.schedules.cuda.division import BANKS
from tdc_tvm.schedules.cuda.intrinsics import MOST_PENDING, address, barrier, call, clip, run
from tdc_tvm.schedules.cuda.maxima import put_result, store_maxima
from tdc_tvm.schedules.cuda.plan import Part
from tdc_tvm.schedules.cuda.prologue import apply_prologue, constants_of, prepare_input
from tdc_tvm.schedules.cuda.stream import WeightStream
from tdc_tvm.schedules.cuda.work import WARP
from tdc_tvm.schedules.kernel import Prologue
from tdc_tvm.schedules.shape import Epilogue


@dataclass
class Tile:
    """Where a tile lies.

    Parameters
    ----------
    image : Expr
        Of the batch.
    out_y0, out_x0, in_y0, in_x0 : Expr
        First row and column of the core's output, and of its input, padding counted.
    exists : Expr or True
        Whether it is one.  A block without a tile left computes one that is outside of the batch, and stores
        nothing of it.
    """

    image: ir.Expr
    out_y0: ir.Expr
    out_x0: ir.Expr
    in_y0: ir.Expr
    in_x0: ir.Expr
    exists: ir.Expr | bool


class Chain(Block):
    """Emits one part."""

    def __init__(self, part: Part, epilogue: Epilogue, buffers: Buffers, prologue: Prologue | None = None):
        super().__init__(part, buffers)
        self.epilogue, self.prologue = epilogue, prologue
        self.last = part.last
        # What bulk copies move comes first.  Sums that are sent, by group of pixels, and received, by sender.
        self.outbox_at, self.inbox_at = 0, part.exchange_words // 2
        self.stream = WeightStream(self, part.exchange_words)
        self.box_at, at = self.stream.end, self.stream.end + part.mailbox_words
        self.bias_at, self.input_at = [], []
        for stage in range(len(part.stages)):
            self.bias_at.append(at)
            at += part.slice_channels(stage)
        # Copies to elsewhere take twice as long (seen on an H100: 4.9 us instead of 3.3 for 512 -> 512 @ 7 in FP16).
        at = round_up(at, BANKS)
        for stage in range(len(part.stages)):
            self.input_at.append(at)
            at += part.input_words(stage)
        self.scratch_at, self.pooled_at = at, at + part.scratch_words
        self.crew_words = part.crew_bytes(part.input_words(0)) // 4
        used = self.pooled_at + part.pooled_words
        unused = part.smem_bytes // 4 - (part.crews - 1) * self.crew_words - used
        assert 0 <= unused <= BANKS

    def emit(self, block: ir.Expr, rank: ir.Expr, thread: ir.Expr) -> None:
        """Emit the kernel's body.

        Parameters
        ----------
        block, rank, thread : Expr
            Which group of blocks this is, which block of the group, which thread of the block.
        """
        part = self.part
        self.begin(rank, thread)
        if part.crews > 1:
            offset = T.Bind(self.crew * self.crew_words)
            self.bias_at = [at + offset for at in self.bias_at]
            self.input_at = [at + offset for at in self.input_at]
            self.scratch_at, self.pooled_at = self.scratch_at + offset, self.pooled_at + offset

        def tile_at(turn: ir.Expr | int) -> Tile:
            return self.tile_of((turn * part.crews + self.crew) * (part.blocks // part.split) + block)

        # Weights do not depend on the kernel before this one, and can be under way before its end.  Where that cannot
        # be, before sm_90, this kernel begins with what it needs first.
        late = range(1 if part.is_staged and not part.has_bulk_copies else len(part.stages), len(part.stages))
        early = range(late.start)
        if part.is_cluster:
            with T.If(thread == 0), T.Then():
                for box in range(1 + part.gathers):
                    run("tdc_mailbox_open", self.at(self.box_at + box * 2), 1)
        if part.has_bulk_copies:
            when(self.is_first_crew, self.stream.open_mailboxes)
            run("tdc_fence_copies")
            barrier()
        for stage in early:
            self.copy_weights(stage)
            run("tdc_commit")
        if part.placement.slots:
            self.stream.begin_ring()
        if part.is_cluster:
            run("tdc_cluster_arrive")
        run("tdc_wait_for_dependencies")
        # Not earlier: kernels that wait two ahead delay the one between by microseconds (seen on an H100).
        run("tdc_launch_dependents")
        ahead = part.fetches_ahead
        # The stage from which on the place of the next input is free.
        free_from = min(1, part.core_index)
        if ahead:
            self.copy_input(tile_at(0), 0)
            run("tdc_commit")
            for stage in late:
                self.copy_weights(stage)
            run("tdc_commit")
        with T.serial(part.rounds) as turn:
            self.turn, self.tile = turn, tile_at(turn)
            if part.is_staged and not ahead:
                self.copy_input(self.tile, 0)
                run("tdc_commit")
                for stage in late:
                    with T.If(turn == 0), T.Then():
                        self.copy_weights(stage)
                    run("tdc_commit")
            for stage in range(len(part.stages)):
                # Groups of copies that were begun after this stage's: the next input, weights of later ones, chunks.
                begun = int(stage > free_from) if ahead else self.last - stage if late or not part.is_staged else 0
                if not part.has_bulk_copies:
                    begun += sum(part.chunks(i) * part.placement.ring[i] for i in range(stage))
                run(f"tdc_await{min(begun, MOST_PENDING)}")
                if self.unit.name == "wgmma":
                    run("tdc_fence_copies")
                self.meet()
                if stage == 0 and self.prologue is not None and part.is_staged:
                    prepare_input(self)
                    if self.unit.name == "wgmma":
                        run("tdc_fence_copies")
                    self.meet()
                if ahead and stage == free_from:
                    with T.If(turn < part.rounds - 1), T.Then():
                        self.copy_input(tile_at(turn + 1), (turn + 1) % part.buffers)
                    run("tdc_commit")
                if part.is_cluster and stage == part.core_index:
                    # All blocks have begun, and read what they were sent for the tile before.
                    run("tdc_cluster_wait")
                self.stage(stage)
                if part.is_cluster and stage == part.core_index:
                    self.exchange()
                    if part.gathers:
                        self.gather()
            if part.is_cluster:
                run("tdc_cluster_arrive")
            if part.pools:
                store_maxima(self)
            if part.rounds > 1:
                # Shared memory is written again.
                self.meet()
        if part.is_cluster:
            # What a block sends is read from its shared memory: it stays until all have got everything.
            run("tdc_cluster_wait")

    def tile_of(self, number: ir.Expr) -> Tile:
        """The place of a tile of the batch."""
        part, core, number = self.part, self.part.core, T.Bind(number)
        out_y0 = T.Bind(number // part.tiles[1] % part.tiles[0] * part.tile_h)
        out_x0 = T.Bind(number % part.tiles[1] * part.tile_w)
        return Tile(
            T.Bind(number // (part.tiles[0] * part.tiles[1])),
            out_y0,
            out_x0,
            T.Bind(out_y0 * core.stride[0] - core.padding[0]),
            T.Bind(out_x0 * core.stride[1] - core.padding[1]),
            number < part.tile_count if part.tile_count % part.tiles_at_once else True,
        )

    def exchange(self) -> None:
        """Send sums of the core to the blocks that finish them, and finish those of this block's pixels."""
        part, stage, box = self.part, self.part.core_index, self.at(self.box_at)
        pitch, group = part.scratch_pitch(stage), part.group_pixels

        def bytes_of(rank: ir.Expr) -> ir.Expr:
            return tirx.max(tirx.min(part.tile_pixels - rank * group, group), 0) * (4 * pitch)

        run("tdc_fence_copies")
        self.meet()
        with T.If(self.thread == 0), T.Then():
            run("tdc_mailbox_expect", box, bytes_of(self.rank) * part.split)
        with T.If(tirx.all(self.thread < part.split, bytes_of(self.thread) > 0)), T.Then():
            from_ = self.at(self.outbox_at + self.thread * part.group_words)
            to = self.at(self.inbox_at + self.rank * part.group_words)
            run("tdc_send", from_, to, box, self.thread, bytes_of(self.thread))
        run("tdc_mailbox_wait", box, self.turn % 2)

        def finish(stage: int, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer) -> None:
            pixel = T.Bind(self.rank * group + pixel)
            when(all_of(self.is_in_tile(pixel)), lambda: self.finish(stage, pixel, channel, values))

        self.add_up(stage, self.inbox_at, part.split, group, part.group_words, finish)

    def is_in_tile(self, pixel: ir.Expr) -> ir.Expr | bool:
        """Whether a pixel of those that the blocks of a cluster finish is one of the tile."""
        part = self.part
        return pixel < part.tile_pixels if part.group_pixels * part.split > part.tile_pixels else True

    def gather(self) -> None:
        """Send what the core hands on of this block's pixels to the other blocks, and wait for theirs."""
        part, stage, box = self.part, self.part.core_index + 1, self.at(self.box_at + 2)
        pixel_bytes, planes = 4 * self.unit.pixel_words, part.in_channels(stage) // self.unit.depth
        first = T.Bind(self.rank * part.group_pixels)
        pixels = T.Bind(tirx.max(tirx.min(part.tile_pixels - first, part.group_pixels), 0))

        def send(item: ir.Expr) -> None:
            word = T.Bind(
                self.input_at[stage] + item % planes * part.plane_words(stage) + first * self.unit.pixel_words
            )
            rank = (self.rank + 1 + item // planes) % part.split
            run("tdc_send", self.at(word), self.at(word), box, rank, pixels * pixel_bytes)

        run("tdc_fence_copies")
        self.meet()
        with T.If(self.thread == 0), T.Then():
            run("tdc_mailbox_expect", box, (part.tile_pixels - pixels) * (planes * pixel_bytes))
        when(
            all_of(pixels > 0 if part.group_pixels * (part.split - 1) >= part.tile_pixels else True),
            lambda: self.each_warp(planes * (part.split - 1), send),
        )
        run("tdc_mailbox_wait", box, self.turn % 2)

    def copy_weights(self, stage: int) -> None:
        """Begin to copy a stage's weights and biases into shared memory."""
        part, bias = self.part, self.buffers.biases[stage]
        if bias is not None:
            count = part.slice_channels(stage)
            bias_start = T.Bind(self.rank * count) if part.has_own_channels(stage) else 0

            def copy_bias(vector: ir.Expr) -> None:
                to, from_ = self.at(self.bias_at[stage] + vector * 4), address(bias, bias_start + vector * 4)
                run("tdc_copy", to, from_, tirx.const(True, "bool"))

            self.each(count // 4, copy_bias)
        when(self.is_first_crew, functools.partial(self.stream.begin, stage))

    def copy_input(self, tile: Tile, buffer: ir.Expr | int) -> None:
        """Copy a tile's input and halo into shared memory, zeros where there is none."""
        part = self.part
        items = part.halo[1] * (part.in_channels(0) // self.unit.vector)
        at = self.input_at[0] + buffer * (part.input_words(0) // part.buffers)
        if items > part.threads:
            for begin in range(0, items, part.threads):
                item = T.Bind(begin + self.thread)
                is_item = all_of(item < items if begin + part.threads > items else True)
                self.copy_rows(tile, at, item, 0, 1, is_item)
            return
        # A warp's threads take neighbouring vectors, and the block several rows at once.
        rows = part.threads // items
        first = T.Bind(self.thread // items)
        is_item = all_of(first < rows if rows * items < part.threads else True)
        self.copy_rows(tile, at, T.Bind(self.thread % items), first, rows, is_item)

    def copy_rows(
        self,
        tile: Tile,
        at: ir.Expr | int,
        item: ir.Expr,
        first: ir.Expr | int,
        rows: int,
        is_item: ir.Expr | None,
    ) -> None:
        """Copy a column's vector of channels from every row, ``rows`` apart: most of its place is known once."""
        part, conv = self.part, self.part.stages[0]
        vectors = part.in_channels(0) // self.unit.vector
        column, vector = T.Bind(item // vectors), T.Bind(item % vectors)
        x, channel = T.Bind(tile.in_x0 + column), T.Bind(self.own_channels() + vector * self.unit.vector)
        start = T.Bind(self.offset(tile.image, tile.in_y0 + first, x) + channel)
        pixel = T.Bind(self.pixel_at(0, first, column))
        width = part.row_pixels if part.core_index == 0 else part.halo[1]
        steps = ceil_div(part.halo[0], rows)

        def copy(step: ir.Expr) -> None:
            y = tile.in_y0 + first + step * rows
            inside = all_of(
                tile.exists,
                x >= 0,
                x < conv.width,
                channel < part.in_width if self.reads_behind_channels() else True,
                y >= 0,
                y < conv.height,
            )
            from_ = address(self.buffers.x, 0, 0, 0, start + step * (rows * self.buffers.in_row))
            word = self.place_of(0, at, pixel + step * (rows * width), vector)
            self.copy_vector(word, from_, inside, channel)

        def copy_all() -> None:
            with T.serial(steps, unroll=min(8, steps)) as step:
                is_row = all_of(first + step * rows < part.halo[0] if steps * rows > part.halo[0] else True)
                when(is_row, lambda: copy(step))

        when(is_item, copy_all)

    def pixel_at(self, stage: int, y: ir.Expr | int, x: ir.Expr) -> ir.Expr:
        """The number of a pixel of the halo in a stage's input."""
        part, stride = self.part, self.part.core.stride[1]
        if part.is_phased and stage == part.core_index:
            return y * part.row_pixels + x % stride * (part.row_pixels // stride) + x // stride
        return y * part.halo[1] + x

    def place_of(self, stage: int, start: ir.Expr | int, pixel: ir.Expr, vector: ir.Expr) -> ir.Expr:
        """The word where a vector of a pixel's channels lies in a stage's input, which begins at a word."""
        row = start + vector // self.unit.chunks * self.part.plane_words(stage) + pixel * self.unit.pixel_words
        within = vector % self.unit.chunks
        if self.unit.name == "wgmma":
            row = T.Bind(row)
            within = within ^ warpgroup.swizzle(row)
        return row + within * 4

    def input_start(self, stage: int) -> ir.Expr | int:
        """The word where a stage's input begins."""
        begin = self.input_at[stage]
        if stage == 0 and self.part.buffers > 1:
            return begin + self.turn % 2 * (self.part.input_words(0) // 2)
        return begin

    def copy_vector(self, word: ir.Expr, from_: ir.Expr, inside: ir.Expr, channel: ir.Expr) -> None:
        """Begin to copy a vector of the input; what is not inside is not read."""
        part, unit = self.part, self.unit
        if part.in_width % unit.vector == 0:
            run("tdc_copy", self.at(word), from_, inside)
            return
        words = local(4)
        count = tirx.if_then_else(inside, part.in_width - channel, 0)
        run(f"tdc_gather_{unit.dtype}", address(words, 0), from_, count)
        run("tdc_move4", self.place(word), address(words, 0))

    def own_channels(self) -> ir.Expr | int:
        """The first channel of the input that this block reads."""
        return self.rank * self.part.in_channels(0) if self.part.is_cluster and self.part.core_index == 0 else 0

    def reads_behind_channels(self) -> bool:
        """Whether some block reads more channels than there are."""
        part = self.part
        blocks = part.split if part.is_cluster and part.core_index == 0 else 1
        return part.in_width < blocks * part.in_channels(0)

    def offset(self, image: ir.Expr, y: ir.Expr, x: ir.Expr) -> ir.Expr:
        """Where a pixel of the input begins in memory, in elements."""
        return (image * self.part.stages[0].height + y) * self.buffers.in_row + x * self.buffers.in_pitch

    def stage(self, stage: int) -> None:
        """Compute a stage."""
        part, unit, work = self.part, self.unit, self.part.works[stage]
        channel_tiles, pixel_tiles = part.tiles_of_work(stage)
        items, groups = channel_tiles * pixel_tiles, part.teams // work.splits
        team = T.Bind(self.warp if unit.warps == 1 else call("tdc_uniform", self.warp // unit.warps, returns="int32"))
        acc = local(self.sums(stage))
        # Those without a tile are the last ones, so that all schedulers of the processor have others.
        split = T.Bind(team % work.splits)
        done = self.put_sums if part.is_cluster and stage == part.core_index else self.finish
        with T.serial(part.turns_of_work(stage)) as i:
            item = T.Bind(i * groups + team // work.splits)

            def compute() -> None:
                # Neighbouring warps take neighbouring pixels, and the same weights.
                channel_tile, pixel_tile = T.Bind(item // pixel_tiles), T.Bind(item % pixel_tiles)
                with unrolled(acc.shape[0]) as j:
                    T.buffer_store(acc, tirx.const(0, "float32"), [j])
                if unit.name == "wgmma":
                    warpgroup.multiply(self, stage, acc, channel_tile, pixel_tile)
                else:
                    warp.multiply(self, stage, acc, split, channel_tile, pixel_tile)
                if work.splits == 1:
                    self.each_result(stage, acc, channel_tile, pixel_tile, lambda *at: done(stage, *at))
                else:
                    self.each_result(
                        stage, acc, channel_tile, pixel_tile, lambda *at: self.share_sums(stage, split, *at)
                    )

            busy = all_of(item < items if items % groups else True)
            when(busy, compute)
            if busy is not None and part.placement.ring[stage]:
                when(tirx.Not(busy), lambda: self.stream.pass_chunks(stage))
        if work.splits > 1:
            self.meet()
            words = part.pixels(stage) * part.scratch_pitch(stage)
            self.add_up(stage, self.scratch_at, work.splits, part.pixels(stage), words, done)

    def sums(self, stage: int) -> int:
        """Registers of a lane's sums: of few, the steps of a unit have their own, to depend on each other less."""
        work = self.part.works[stage]
        products = work.rows * work.columns
        if self.unit.name == "fma":
            return products
        return products * (4 if self.unit.name == "mma" and products <= 8 else 2)

    def result_rows(self, stage: int) -> int:
        """Neighbouring channels of a lane's sums: at most a vector, that what lanes store fills whole sectors."""
        return min(self.part.works[stage].rows, self.unit.vector)

    def pixel_lane(self) -> ir.Expr:
        """Which of the pixels that a warp loads side by side is this lane's."""
        return self.lane // (WARP // self.unit.pixels)

    def chunk_lane(self) -> ir.Expr | int:
        """Which of the vectors of a unit of depth is this lane's."""
        return self.lane % self.unit.chunks

    def position(self, stage: int, pixel: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
        """The row and column of a stage's input that a pixel of its output begins at, within the halo or the tile."""
        part = self.part
        if stage == part.core_index:
            y, x = self.place_in_tile(pixel)
            return y * part.core.stride[0], x * part.core.stride[1]
        width = part.halo[1] if stage < part.core_index else part.tile_w
        return pixel // width, pixel % width

    def place_in_tile(self, pixel: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
        """The row and column of a pixel of the core's output."""
        part, side_by_side = self.part, self.unit.pixels
        if part.rows_kept(part.core_index) == 1:
            return pixel // part.tile_w, pixel % part.tile_w
        # What a warp loads side by side is followed by what lies below.
        group = pixel // side_by_side
        return group % part.tile_h, group // part.tile_h * side_by_side + pixel % side_by_side

    def start(self, stage: int, pixel: ir.Expr) -> ir.Expr:
        """Where the input of a pixel begins, this lane's part of the depth included."""
        part = self.part
        y, x = self.position(stage, pixel)
        if part.input_words(stage):
            at = self.pixel_at(stage, y, x) if stage <= part.core_index else pixel
            return (self.input_start(stage) + at * self.unit.pixel_words) // 4
        conv = part.stages[0]
        y, x = self.tile.in_y0 + y, self.tile.in_x0 + x
        if not self.reads_padding(stage):
            # Pixels outside of the image take any value within it; they are not stored, or stored as zeros.
            y = tirx.max(tirx.min(y, conv.height - 1), 0)
            x = tirx.max(tirx.min(x, conv.width - 1), 0)
        image = self.tile.image if self.tile.exists is True else tirx.min(self.tile.image, conv.batch - 1)
        return self.offset(image, y, x) + self.own_channels() + self.chunk_lane() * self.unit.vector

    def reads_padding(self, stage: int) -> bool:
        """Whether a stage reads a window of the input from global memory."""
        return stage == 0 and self.part.is_windowed and not self.part.is_staged

    def load_input(self, b: tirx.Buffer, j: ir.Expr, start: ir.Expr, depth: ir.Expr, inside: ir.Expr) -> None:
        """Read one vector of the input from global memory, zeros if it is not inside."""
        part, unit = self.part, self.unit
        channel = self.own_channels() + depth + self.chunk_lane() * unit.vector
        if self.reads_behind_channels():
            inside = tirx.all(inside, channel < part.in_width)
        from_ = address(self.buffers.x, 0, 0, 0, start + depth)
        if part.in_width % unit.vector == 0:
            run("tdc_load", address(b, j * 4), from_, inside)
        else:
            count = tirx.if_then_else(inside, part.in_width - channel, 0)
            run(f"tdc_gather_{unit.dtype}", address(b, j * 4), from_, count)
        if self.prologue is not None:
            apply_prologue(self, b, j * 4, constants_of(self, T.Bind(channel)))

    def each_result(
        self,
        stage: int,
        acc: tirx.Buffer,
        channel_tile: ir.Expr,
        pixel_tile: ir.Expr,
        use: Callable[[ir.Expr, ir.Expr, tirx.Buffer], None],
    ) -> None:
        """Visit a lane's sums, as ``(pixel, first channel of the slice, neighbouring channels)``."""
        part, unit, work = self.part, self.unit, self.part.works[stage]
        columns, rows, width = work.columns, self.result_rows(stage), unit.row_lanes * work.rows
        values = local(rows)
        # Neighbouring lanes have neighbouring vectors of channels.
        groups, lanes = work.rows // rows, self.lane // (1 if unit.name == "wgmma" else unit.chunks)
        channel_0 = T.Bind(channel_tile * width + lanes % unit.row_lanes * rows)

        def visit(pixel: ir.Expr, group: ir.Expr, has_result: ir.Expr | bool = True) -> None:
            channel = T.Bind(channel_0 + group * (unit.row_lanes * rows))
            inside = all_of(
                has_result,
                pixel < part.pixels(stage) if part.pixels(stage) % (columns * unit.pixels) else True,
                channel < part.slice_channels(stage) if part.slice_channels(stage) % width else True,
            )
            when(inside, lambda: use(pixel, channel, values))

        pixel_0 = T.Bind(pixel_tile * (columns * unit.pixels))
        if unit.name == "wgmma":
            pixel = T.Bind(pixel_0 + self.warp % unit.warps * 16 + self.lane // 4)
            with unrolled(groups) as i, unrolled(2) as e:
                with unrolled(rows) as row:
                    T.buffer_store(values, acc[(i * (rows // 2) + row // 2) * 4 + e * 2 + row % 2], [row])
                visit(pixel + e * 8, i)
            return
        if unit.name == "mma":
            with unrolled(columns) as j, unrolled(2) as e, unrolled(groups) as i:
                with unrolled(rows) as row:
                    number = i * rows + row
                    T.buffer_store(values, acc[(number // 2 * columns + j) * 4 + number % 2 * 2 + e], [row])
                visit(pixel_0 + j * unit.pixels + self.lane % 4 * 2 + e, i)
            return
        sums, left, column, group, has_result = self.add_lanes(acc, columns, groups, rows)
        step, group_step = columns // left, groups * rows * left // sums.shape[0]
        with unrolled(left) as j, unrolled(groups // group_step) as i:
            with unrolled(rows) as row:
                T.buffer_store(values, sums[(i * rows + row) * left + j], [row])
            visit(pixel_0 + (j * step + column) * unit.pixels + self.pixel_lane(), i * group_step + group, has_result)

    def add_lanes(
        self, sums: tirx.Buffer, columns: int, groups: int, rows: int
    ) -> tuple[tirx.Buffer, int, ir.Expr | int, ir.Expr | int, ir.Expr | bool]:
        """Add up the sums of the lanes that have a part of the depth each, of ``(groups, rows, columns)`` results.

        In each step two lanes exchange halves: of the columns, else of the groups, else both get the same.

        Returns
        -------
        tuple
            What is left in this lane, of how many columns; its first column and group; whether no other lane has it.
        """
        column: ir.Expr | int = 0
        group: ir.Expr | int = 0
        has_result: ir.Expr | bool = True
        column_step, group_step, mask = 1, 1, 1
        while mask < self.unit.chunks:
            odd = T.Bind(self.chunk_lane() // mask % 2)
            # Values that are exchanged are so far apart.
            apart = 1 if columns > 1 else rows if groups > 1 else 0
            count = sums.shape[0] // (2 if apart else 1)
            left = local(count)
            with unrolled(count) as number:
                at = number // max(1, apart) * (2 * apart) + number % apart if apart else number
                first, second = sums[at], sums[at + apart]
                kept, given = tirx.Select(odd == 1, second, first), tirx.Select(odd == 1, first, second)
                T.buffer_store(left, kept + call("tdc_swap", given, mask, returns="float32"), [number])
            if columns > 1:
                column, column_step, columns = column + odd * column_step, column_step * 2, columns // 2
            elif groups > 1:
                group, group_step, groups = group + odd * group_step, group_step * 2, groups // 2
            else:
                has_result = all_of(has_result, odd == 0)
            sums, mask = left, mask * 2
        return sums, columns, column, group, has_result

    def share_sums(self, stage: int, split: ir.Expr, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer) -> None:
        """Put sums over a part of the depth where `add_up` finds them."""
        self.put(stage, self.scratch_at, split * self.part.pixels(stage) + pixel, channel, values)

    def put_sums(self, stage: int, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer) -> None:
        """Put a block's part of the core's sums where `exchange` sends them from."""
        part = self.part
        filled_up = part.group_words - part.group_pixels * part.scratch_pitch(stage)
        self.put(stage, self.outbox_at + pixel // part.group_pixels * filled_up, pixel, channel, values)

    def put(self, stage: int, start: int, row: ir.Expr, channel: ir.Expr, values: tirx.Buffer) -> None:
        """Store a lane's sums, one row for each pixel."""
        rows, at = self.result_rows(stage), start + row * self.part.scratch_pitch(stage) + channel
        for first in range(0, rows, 4):
            run(f"tdc_move{min(4, rows - first)}", self.place(at + first), address(values, first))

    def add_up(
        self,
        stage: int,
        start: int,
        count: int,
        pixels: int,
        words: int,
        done: Callable[[int, ir.Expr, ir.Expr, tirx.Buffer], None],
    ) -> None:
        """Add ``count`` parts of the depth of so many pixels, ``words`` apart, always in the same order."""
        part, rows = self.part, self.result_rows(stage)
        vectors = part.slice_channels(stage) // rows

        def add(item: ir.Expr) -> None:
            values, more = local(rows), local(rows)
            pixel, channel = T.Bind(item // vectors), T.Bind(item % vectors * rows)
            at = T.Bind(start + pixel * part.scratch_pitch(stage) + channel)
            for number in range(count):
                for first in range(0, rows, 4):
                    from_ = self.place(at + number * words + first)
                    run(f"tdc_move{min(4, rows)}", address(more if number else values, first), from_)
                if number:
                    with unrolled(rows) as row:
                        T.buffer_store(values, values[row] + more[row], [row])
            done(stage, pixel, channel, values)

        self.each(pixels * vectors, add)

    def finish(self, stage: int, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer) -> None:
        """Add the bias to sums and hand them on: to the next stage, or to the output."""
        rows = self.result_rows(stage)
        if self.buffers.biases[stage] is not None:
            with unrolled(rows) as row:
                bias = self.shared[self.bias_at[stage] + channel + row]
                T.buffer_store(values, values[row] + bias, [row])
        if stage == self.last:
            self.store(pixel, channel, values, rows)
        else:
            self.hand_on(stage, pixel, channel, values, rows)

    def hand_on(self, stage: int, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer, rows: int) -> None:
        """Store into the next stage's input; the core's padding is zero."""
        part = self.part
        # A copied input is zero there, and so is what follows from it without a bias.
        if stage < part.core_index and not (part.is_staged and self.buffers.biases[stage] is None):
            y, x = self.position(stage, pixel)
            y, x = self.tile.in_y0 + y, self.tile.in_x0 + x
            inside = tirx.all(y >= 0, y < part.core.height, x >= 0, x < part.core.width)
            with unrolled(rows) as row:
                T.buffer_store(values, tirx.Select(inside, values[row], tirx.const(0, "float32")), [row])
        words, count = self.to_words(values, rows)
        if part.is_phased and stage + 1 == part.core_index:
            pixel = self.pixel_at(stage + 1, pixel // part.halo[1], pixel % part.halo[1])
        vector = channel // self.unit.vector
        within = channel % self.unit.vector * self.unit.element_bytes // 4 if rows < self.unit.vector else 0
        for start in range(0, count, 4):
            at = self.place_of(stage + 1, self.input_at[stage + 1], pixel, vector + start // 4) + within
            run(f"tdc_move{min(4, count - start)}", self.place(at), address(words, start))

    def round(self, values: tirx.Buffer, rows: int) -> None:
        """Round what TF32 multiplies next: tensor cores cut off, so that errors of many layers would add up."""
        if self.part.precision == "tf32":
            with unrolled(rows) as i:
                T.buffer_store(values, call("tdc_tf32", values[i], returns="float32"), [i])

    def to_words(self, values: tirx.Buffer, rows: int) -> tuple[tirx.Buffer, int]:
        """FP32 values as the words that are stored, and how many."""
        self.round(values, rows)
        if self.unit.dtype == "float32":
            return values, rows
        words = local(rows // 2)
        with unrolled(rows // 2) as i:
            packed = call(f"tdc_pack_{self.unit.dtype}", values[i * 2], values[i * 2 + 1], returns="float32")
            T.buffer_store(words, packed, [i])
        return words, rows // 2

    def store(self, pixel: ir.Expr, channel: ir.Expr, values: tirx.Buffer, rows: int) -> None:
        """Apply the epilogue and store to the output, or where `store_maxima` finds it."""
        part, epilogue, residual, own = self.part, self.epilogue, self.buffers.residual, channel
        core, channel = part.core, self.out_channel(channel)
        y, x = self.place_in_tile(pixel)
        y, x = T.Bind(self.tile.out_y0 + y), T.Bind(self.tile.out_x0 + x)
        whole = part.out_width % rows == 0

        def store() -> None:
            with unrolled(rows) as row:
                value = values[row]
                if residual is not None:
                    # Behind the last channel any value does: it is not stored.
                    at = channel + row if whole else tirx.min(channel + row, part.out_width - 1)
                    value = value + T.cast(residual[self.tile.image, y, x, at], "float32")
                T.buffer_store(values, clip(value, epilogue), [row])
            if part.pools:
                put_result(self, pixel, own, values, rows)
            else:
                self.write(y, x, channel, values, rows)

        inside = all_of(
            self.tile.exists,
            y < core.out_height if core.out_height % part.tile_h else True,
            x < core.out_width if core.out_width % part.tile_w else True,
            self.is_stored(channel),
        )
        when(inside, store)

    def out_channel(self, channel: ir.Expr) -> ir.Expr:
        """The channel of the output that one of this block's last stage is."""
        part = self.part
        if part.has_own_channels(self.last) and part.split > 1:
            return T.Bind(self.rank * part.slice_channels(self.last) + channel)
        return channel

    def is_stored(self, channel: ir.Expr) -> ir.Expr | bool:
        """Whether a channel that some block computes is one of the output."""
        part = self.part
        covered = part.slice_channels(self.last) * (part.split if part.has_own_channels(self.last) else 1)
        return channel < part.out_width if covered > part.out_width else True

    def write(self, y: ir.Expr, x: ir.Expr, channel: ir.Expr, values: tirx.Buffer, rows: int) -> None:
        """Store neighbouring channels of a pixel to the output."""
        part, out, start = self.part, self.buffers.out, self.buffers.out_start
        if part.out_width % rows:
            if not self.buffers.is_result:
                self.round(values, rows)
            with unrolled(rows) as row, T.If(channel + row < part.out_width), T.Then():
                value = T.cast(values[row], out.dtype) if out.dtype != "float32" else values[row]
                T.buffer_store(out, value, [self.tile.image, y, x, start + channel + row])
            return
        words, count = (values, rows) if self.buffers.is_result else self.to_words(values, rows)
        for first in range(0, count, 4):
            width = min(4, count - first)
            to = address(out, self.tile.image, y, x, start + channel + first * rows // count)
            run(f"tdc_move{width}", to, address(words, first))
