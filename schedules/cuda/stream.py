"""Weights on their way to shared memory: chunks that lie there as a whole, or go through a ring."""

from __future__ import annotations

import functools

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import Block, local, when
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.plan import WARP

# How many chunks behind a warp the slot lies that it fills: the others have left it, and it waits for none of them,
# which would wait for it in turn.
_AGO = 2


class WeightStream:
    """Copies a block's weights.

    Parameters
    ----------
    block : Block
        Whose.
    at : int
        The word of shared memory from which on there is room; up to ``end``.  A multiple of 128 bytes, as all chunks
        are: copies to elsewhere run at a quarter of the speed (seen on an H100).
    """

    def __init__(self, block: Block, at: int):
        self.block, self.part = block, block.part
        part = self.part
        place, self.resident_at, self.box_at = part.placement, [], []
        for stage, resident in enumerate(place.resident):
            self.resident_at.append(at)
            at += 4 * part.chunks(stage) * part.chunk_vectors(stage) * resident
        # The number of a stage's first chunk in the ring.
        self.ring_at, self.ring_chunks, self.first_chunk = at, 0, []
        for stage, ring in enumerate(place.ring):
            self.first_chunk.append(self.ring_chunks)
            self.ring_chunks += part.chunks(stage) * ring
        at += 4 * place.slots * (place.slot_vectors - 1)
        # Mailboxes lie behind all chunks.
        for stage, resident in enumerate(place.resident):
            self.box_at.append(at)
            at += 4 * part.chunks(stage) * (resident and part.has_bulk_copies)
        self.ring_box_at = at
        at += 4 * place.slots
        self.end = at

    def open_mailboxes(self) -> None:
        """Make the mailboxes of all chunks ready."""
        part, place = self.part, self.part.placement

        def open_slot(slot: ir.Expr) -> None:
            arrived, left = self.mailboxes(place.ring.index(True), slot)
            run("tdc_mailbox_open", self.block.at(arrived), 1)
            run("tdc_mailbox_open", self.block.at(left), part.warps)

        def open_chunk(stage: int, chunk: ir.Expr) -> None:
            run("tdc_mailbox_open", self.block.at(self.mailboxes(stage, chunk)[0]), 1)

        for stage, resident in enumerate(place.resident):
            if resident:
                self.block.each(part.chunks(stage), functools.partial(open_chunk, stage))
        if place.slots:
            self.block.each(place.slots, open_slot)

    def begin(self, stage: int) -> None:
        """Begin to copy a stage's weights, as many as there is room for."""
        part, place = self.part, self.part.placement
        if place.ring[stage]:
            first = self.first_chunk[stage]
            fetched = max(0, min(part.chunks(stage), place.slots - first))
            if fetched:
                self.block.each_warp(fetched, lambda chunk: self.fetch(stage, chunk, first + chunk))
        elif place.resident[stage] and part.has_bulk_copies:
            self.block.each_warp(part.chunks(stage), lambda chunk: self.fetch(stage, chunk, chunk))
        elif place.resident[stage]:
            vectors, buffer = part.weight_vectors(stage), self.block.buffers.weights[stage]
            start = T.Bind(self.own_weights(stage))

            def copy(vector: ir.Expr) -> None:
                from_ = address(buffer, (start + vector) * self.block.unit.vector)
                run("tdc_copy", self.block.at(self.resident_at[stage] + vector * 4), from_, tirx.const(True, "bool"))

            self.block.each(vectors, copy)

    def own_weights(self, stage: int) -> ir.Expr | int:
        """The first of this block's vectors of weights."""
        return self.block.rank * self.part.weight_vectors(stage) if self.part.is_sliced(stage) else 0

    def chunk_at(self, stage: int, place: ir.Expr | int) -> ir.Expr | int:
        """The word where a chunk begins: in a slot of the ring, or at its place among the others of its stage."""
        if self.part.placement.ring[stage]:
            return self.ring_at + place * (4 * (self.part.placement.slot_vectors - 1))
        return self.resident_at[stage] + place * (4 * self.part.chunk_vectors(stage))

    def is_shared(self, stage: int) -> bool:
        """Whether a stage's weights go through shared memory."""
        return self.part.placement.resident[stage] or self.part.placement.ring[stage]

    def mailboxes(self, stage: int, place: ir.Expr | int) -> tuple[ir.Expr | int, ir.Expr | int]:
        """The words of a chunk's mailboxes: what has arrived, and which warps have left."""
        at = (self.ring_box_at if self.part.placement.ring[stage] else self.box_at[stage]) + place * 4
        return at, at + 2

    def fetch(self, stage: int, chunk: ir.Expr, place: ir.Expr) -> None:
        """Begin to copy a chunk, by one thread."""
        part = self.part
        vectors, box = part.chunk_vectors(stage), self.block.at(self.mailboxes(stage, place)[0])
        start = (self.own_weights(stage) + chunk * vectors) * self.block.unit.vector
        from_ = address(self.block.buffers.weights[stage], start)
        run("tdc_mailbox_expect", box, 16 * vectors)
        run("tdc_fetch", self.block.at(self.chunk_at(stage, place)), from_, 16 * vectors, box)

    def refill(self, within: ir.Expr, slot: ir.Expr) -> None:
        """Fetch a chunk by its number among those of a tile that go through the ring."""
        for stage, first in enumerate(self.first_chunk):
            if self.part.placement.ring[stage]:
                inside = tirx.all(within >= first, within < first + self.part.chunks(stage))
                when(inside, functools.partial(self.fetch, stage, within - first, slot))

    def pass_chunks(self, stage: int) -> None:
        """What a warp without a tile does for the ring to go on."""
        cursor = Cursor(self, stage)
        cursor.begin()
        with T.serial(self.part.chunks(stage) - 1, unroll=False):
            cursor.follow()
            cursor.leave(1)
        cursor.leave(0)


