"""Weights on their way to shared memory: chunks that have a place of their own, or go through a ring."""

from __future__ import annotations

import functools

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.block import Block, local, when
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.plan import SLOTS_IN_USE
from tdc_tvm.schedules.cuda.work import WARP


class WeightStream:
    """Copies a block's weights.

    Where the GPU can (sm_90) a chunk is copied by one thread at once, and has a mailbox for who waits for it; else by
    all threads.  All warps meet before a slot of the ring is filled again: a second mailbox, where warps say that they
    have left it and one waits for all others, took three times as long (seen on an H100).

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
        self.ring_box_at = at
        self.end = at + 4 * place.slots * part.has_bulk_copies

    def has_mailboxes(self, stage: int) -> bool:
        """Whether a stage's chunks have mailboxes."""
        return self.part.is_held(stage) and self.part.has_bulk_copies

    def open_mailboxes(self) -> None:
        """Make the mailboxes of all chunks and slots ready."""
        count = (self.end - self.box_at[0]) // 4
        if count:
            self.block.each(count, lambda box: run("tdc_mailbox_open", self.block.at(self.box_at[0] + box * 4), 1))

    def mailbox(self, stage: int, place: ir.Expr | int) -> ir.Expr | int:
        """The address of the mailbox of a place or slot."""
        at = self.ring_box_at if self.part.placement.ring[stage] else self.box_at[stage]
        return self.block.at(at + place * 4)

    def chunk_at(self, stage: int, place: ir.Expr | int) -> ir.Expr | int:
        """The word where a chunk begins."""
        if self.part.placement.ring[stage]:
            return self.ring_at + place * (4 * self.part.placement.slot_vectors)
        return self.resident_at[stage] + place * (4 * self.part.chunk_vectors(stage))

    def own_weights(self, stage: int) -> ir.Expr | int:
        """The first of this block's vectors of weights, which lie one after the other."""
        return self.block.rank * self.part.weight_vectors(stage)

    def own_chunk(self, stage: int, chunk: ir.Expr | int) -> ir.Expr | int:
        """The first vector of one of this block's chunks."""
        part, vectors = self.part, self.part.chunk_vectors(stage)
        if part.is_streamed:
            return (chunk * part.split + self.block.rank) * vectors
        return self.own_weights(stage) + chunk * vectors

    def begin(self, stage: int) -> None:
        """Begin to copy a stage's weights that have a place of their own."""
        part = self.part
        if not part.placement.resident[stage]:
            return
        if part.has_bulk_copies:
            self.block.each_warp(part.chunks(stage), lambda chunk: self.fetch(stage, chunk, chunk))
        else:
            self.copy(stage, 0, 0)

    def fetch(self, stage: int, chunk: ir.Expr | int, place: ir.Expr | int) -> None:
        """Begin to copy a chunk, by one thread."""
        vectors, box = self.part.chunk_vectors(stage), self.mailbox(stage, place)
        start = self.own_chunk(stage, chunk) * self.block.unit.weight_vector
        to = self.block.at(self.chunk_at(stage, place))
        run("tdc_mailbox_expect", box, 16 * vectors)
        # The L2 cache has no room for these anyway: others' weights and activations stay there.
        fetch = "tdc_fetch_once" if self.part.is_streamed else "tdc_fetch"
        run(fetch, to, address(self.block.buffers.weights[stage], start), 16 * vectors, box)

    def copy(self, stage: int, chunk: ir.Expr | int, place: ir.Expr | int) -> None:
        """Begin to copy a chunk, by all threads."""
        vectors = self.part.chunk_vectors(stage)
        start = T.Bind(self.own_chunk(stage, chunk))
        to = T.Bind(self.block.at(self.chunk_at(stage, place)))

        def copy_one(vector: ir.Expr) -> None:
            from_ = address(self.block.buffers.weights[stage], (start + vector) * self.block.unit.weight_vector)
            run("tdc_copy", to + vector * 16, from_, tirx.const(True, "bool"))

        self.block.each(vectors, copy_one)

    def begin_ring(self) -> None:
        """Begin to copy as many chunks as the ring has room for while one is multiplied.

        Without mailboxes they are one group of copies, which empty ones follow: the waits that come count as many
        groups as later.
        """
        slots = self.part.placement.slots
        # Of a ring of few chunks also those that the next tile begins with.
        ahead = min(slots - SLOTS_IN_USE, self.part.rounds * self.ring_chunks)
        for turn in range(ceil_div(ahead, self.ring_chunks)):
            for stage, first_chunk in enumerate(self.first_chunk):
                if not self.part.placement.ring[stage]:
                    continue
                first = turn * self.ring_chunks + first_chunk
                count = min(self.part.chunks(stage), max(0, ahead - first))
                if self.part.has_bulk_copies:
                    self.block.each_warp(count, functools.partial(self.fetch_first, stage, first))
                else:
                    for chunk in range(count):
                        self.copy(stage, chunk, first + chunk)
        if not self.part.has_bulk_copies:
            for _ in range(slots - SLOTS_IN_USE):
                run("tdc_commit")

    def fetch_first(self, stage: int, first: int, chunk: ir.Expr) -> None:
        """Begin to copy a chunk to the slot of its number."""
        self.fetch(stage, chunk, first + chunk)

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
        # Its place, its number among all that the block sends through the ring, and how often its slot was filled
        # before, modulo 2.
        self.place, self.number, self.fills = (local(1, "int32") for _ in range(3))

    def begin(self) -> None:
        """Wait for the first chunk of a tile."""
        number: ir.Expr | int = self.stream.first_chunk[self.stage]
        if self.in_ring and self.part.rounds > 1:
            number = T.Bind(self.stream.block.turn * self.stream.ring_chunks + number)
        T.buffer_store(self.number, number, [0])
        T.buffer_store(self.place, number % self.slots if self.in_ring else 0, [0])
        T.buffer_store(self.fills, number // self.slots % 2 if self.in_ring else 0, [0])
        self.wait()

    def follow(self) -> None:
        """Wait for the next chunk."""
        place = T.Bind(self.place[0] + 1)
        if self.in_ring:
            is_round = T.Bind(place == self.slots)
            T.buffer_store(self.number, self.number[0] + 1, [0])
            T.buffer_store(self.fills, self.fills[0] ^ tirx.Select(is_round, 1, 0), [0])
            place = tirx.Select(is_round, 0, place)
        T.buffer_store(self.place, place, [0])
        self.wait()

    def wait(self) -> None:
        """Wait until the chunk is in shared memory, where it stays if it has a place of its own."""
        stream, part = self.stream, self.part
        if self.in_ring:
            if not part.has_bulk_copies:
                run(f"tdc_await{self.slots - SLOTS_IN_USE - 1}")
            self.stream.block.meet()
            following = T.Bind(self.number[0] + (self.slots - SLOTS_IN_USE))
            is_one = following < part.rounds * stream.ring_chunks
            if part.has_bulk_copies:
                # By the last warp, which is the first to have no tile.
                is_one = tirx.all(is_one, stream.block.thread == part.threads - WARP)
            when(is_one, lambda: self.refill(following))
            if not part.has_bulk_copies:
                run("tdc_commit")
        if stream.has_mailboxes(self.stage):
            is_first = stream.block.turn == 0 if not self.in_ring and part.rounds > 1 else None
            box = stream.mailbox(self.stage, self.place[0])
            when(is_first, lambda: run("tdc_mailbox_wait", box, self.fills[0]))

    def refill(self, following: ir.Expr) -> None:
        """Begin to copy a chunk, by its number among all that go through the ring, to where all are done with one."""
        stream, part = self.stream, self.part
        within = T.Bind(following % stream.ring_chunks if part.rounds > 1 else following)
        slot = T.Bind(
            tirx.Select(self.place[0] < SLOTS_IN_USE, self.place[0] + self.slots, self.place[0]) - SLOTS_IN_USE
        )
        begin = stream.fetch if part.has_bulk_copies else stream.copy
        for stage, first in enumerate(stream.first_chunk):
            if part.placement.ring[stage]:
                chunks = part.chunks(stage)
                inside = tirx.all(within >= first, within < first + chunks) if chunks < stream.ring_chunks else None
                when(inside, functools.partial(begin, stage, within - first, slot))

    def chunk_at(self) -> ir.Expr | int:
        """The word where the chunk begins."""
        return self.stream.chunk_at(self.stage, self.place[0])
