"""The analytical model: how long a kernel takes, from what its `Part` divides and what the device can do."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tdc_tvm.schedules.cuda.plan import Number, Part, ceil_div, larger, smaller
from tdc_tvm.schedules.kernel import Estimate

# Constants by precision; of an H100.
DATA = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """What no datasheet tells; fitted to measurements by ``scripts/oracle.py fit``.

    Parameters
    ----------
    launch_us : float
        From the end of one kernel to the work of the next, which was launched early.
    input_cycles : float
        Until the first data of the kernel before arrive, and its output is on its way.
    l2_bytes_per_cycle, chip_bytes_per_cycle : float
        What one processor, and all of them, read from the L2 cache.
    exposed : float
        Share of a first weight transfer that launching early does not hide.
    shared_cycles : float
        A load of 128 bytes from shared memory, on the processor.
    issue_cycles : float
        A product (two ``mma``, or an ``fma``) on a quarter of the processor.
    wait_cycles : float
        Latency of a unit of depth: loads, then products that depend on each other.
    item_cycles : float
        A warp tile's addresses and results.
    barrier_cycles, cluster_cycles : float
        Between stages, within a block and within a cluster.
    merge_cycles : float
        A word of partial sums, on the processor, for 128 bytes.
    """

    launch_us: float
    input_cycles: float
    l2_bytes_per_cycle: float
    chip_bytes_per_cycle: float
    exposed: float
    shared_cycles: float
    issue_cycles: float
    wait_cycles: float
    item_cycles: float
    barrier_cycles: float
    cluster_cycles: float
    merge_cycles: float


@functools.cache
def constants() -> dict[str, Constants]:
    """By precision."""
    return {name: Constants(**values) for name, values in json.loads(DATA.read_text()).items()}


def names() -> list[str]:
    """Of the constants, in order."""
    return [field.name for field in fields(Constants)]


def estimate_part(part: Part, given: Constants | None = None) -> dict[str, Number]:
    """Predict one kernel, or many.

    Parameters
    ----------
    part : Part
        What is divided how.
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
    together = smaller(per_core, part.resident)
    waves = ceil_div(per_core, part.resident)
    turns = part.rounds * waves
    cycle_us = 1e6 / device.clock_hz

    def transfer(bytes_of_block: Number) -> Number:
        """Cycles until co-resident blocks on all processors have read that much."""
        at_once = smaller(part.blocks, together * device.core_count)
        return larger(
            together * bytes_of_block / c.l2_bytes_per_cycle, at_once * bytes_of_block / c.chip_bytes_per_cycle
        )

    weights = sum(16 * part.weight_vectors(i) for i in range(len(part.stages)))
    # The next launch's copies begin early where they find room beside this one's blocks.
    hidden = 2 * (part.smem_bytes + 1024) * together <= device.smem_per_block_optin_bytes + 1024
    first = transfer(weights) * np.where(hidden, c.exposed, 1.0)
    inputs = part.in_pixels(0) * part.in_width * unit.element_bytes
    outputs = part.pixels(part.last) * ceil_div(part.out_width, part.split) * unit.element_bytes
    parts = {
        "launch": c.launch_us,
        "weights": (first + (waves - 1) * transfer(weights)) * cycle_us,
        "input": turns * (c.input_cycles + transfer(inputs)) * cycle_us,
    }
    for i, work in enumerate(part.works):
        channel_tiles, pixel_tiles = part.tiles_of_work(i)
        items, share = channel_tiles * pixel_tiles, part.share(i)
        rounds = ceil_div(items, part.warps // work.splits)
        if unit.name == "mma":
            products = work.rows // 2 * work.columns
            loads = 4 * (work.rows + work.columns)
        else:
            products = 4 * work.rows * work.columns
            loads = work.rows + work.columns
        # Weights that stay in global memory are read through the L2 cache by each pixel tile.
        missing = np.where(part.weights_shared[i], 0, transfer(16 * part.weight_vectors(i)))
        busy = items * work.splits * share * larger(loads * c.shared_cycles, products * c.issue_cycles / 4)
        alone = rounds * (share * (c.wait_cycles + products * c.issue_cycles) + c.item_cycles)
        merged = part.pixels(i) * part.slice_channels(i) * work.splits * 4 / 128 * c.merge_cycles
        merge = np.where(work.splits > 1, c.barrier_cycles + merged, 0)
        stage = larger(together * busy, alone) + together * merge + missing
        parts[f"stage{i}"] = turns * stage * cycle_us
    sync = np.where(part.is_cluster, c.cluster_cycles, c.barrier_cycles)
    parts["sync"] = turns * len(part.stages) * sync * cycle_us
    parts["output"] = turns * transfer(outputs) * cycle_us
    return parts


def latency_us(part: Part, given: Constants | None = None) -> Number:
    """The sum of what `estimate_part` gives."""
    return sum(estimate_part(part, given).values())


def estimate(parts: Sequence[Part]) -> Estimate:
    """Predict kernels that follow each other; what they have in common is added up."""
    count = sum(len(part.stages) for part in parts)
    stages = iter(("reduce", "core", "expand") if count > 1 else ("core",))
    total: dict[str, float] = {}
    for part in parts:
        for name, value in estimate_part(part).items():
            name = next(stages) if name.startswith("stage") else name
            total[name] = total.get(name, 0.0) + float(value)
    return Estimate(total)