class Cursor:
    """Which of a stage's chunks a warp multiplies.

    Parameters
    ----------
    stream : WeightStream
        Whose.
    stage : int
        Of the block's stages.
    """

    def __init__(self, stream: WeightStream, stage: int):
        self.stream, self.stage, self.block = stream, stage, stream.block
        self.slots = stream.part.placement.slots if stream.part.placement.ring[stage] else 0
        # Its number among all that the block sends through the ring, its slot or place, and how often that was filled
        # before, modulo 2.
        self.number, self.place, self.fills = (local(1, "int32") for _ in range(3))

    def begin(self) -> None:
        """Wait for the first chunk of a tile."""
        number: ir.Expr | int = self.stream.first_chunk[self.stage]
        if self.slots and self.stream.part.rounds > 1:
            number = T.Bind(self.block.turn * self.stream.ring_chunks + number)
        T.buffer_store(self.number, number, [0])
        T.buffer_store(self.place, number % self.slots if self.slots else 0, [0])
        T.buffer_store(self.fills, number // self.slots % 2 if self.slots else 0, [0])
        self.wait()

    def follow(self) -> None:
        """Wait for the next chunk."""
        place = T.Bind(self.place[0] + 1)
        if self.slots:
            is_round = T.Bind(place == self.slots)
            T.buffer_store(self.number, self.number[0] + 1, [0])
            T.buffer_store(self.fills, self.fills[0] ^ tirx.Select(is_round, 1, 0), [0])
            place = tirx.Select(is_round, 0, place)
        T.buffer_store(self.place, place, [0])
        self.wait()

    def wait(self) -> None:
        """Wait until the chunk is in shared memory, where it stays if it has a place of its own."""
        arrived = self.block.at(self.stream.mailboxes(self.stage, self.place[0])[0])
        is_first = self.block.turn == 0 if not self.slots and self.stream.part.rounds > 1 else None
        when(is_first, lambda: run("tdc_mailbox_wait", arrived, self.fills[0]))

    def chunk_at(self) -> ir.Expr | int:
        """The word where the chunk begins."""
        return self.stream.chunk_at(self.stage, self.place[0])

    def leave(self, ago: int) -> None:
        """Give the chunk's slot away, or that of the chunk before.

        The warps take turns in filling the slot that was given away a few chunks ago.
        """
        stream, slots, warps = self.stream, self.slots, self.stream.part.warps
        number = T.Bind(self.number[0] - ago)
        place = T.Bind(tirx.Select(self.place[0] == 0, slots - 1, self.place[0] - 1) if ago else self.place[0])
        run("tdc_mailbox_arrive", self.block.at(stream.mailboxes(self.stage, place)[1]))
        # A division of numbers of unknown sign would take several instructions.
        warp = number % warps if warps & (warps - 1) else number & (warps - 1)
        on_duty = self.block.thread == warp * WARP
        total = stream.part.rounds * stream.ring_chunks
        with T.If(tirx.all(on_duty, number >= _AGO, number - _AGO + slots < total)), T.Then():
            before, following = T.Bind((number - _AGO) % slots), T.Bind(number - _AGO + slots)
            # All warps have left it, once for each time that it was filled.
            left = self.block.at(stream.mailboxes(self.stage, before)[1])
            run("tdc_mailbox_wait", left, (number - _AGO) // slots % 2)
            stream.refill(T.Bind(following % stream.ring_chunks), before)
