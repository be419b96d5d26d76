"""Tables and plots of what `bench_models` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers

if TYPE_CHECKING:
    from rich.console import Console

FORMS = ("tucker", "original")
# Times by a CUDA graph, and by the host's clock.
CLOCKS = ("warm", "wall")


def by_batch(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Networks by precision and batch."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        if "name" in record:
            groups.setdefault((record["shape"]["precision"], record["shape"]["batch"]), []).append(record)
    return groups


def label(name: str, clock: str) -> str:
    """What a contender is called in tables and plots."""
    name = {form: f"cuDNN {form}" for form in FORMS}.get(name, name)
    return name.replace("tvm_", "TVM ").replace("_", " ") + (", called" if clock == "wall" else "")


def report(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each precision and batch, of all contenders."""
    numbers = ("us", "p99", "ratio\nto ours", "kernels", "floor\nus", "ours/\nfloor", "error", "MB", "build\ns")
    for (precision, batch), members in by_batch(records).items():
        title = f"Networks in {precision}, batch {batch}: us of a call (called: one at a time, by the host's clock)"
        table = bench_layers.make_table(title, ("network", "contender"), numbers)
        for record in members:
            network = f"{record['shape']['network']} {record['shape']['form']}"
            if "warm" not in record:
                table.add_row(network, "ours", "failed", end_section=True)
                continue
            rows = [(clock, name) for clock in CLOCKS for name in record.get(clock, {})]
            for clock, name in rows:
                cells = _cells(record, clock, name)
                table.add_row(network, label(name, clock), *cells, end_section=(clock, name) == rows[-1])
                network = ""
        console.print(table)
        for record in members:
            for name, why in {"ours": record.get("error"), **record.get("failed", {})}.items():
                if why:
                    line = f"failed: {record['shape']['text']}, {label(name, 'warm')}: {why[:300]}"
                    console.print(line, markup=False, highlight=False)


def _cells(record: dict[str, Any], clock: str, name: str) -> list[str]:
    one, ours_us = record[clock][name], record[clock]["ours"]["median_us"]
    cells = [f"{one['median_us']:.1f}", f"{one['p99_us']:.1f}", f"{one['median_us'] / ours_us:.2f}"]
    cells.append(str(one["kernels"]))
    is_ours = (clock, name) == ("warm", "ours")
    cells += [f"{record['floor_us']:.1f}", f"{ours_us / record['floor_us']:.2f}"] if is_ours else ["", ""]
    cells += [f"{one['error_norm']:.1e}", f"{one['peak_bytes'] / 1e6:.1f}"]
    tvm = record["baselines"].get(name.removeprefix("tvm_"), {}) if name.startswith("tvm_") else {}
    seconds = record["build_seconds"] if is_ours else tvm.get("build_seconds")
    return [*cells, "" if seconds is None else f"{seconds:.0f}"]


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars of all contenders, a group for each network, below each other for each precision and batch.

    Raises
    ------
    SystemExit
        If matplotlib is missing, nothing was timed, or the file cannot be written.
    """
    pyplot = bench_layers.load_pyplot()
    groups = by_batch([record for record in records if "warm" in record])
    if not groups:
        raise SystemExit("no network was timed; there is nothing to plot")
    contenders = [
        (clock, name)
        for clock in CLOCKS
        for name in dict.fromkeys(name for record in records for name in record.get(clock, {}))
    ]
    most = max(map(len, groups.values()))
    size = (max(8, 1 + 0.24 * len(contenders) * most), 1 + 4 * len(groups))
    figure, rows = pyplot.subplots(len(groups), figsize=size, layout="constrained", squeeze=False)
    colors = pyplot.get_cmap("tab20").colors
    width = 0.85 / len(contenders)
    for ((precision, batch), members), axes in zip(groups.items(), rows[:, 0], strict=True):
        for index, (clock, name) in enumerate(contenders):
            timed = [
                (place, record[clock][name]) for place, record in enumerate(members) if name in record.get(clock, {})
            ]
            places = [place + width * index for place, _ in timed]
            heights = [one["median_us"] for _, one in timed]
            style = {"label": label(name, clock), "color": colors[index % len(colors)], "align": "edge"}
            bars = axes.bar(places, heights, width, hatch="//" if clock == "wall" else None, **style)
            axes.bar_label(bars, fmt="%.0f", fontsize=7, rotation=90, padding=2)
        axes.set_xticks([place + 0.425 for place in range(len(members))])
        axes.set_xticklabels([f"{record['shape']['network']} {record['shape']['form']}" for record in members])
        # From tens of microseconds to milliseconds.
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.set_ylabel("us of a call")
        axes.set_title(f"{precision}, batch {batch}")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot draw {path}: {error}; name a PNG file in a folder that exists") from error
    pyplot.close(figure)
