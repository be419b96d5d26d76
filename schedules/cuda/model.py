"""The analytical model: how long a kernel takes, from what its `Part` divides and what the device can do."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tdc_tvm.schedules.cuda.arith import Number, ceil_div, larger, smaller
from tdc_tvm.schedules.cuda.plan import SLOTS_IN_USE, Part
from tdc_tvm.schedules.cuda.work import WARP, sums_swapped, wgmma_cycles
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import Estimate

# Constants by precision; of an H100.
DATA = Path(__file__).with_name("constants.json")
# Of a thread, for a copy to another block (measured on an H100).
_COPY_CYCLES = 55
# Of a vector of the input that a prologue prepares: what a thread waits for, and of the processor for each of a warp's
# elements (measured on an H100: 45 to 60 and 1.8 in FP16, 40 and 2.6 in TF32, 20 and 0.6 in FP32).
_PREPARE_CYCLES, _PREPARE_RATE = 45, 1.8
# Of the processor for 128 bytes that maxima are taken of: stored, read and compared (counted, not fitted).
_MAXIMA_CYCLES = 4


@dataclass(frozen=True)
class Constants:
    """What no datasheet tells; fitted to measurements on an H100 by ``scripts/fit_model.py``.

    Parameters
    ----------
    launch_us : float
        From the end of one kernel to the work of the next, which was launched early.
    late_us, cluster_us, change_us : float
        What it takes besides where there was no room for the next one's blocks, for clusters, whose blocks find room
        at once or not at all, and where it is a different one: its blocks then spread less evenly.
    input_cycles : float
        Until the first data of the kernel before arrive, and until its output is there.
    copy_cycles : float
        Of a warp for each vector of the input that its lanes copy.
    exposed : float
        Share of a first weight transfer that launching early does not hide.
    sharing : float
        How much faster all processors read the same weights from the L2 cache than data of their own.
    issue_cycles : float
        A product of a unit of depth, of a lane's row and column, on a warp.
    wait_cycles, kept_wait_cycles, global_cycles, load_cycles : float
        Latency of a unit of depth, of one where lanes keep rows of the window, what it takes besides where pixels come
        from the L2 cache (from memory: twice that), and of each vector that a lane loads.
    overhead_cycles : float
        Instructions of a warp besides products and loads, for a unit of depth or those that share the rows kept.
    group_cycles, drain_cycles : float
        What a product of four warps together takes besides, and a tile of them.
    chunk_cycles : float
        What a chunk that goes through the ring takes besides: all warps meet.
    ring_cycles : float
        Until a chunk that the ring has room for is there.
    stage_cycles, meet_cycles, item_cycles, swap_cycles : float
        What a stage takes besides, once and for each warp that the others wait for, a warp's tile of it, and a sum that
        a lane gets from another.
    handover_cycles, send_cycles : float
        Between the blocks of a cluster: once, and for 128 bytes that a block is sent.
    merge_cycles, sum_cycles : float
        Where the depth is split: once, and on the processor for 128 bytes of partial sums.
    storing : float
        How much longer results take to the L2 cache than data from there.
    """

    launch_us: float
    late_us: float
    cluster_us: float
    change_us: float
    input_cycles: float
    copy_cycles: float
    exposed: float
    sharing: float
    issue_cycles: float
    wait_cycles: float
    kept_wait_cycles: float
    global_cycles: float
    load_cycles: float
    overhead_cycles: float
    group_cycles: float
    drain_cycles: float
    chunk_cycles: float
    ring_cycles: float
    stage_cycles: float
    meet_cycles: float
    item_cycles: float
    swap_cycles: float
    handover_cycles: float
    send_cycles: float
    merge_cycles: float
    sum_cycles: float
    storing: float


@functools.cache
def constants() -> dict[str, Constants]:
    """By precision; those of BF16 are FP16's, whose kernels differ in nothing else."""
    values = json.loads(DATA.read_text())
    return {name: Constants(**values[name]) for name in values} | {"bf16": Constants(**values["fp16"])}


def names() -> list[str]:
    """Of the constants, in order."""
    return [field.name for field in fields(Constants)]


