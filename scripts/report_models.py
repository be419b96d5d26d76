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


def contenders(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The clocks and names of all that was timed: ours, cuDNN, then by name; forms of one side by side."""
    found = {(clock, name) for record in records for clock in CLOCKS for name in record.get(clock, {})}
    return sorted(
        found,
        key=lambda one: (
            CLOCKS.index(one[0]),
            one[1] != "ours",
            _kind(one[1]),
            one[1].endswith("original"),
        ),
    )


def _kind(name: str) -> str:
    """A contender without its form; nothing for cuDNN."""
    return name.rpartition("_")[0]


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
            rows = contenders([record])
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
    is_ours = (clock, name) == ("warm", "ours")
    baselines = {f"tvm_{form}": built for form, built in record.get("baselines", {}).items()}
    built = record if is_ours else baselines.get(name, {})
    floor_us = record.get("floor_us") if is_ours else None
    values = (
        (one["median_us"], ".1f"),
        (one.get("p99_us"), ".1f"),
        (one["median_us"] / ours_us, ".2f"),
        (one.get("kernels"), "d"),
        (floor_us, ".1f"),
        (floor_us and ours_us / floor_us, ".2f"),
        (one.get("error_norm"), ".1e"),
        (one.get("peak_bytes", 0) / 1e6 or None, ".1f"),
        (built.get("build_seconds"), ".0f"),
    )
    # What other contenders, or older records, do not have.
    return ["" if value is None else format(value, digits) for value, digits in values]


def _value(record: dict[str, Any], clock: str, name: str, field: str) -> float | None:
    """Of a contender's record; None if it has none, or 0 for it."""
    return record.get(clock, {}).get(name, {}).get(field) or None


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars of all contenders' times and memory, a group for each network, a row for each precision and batch.

    Raises
    ------
    SystemExit
        If matplotlib is missing, nothing was timed, or the file cannot be written.
    """
    pyplot = bench_layers.load_pyplot()
    groups = by_batch([record for record in records if "warm" in record])
    if not groups:
        raise SystemExit("no network was timed; there is nothing to plot")
    timed = contenders(records)
    most = max(map(len, groups.values()))
    size = (max(12, 2 + 0.4 * len(timed) * most), 1 + 4 * len(groups))
    figure, rows = pyplot.subplots(
        len(groups), 2, figsize=size, layout="constrained", squeeze=False, width_ratios=(3, 2)
    )
    kinds = list(dict.fromkeys(_kind(name) for _, name in timed if name != "ours"))
    # In pairs of a dark and a light one.
    colors = pyplot.get_cmap("tab20").colors
    handles = {}
    # From tens of microseconds to milliseconds, and from megabytes to gigabytes.
    values = {"us of a call": ("median_us", 1.0), "MB of memory, at most": ("peak_bytes", 1e-6)}
    for ((precision, batch), members), columns in zip(groups.items(), rows, strict=True):
        for axes, (title, (field, scale)) in zip(columns, values.items(), strict=True):
            measured = {
                one: [
                    (place, scale * value)
                    for place, record in enumerate(members)
                    if (value := _value(record, *one, field))
                ]
                for one in timed
            }
            drawn = [one for one in timed if measured[one]]
            width = 0.85 / max(1, len(drawn))
            for index, (clock, name) in enumerate(drawn):
                places, heights = zip(*measured[clock, name], strict=True)
                lefts = [place + width * index for place in places]
                color = "gray" if name == "ours" else colors[2 * kinds.index(_kind(name)) + name.endswith("original")]
                hatch = "//" if clock == "wall" else None
                bars = axes.bar(lefts, heights, width, align="edge", color=color, hatch=hatch)
                handles.setdefault((clock, name), bars)
                axes.bar_label(bars, fmt="%.0f", fontsize=7, rotation=90, padding=2)
            axes.set_xticks([place + 0.425 for place in range(len(members))])
            axes.set_xticklabels([f"{record['shape']['network']}\n{record['shape']['form']}" for record in members])
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(pyplot.NullFormatter())
            axes.margins(y=0.2)
            axes.set_ylabel(title)
            axes.set_title(f"{precision}, batch {batch}")
    shown = [one for one in timed if one in handles]
    texts = [label(name, clock) for clock, name in shown]
    figure.legend([handles[one] for one in shown], texts, loc="outside lower center", ncols=4)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot draw {path}: {error}; name a PNG file in a folder that exists") from error
    pyplot.close(figure)
