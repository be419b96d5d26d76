"""Weights on their way to shared memory: chunks that lie there as a whole, or go through a ring."""

from __future__ import annotations

import functools

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import Block, when
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.plan import WARP


class WeightStream:
    """Copies a block's weights.

    Parameters
    ----------
    block : Block
        Whose.
    at : int
        The word of shared memory from which on there is room; up to ``end``.
    """

    def __init__(self, block: Block, at: int):
        self.block, self.part = block, block.part
        part = self.part
        self.resident_at = []
        for stage, resident in enumerate(part.placement.resident):
            self.resident_at.append(at)
            at += 4 * part.resident_vectors(stage) * resident
        # The number of a stage's first chunk in the ring.
        self.ring_at, self.ring_chunks, self.first_chunk = at, 0, []
        for stage, ring in enumerate(part.placement.ring):
            self.first_chunk.append(self.ring_chunks)
            self.ring_chunks += part.chunks(stage) * ring
        at += 4 * part.placement.slots * part.placement.slot_vectors
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
                self.block.each(fetched, lambda chunk: self.fetch(stage, chunk, first + chunk))
        elif place.resident[stage] and part.has_bulk_copies:
            self.block.each(part.chunks(stage), lambda chunk: self.fetch(stage, chunk, chunk))
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
            return self.ring_at + place * (4 * self.part.placement.slot_vectors)
        return self.resident_at[stage] + place * (4 * (self.part.chunk_vectors(stage) + self.part.has_bulk_copies))

    def place_of(self, stage: int, chunk: ir.Expr | int) -> tuple[ir.Expr | int, ir.Expr | int]:
        """The slot or place of a chunk of this tile, and how often it was filled before."""
        if not self.part.placement.ring[stage]:
            return chunk, 0
        number, slots = self.number(stage, chunk), self.part.placement.slots
        return number % slots, number // slots

    def mailboxes(self, stage: int, place: ir.Expr | int) -> tuple[ir.Expr | int, ir.Expr | int]:
        """The words of a chunk's mailboxes: what has arrived, and which warps have left."""
        end = self.part.chunk_vectors(stage)
        if self.part.placement.ring[stage]:
            end = self.part.placement.slot_vectors - 1
        at = self.chunk_at(stage, place) + 4 * end
        return at, at + 2

    def fetch(self, stage: int, chunk: ir.Expr, place: ir.Expr) -> None:
        """Begin to copy a chunk, by one thread."""
        part = self.part
        vectors, box = part.chunk_vectors(stage), self.block.at(self.mailboxes(stage, place)[0])
        start = (self.own_weights(stage) + chunk * vectors) * self.block.unit.vector
        from_ = address(self.block.buffers.weights[stage], start)
        run("tdc_mailbox_expect", box, 16 * vectors)
        run("tdc_fetch", self.block.at(self.chunk_at(stage, place)), from_, 16 * vectors, box)

    def number(self, stage: int, chunk: ir.Expr | int) -> ir.Expr | int:
        """The number of a chunk among all that the block sends through the ring."""
        number = self.first_chunk[stage] + chunk
        return self.block.turn * self.ring_chunks + number if self.part.rounds > 1 else number

    def await_chunk(self, stage: int, chunk: ir.Expr | int) -> None:
        """Wait until a chunk is in shared memory."""
        place, fills = self.place_of(stage, chunk)
        run("tdc_mailbox_wait", self.block.at(self.mailboxes(stage, place)[0]), fills % 2)

    def leave_chunk(self, stage: int, chunk: ir.Expr | int) -> None:
        """Give a chunk's slot away.  The warps take turns in filling the slot that was given away before."""
        slots, total = self.part.placement.slots, self.part.rounds * self.ring_chunks
        number = T.Bind(self.number(stage, chunk))
        run("tdc_mailbox_arrive", self.block.at(self.mailboxes(stage, number % slots)[1]))
        slot, next_ = T.Bind((number - 1) % slots), T.Bind(number - 1 + slots)
        on_duty = self.block.thread == number % self.part.warps * WARP
        with T.If(tirx.all(on_duty, number >= 1, next_ < total)), T.Then():
            # All warps have left it, once for each time that it was filled.
            run("tdc_mailbox_wait", self.block.at(self.mailboxes(stage, slot)[1]), (number - 1) // slots % 2)
            self.refill(T.Bind(next_ % self.ring_chunks), slot)

    def refill(self, within: ir.Expr, slot: ir.Expr) -> None:
        """Fetch a chunk by its number among those of a tile that go through the ring."""
        for stage, first in enumerate(self.first_chunk):
            if self.part.placement.ring[stage]:
                inside = tirx.all(within >= first, within < first + self.part.chunks(stage))
                when(inside, functools.partial(self.fetch, stage, within - first, slot))

    def pass_chunks(self, stage: int) -> None:
        """What a warp without a tile does for the ring to go on."""
        with T.serial(self.part.chunks(stage)) as chunk:
            self.await_chunk(stage, chunk)
            self.leave_chunk(stage, chunk)