def estimate_part(part: Part, is_one: bool = True, given: Constants | None = None) -> dict[str, Number]:
    """Predict one kernel, or many.

    Parameters
    ----------
    part : Part
        What is divided how.
    is_one : bool
        Whether no other kernels are launched in turn with it.
    given : Constants, optional
        Instead of the stored ones of its precision.

    Returns
    -------
    dict of float or array
        Parts of the latency in microseconds: launch, transfers, stages and synchronisation.
    """
    c = given or constants()[part.precision]
    device, unit = part.device, part.unit
    per_core = ceil_div(part.blocks, device.core_count)
    waves = ceil_div(per_core, part.resident)
    # Crews are like blocks that have their weights in common.
    blocks, together = part.blocks * part.crews, smaller(per_core, part.resident) * part.crews
    turns = part.rounds * waves
    cycle_us = 1e6 / device.clock_hz

    assert device.probe is not None
    core_rate, chip_rate = (
        rate / device.clock_hz for rate in (device.probe.l2_bytes_per_s_per_core, device.probe.l2_bytes_per_s)
    )

    def transfer(bytes_of_block: Number, sharing: float = 1.0) -> Number:
        """Cycles until co-resident blocks on all processors have read that much from the L2 cache."""
        at_once = smaller(blocks, together * device.core_count)
        return larger(together * bytes_of_block / core_rate, at_once * bytes_of_block / (sharing * chip_rate))

    # Of a processor: a vector from shared memory to each lane of a warp, and a unit's products of a row and a column.
    load_cycles = WARP * 16 * device.clock_hz / device.probe.shared_bytes_per_s_per_core
    product_ops = unit.vector if unit.name == "fma" else 1
    product_cycles = _product_flops(part) * device.clock_hz * device.core_count / _flops_per_s(part)

    place, chunks_before, early, later = part.placement, 0, 0, 0
    missing = []
    for i in range(len(part.stages)):
        size, chunks, ring = 16 * part.chunk_vectors(i), part.chunks(i), place.ring[i]
        at_once = place.resident[i] * chunks + ring * smaller(
            chunks, larger(0, place.slots - SLOTS_IN_USE - chunks_before)
        )
        early = early + size * at_once
        later = later + size * (chunks - at_once) * ring
        missing.append(size * (chunks - at_once) * (1 - ring))
        chunks_before = chunks_before + chunks * ring
    # The next launch's copies begin early where they find room beside this one's blocks, or processors without one.
    # Work begins with the first chunk.
    is_hidden = (part.overlaps | (2 * part.blocks <= device.core_count)) & (waves == 1)
    waited = waves - 1 + np.where(is_hidden, c.exposed, 1.0)
    first = smaller(early, 16 * part.chunk_vectors(0)) if part.has_bulk_copies else early
    inputs = part.in_pixels(0) * smaller(part.in_width, part.in_channels(0)) * unit.element_bytes
    stored = part.tile_pixels // (4 if part.pools else 1)
    outputs = stored * ceil_div(part.out_width, part.split) * unit.element_bytes
    copies = ceil_div(inputs // 16, part.threads) * part.is_staged
    parts = {
        "launch": c.launch_us
        + np.where(is_hidden, 0.0, c.late_us + part.is_cluster * c.cluster_us)
        + (0.0 if is_one else c.change_us),
        "weights": waited * transfer(first / part.crews, c.sharing) * cycle_us,
        "input": 0.0,
    }
    needed: Number = 0
    missing_share = _missing_share(_tensor_bytes(part), device)
    for i, work in enumerate(part.works):
        channel_tiles, pixel_tiles = part.tiles_of_work(i)
        items, share, turns_of_work = channel_tiles * pixel_tiles, part.share(i), part.turns_of_work(i)
        # Of what multiplies: for one warp or group of them on each scheduler, and for all.  What they wait for besides.
        if unit.name == "wgmma":
            cycles = wgmma_cycles(work, unit)
            own, busy = share * turns_of_work * cycles, share * items * cycles
            waited_for = turns_of_work * (share * c.group_cycles + c.drain_cycles)
        else:
            # Pixels that are loaded side by side, but do not lie so, are on the same banks.
            conflicts = 2 if i == part.core_index and part.core.stride[1] > 1 else 1
            products, loads = work.rows * work.columns, work.rows + conflicts * part.pixel_loads(i)
            # Each of the four schedulers of a processor issues an instruction in a cycle, and has products of its own.
            active = ceil_div(smaller(items, part.warps // work.splits) * work.splits, 4)
            instructions = products * product_ops + loads + c.overhead_cycles / part.rows_kept(i)
            of_scheduler = larger(4 * products * product_cycles, instructions)
            own = share * turns_of_work * of_scheduler
            busy = larger(share * items * work.splits * loads * load_cycles, active * own)
            wait_cycles = np.where(part.rows_kept(i) > 1, c.kept_wait_cycles, c.wait_cycles)
            if i == 0:
                wait_cycles = wait_cycles + (1 - part.is_staged) * c.global_cycles * (1 + missing_share)
            unit_cycles = wait_cycles + loads * c.load_cycles + products * c.issue_cycles
            tile_cycles = c.item_cycles + sums_swapped(work, unit) * c.swap_cycles
            waited_for = turns_of_work * (share * unit_cycles + tile_cycles)
        waited_for = waited_for + place.ring[i] * part.chunks(i) * c.chunk_cycles
        sums = part.pixels(i) * part.slice_channels(i) * work.splits / 32
        merge = (work.splits > 1) * (c.merge_cycles + together * sums * c.sum_cycles)
        if i == part.last and part.pools:
            merge = merge + c.merge_cycles + together * part.pooled_words / 32 * _MAXIMA_CYCLES
        once = c.stage_cycles + part.warps * c.meet_cycles
        stage = once + own + _both(busy - own, waited_for) + merge
        needed = needed + turns * busy
        # Weights that stay in global memory are read through the L2 cache by each pixel tile.
        parts[f"stage{i}"] = turns * _both(stage, transfer(missing[i], c.sharing)) * cycle_us
    # What comes through the ring, and the input of the next tile where it has a place of its own, arrive meanwhile.
    stages_us = sum(value for name, value in parts.items() if name.startswith("stage"))
    prepared = copies * (_PREPARE_CYCLES + _PREPARE_RATE * unit.vector * part.warps * together)
    input_us = (
        c.input_cycles + copies * c.copy_cycles + transfer(inputs) + part.stages[0].prologue * prepared
    ) * cycle_us
    meanwhile_us = (stages_us - (parts["stage0"] if part.core_index else 0.0)) / turns
    following = np.where(part.fetches_ahead, larger(0.0, input_us - meanwhile_us), input_us)
    parts["input"] = input_us + (turns - 1) * following
    rest = waited * transfer((early - first) / part.crews, c.sharing) + turns * transfer(later, c.sharing)
    ring = c.ring_cycles * turns * chunks_before / larger(1, place.slots - SLOTS_IN_USE)
    parts["weights"] = parts["weights"] + _both(larger(rest, ring) * cycle_us, stages_us, 3) - stages_us
    sent = 4 * (part.split - 1) * part.group_words / 128
    added = together * part.split * part.group_words / 32
    handover = part.is_cluster * (c.handover_cycles + sent * c.send_cycles + added * c.sum_cycles)
    if part.core_index < part.last:
        # What the core hands on: a copy of each unit of depth to each of the other blocks.
        copies = ceil_div(part.in_channels(part.core_index + 1) // unit.depth * (part.split - 1), part.warps)
        received = 4 * part.held_words(part.core_index + 1) / 128
        handover = handover + part.gathers * (c.handover_cycles + _COPY_CYCLES * copies + received * c.send_cycles)
    parts["handover"] = turns * handover * cycle_us
    parts["output"] = turns * c.storing * transfer(outputs) * cycle_us
    # Blocks on one processor fill each other's gaps, until their instructions, products and loads fill it.
    alone_us = stages_us + parts["input"] + parts["handover"] + parts["output"]
    tiles = larger(turns, ceil_div(ceil_div(part.tile_count, part.crews) * part.split, device.core_count) * part.crews)
    own_us, needed_us = needed * cycle_us, tiles / turns * needed * cycle_us
    parts["contention"] = own_us + _both(needed_us - own_us, alone_us - own_us) - alone_us
    latency_us = sum(parts.values())
    weight_bytes = 16 * part.split * sum(map(part.weight_vectors, range(len(part.stages))))
    missing_bytes = missing_share * _tensor_bytes(part) + _missing_share(weight_bytes, device) * weight_bytes
    parts["memory"] = _both(missing_bytes / device.probe.dram_bytes_per_s * 1e6, latency_us) - latency_us
    return parts


def _both(a: Number, b: Number, power: int = 2) -> Number:
    """How long two things take at the same time, which are in each other's way: between the larger and the sum."""
    return np.sqrt(a * a + b * b) if power == 2 else np.cbrt(a * a * a + b * b * b)


def _tensor_bytes(part: Part) -> int:
    """Size of the input and the output."""
    first, *_ = part.stages
    inputs = first.batch * first.height * first.width * part.in_width
    outputs = math.prod(part.stages[-1].stored_extents[:3]) * part.out_width
    return (inputs + outputs) * part.unit.element_bytes


def _missing_share(size: Number, device: DeviceSpec) -> Number:
    """Of so many bytes that a kernel reads and writes, what the L2 cache has no room for."""
    # It has two halves, and holds twice what processors beside both of them read.
    return smaller(1.0, larger(0.0, 2 * size / device.l2_bytes - 1))


def _product_flops(part: Part) -> int:
    """What a warp computes for one of a lane's rows and columns in a unit of depth."""
    unit = part.unit
    if unit.name == "fma":
        return 2 * WARP * unit.vector
    return 2 * 16 * unit.pixels * unit.depth // 2


def _flops_per_s(part: Part) -> float:
    """The measured rate of what multiplies."""
    probe = part.device.probe
    assert probe is not None
    return probe.fma_flops_per_s if part.unit.name == "fma" else probe.mma_flops_per_s[part.precision]


def latency_us(part: Part, is_one: bool = True, given: Constants | None = None) -> Number:
    """The sum of what `estimate_part` gives."""
    return sum(estimate_part(part, is_one, given).values())


def estimate(parts: Sequence[Part]) -> Estimate:
    """Predict kernels that follow each other; what they have in common is added up."""
    count = sum(len(part.stages) for part in parts)
    stages = iter(("reduce", "core", "expand") if count > 1 else ("core",))
    total: dict[str, float] = {}
    for part in parts:
        for name, value in estimate_part(part, len(parts) == 1).items():
            name = next(stages) if name.startswith("stage") else name
            # Rounding can leave less than nothing.
            total[name] = total.get(name, 0.0) + max(0.0, float(value))
    return Estimate(total)
