"""Weights on their way to shared memory: chunks that have a place of their own, or go through a ring."""

from __future__ import annotations

import functools

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import Block, local, when
from tdc_tvm.schedules.cuda.intrinsics import address, barrier, run


class WeightStream:
    """Copies a block's weights.

    A chunk with a place of its own is copied by one thread at once, where the GPU can (sm_90), and has a mailbox for
    who waits for it.  Through the ring all threads copy, a vector each: an ``mbarrier`` for each chunk, with one
    warp that waits for all others and copies, took three times as long for each of them (seen on an H100).

    Parameters
    ----------
    block : Block
        Whose.
    at : int
        The word of shared memory from which on there is room; up to ``end``.  A multiple of 128 bytes, as all chunks
        are: bulk copies to elsewhere run at a quarter of the speed (seen on an H100).
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
        at += 4 * place.slots * place.slot_vectors
        # Mailboxes lie behind all chunks.
        for stage, resident in enumerate(place.resident):
            self.box_at.append(at)
            at += 4 * part.chunks(stage) * (resident and part.has_bulk_copies)
        self.end = at

    def is_shared(self, stage: int) -> bool:
        """Whether a stage's weights go through shared memory."""
        return self.part.placement.resident[stage] or self.part.placement.ring[stage]

    def has_mailboxes(self, stage: int) -> bool:
        """Whether a stage's chunks have mailboxes."""
        return self.part.placement.resident[stage] and self.part.has_bulk_copies

    def open_mailboxes(self) -> None:
        """Make the mailboxes of all chunks ready."""
        for stage in range(len(self.part.stages)):
            if self.has_mailboxes(stage):

                def open_one(chunk: ir.Expr, stage: int = stage) -> None:
                    run("tdc_mailbox_open", self.mailbox(stage, chunk), 1)

                self.block.each(self.part.chunks(stage), open_one)

    def mailbox(self, stage: int, chunk: ir.Expr | int) -> ir.Expr | int:
        """The address of a chunk's mailbox."""
        return self.block.at(self.box_at[stage] + chunk * 4)

    def own_weights(self, stage: int) -> ir.Expr | int:
        """The first of this block's vectors of weights."""
        return self.block.rank * self.part.weight_vectors(stage) if self.part.is_sliced(stage) else 0

    def begin(self, stage: int) -> None:
        """Begin to copy a stage's weights that have a place of their own."""
        part = self.part
        if self.has_mailboxes(stage):
            self.block.each_warp(part.chunks(stage), functools.partial(self.fetch, stage))
        elif part.placement.resident[stage]:
            self.copy(stage, 0, self.resident_at[stage], part.weight_vectors(stage))

    def fetch(self, stage: int, chunk: ir.Expr) -> None:
        """Begin to copy a chunk, by one thread."""
        vectors, box = self.part.chunk_vectors(stage), self.mailbox(stage, chunk)
        start = (self.own_weights(stage) + chunk * vectors) * self.block.unit.vector
        to = self.block.at(self.resident_at[stage] + chunk * (4 * vectors))
        run("tdc_mailbox_expect", box, 16 * vectors)
        run("tdc_fetch", to, address(self.block.buffers.weights[stage], start), 16 * vectors, box)

    def copy(self, stage: int, first: ir.Expr | int, to: ir.Expr | int, vectors: int) -> None:
        """Begin to copy vectors of weights to a word of shared memory, by all threads."""
        start = T.Bind(self.own_weights(stage) + first)
        to = T.Bind(self.block.at(to))

        def copy_one(vector: ir.Expr) -> None:
            from_ = address(self.block.buffers.weights[stage], (start + vector) * self.block.unit.vector)
            run("tdc_copy", to + vector * 16, from_, tirx.const(True, "bool"))

        self.block.each(vectors, copy_one)

    def begin_ring(self) -> None:
        """Begin to copy as many chunks as the ring has room for while one is multiplied.

        They are one group of copies; empty ones follow, so that the waits that come count as many groups as later.
        """
        ahead = min(self.part.placement.slots - 1, self.ring_chunks)
        for stage, first in enumerate(self.first_chunk):
            if self.part.placement.ring[stage]:
                for chunk in range(min(self.part.chunks(stage), max(0, ahead - first))):
                    vectors = self.part.chunk_vectors(stage)
                    self.copy(stage, chunk * vectors, self.slot_at(first + chunk), vectors)
        for _ in range(self.part.placement.slots - 1):
            run("tdc_commit")

    def slot_at(self, slot: ir.Expr | int) -> ir.Expr | int:
        """The word where a slot begins."""
        return self.ring_at + slot * (4 * self.part.placement.slot_vectors)

    def pass_chunks(self, stage: int) -> None:
        """What a warp without a tile does for the ring to go on."""
        cursor = Cursor(self, stage)
        cursor.begin()
        with T.serial(self.part.chunks(stage) - 1, unroll=False):
            cursor.follow()


class Cursor:
    """Which of a stage's chunks the block multiplies, if they go through the ring, or a warp.

    Parameters
    ----------
    stream : WeightStream
        Whose.
    stage : int
        Of the block's stages.
    """

    def __init__(self, stream: WeightStream, stage: int):
        self.stream, self.stage, self.part = stream, stage, stream.part
        self.in_ring, self.slots = self.part.placement.ring[stage], self.part.placement.slots
        # Its place, and its number among all that the block sends through the ring.
        self.place, self.number = local(1, "int32"), local(1, "int32")

    def begin(self) -> None:
        """Wait for the first chunk of a tile."""
        number: ir.Expr | int = self.stream.first_chunk[self.stage]
        if self.in_ring and self.part.rounds > 1:
            number = T.Bind(self.stream.block.turn * self.stream.ring_chunks + number)
        T.buffer_store(self.number, number, [0])
        T.buffer_store(self.place, number % self.slots if self.in_ring else 0, [0])
        self.wait()

    def follow(self) -> None:
        """Wait for the next chunk."""
        place = T.Bind(self.place[0] + 1)
        if self.in_ring:
            T.buffer_store(self.number, self.number[0] + 1, [0])
            place = tirx.Select(place == self.slots, 0, place)
        T.buffer_store(self.place, place, [0])
        self.wait()

    def wait(self) -> None:
        """Wait until the chunk is in shared memory, where it stays if it has a place of its own."""
        stream = self.stream
        if stream.has_mailboxes(self.stage):
            is_first = stream.block.turn == 0 if self.part.rounds > 1 else None
            when(is_first, lambda: run("tdc_mailbox_wait", stream.mailbox(self.stage, self.place[0]), 0))
        elif self.in_ring:
            run(f"tdc_await{self.slots - 2}")
            barrier()
            # All warps have left the chunk before this one: another takes its place.
            following = T.Bind(self.number[0] + (self.slots - 1))
            slot = T.Bind(tirx.Select(self.place[0] == 0, self.slots, self.place[0]) - 1)
            with T.If(following < self.part.rounds * stream.ring_chunks), T.Then():
                self.refill(following % stream.ring_chunks if self.part.rounds > 1 else following, slot)
            run("tdc_commit")

    def refill(self, within: ir.Expr, slot: ir.Expr) -> None:
        """Begin to copy a chunk by its number among those of a tile that go through the ring."""
        stream = self.stream
        within = T.Bind(within)
        for stage, first in enumerate(stream.first_chunk):
            chunks, vectors = self.part.chunks(stage), self.part.chunk_vectors(stage)
            if self.part.placement.ring[stage]:
                inside = tirx.all(within >= first, within < first + chunks) if chunks < stream.ring_chunks else None
                at = stream.slot_at(slot)
                when(inside, functools.partial(stream.copy, stage, (within - first) * vectors, at, vectors))

    def chunk_at(self) -> ir.Expr | int:
        """The word where the chunk begins."""
        if self.in_ring:
            return self.stream.slot_at(self.place[0])
        return self.stream.resident_at[self.stage] + self.place[0] * (4 * self.part.chunk_vectors(self.stage))
