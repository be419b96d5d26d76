"""Choices of ranks for people: tables, and the front of latency against error as a picture and a page."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.training.rank_choice import LayerChoice, RankChoice

# Columns of the table of layers, and how wide a terminal must be to have them.
_COLUMNS = {
    "layer": 0,
    "shape": 112,
    "ranks\nout, in": 0,
    "us": 0,
    "M MACs": 136,
    "relative\nerror": 0,
    "proxy": 136,
    "reason": 0,
}
_TEXTS = ("layer", "shape", "reason")


def tables(choice: RankChoice, width: int) -> Iterator[RenderableType]:
    """The choice as a table of layers and its totals, for a terminal of ``width`` columns."""
    count = len(choice.plan.layers)
    title = f"ranks for {count} of {len(choice.layers)} convolutions of {choice.model} on {choice.device}"
    table = Table(title=f"{title}, {choice.precision}", title_justify="left")
    shown = [column for column, least in _COLUMNS.items() if width >= least]
    for column in shown:
        is_text = column in _TEXTS
        # Numbers stay whole; of texts the reasons are what is wrapped first.
        table.add_column(
            column,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=column != "reason" and not (column == "layer" and width < 100),
        )
    rows = [_cells(layer) for layer in choice.layers]
    if choice.other_us:
        rows.append({"layer": "fully connected", "us": f"{choice.other_us:.2f}", "reason": "no convolutions"})
    totals = {
        "layer": "all",
        "us": f"{choice.dense_us:.2f} -> {choice.latency_us:.2f}",
        "M MACs": f"{choice.dense_macs / 1e6:.1f} -> {choice.macs / 1e6:.1f}",
        "proxy": f"{choice.error:.3g}",
        "reason": f"{choice.dense_us / choice.latency_us:.2f}x as fast",
    }
    for number, row in enumerate([*rows, totals]):
        # Text, as names and reasons may look like rich's markup.
        cells = [Text(row.get(column, "")) for column in shown]
        table.add_row(*cells, end_section=number == len(rows) - 1)
    yield table
    yield Text(f"{choice.goal}: {choice.dense_us:.1f} -> {choice.latency_us:.1f} us, {_saved(choice)}")
    yield Text(f"error proxy {choice.error:.4g} ({choice.proxy})")
    searched = "optimal" if not choice.gap else f"within {max(choice.gap, 1e-4):.2%} of the optimum"
    yield Text(f"latencies: {choice.source}, convolutions and fully connected layers; {searched}")
    for note in choice.notes:
        yield Text(f"note: {note}", "yellow")


def _cells(layer: LayerChoice) -> dict[str, str]:
    cells = {
        "layer": layer.name or "(the model)",
        "shape": layer.shape,
        "us": f"{layer.dense_us:.2f}",
        "M MACs": f"{layer.dense_macs / 1e6:.1f}",
        "reason": layer.reason,
    }
    if layer.ranks is not None:
        cells |= {
            "ranks\nout, in": f"{layer.ranks.rank_out}, {layer.ranks.rank_in}",
            "us": f"{layer.dense_us:.2f} -> {layer.latency_us:.2f}",
            "M MACs": f"{layer.dense_macs / 1e6:.1f} -> {layer.macs / 1e6:.1f}",
            "relative\nerror": f"{layer.relative_error:.3f}",
            "proxy": f"{layer.proxy:.3g}",
        }
    return cells


def _saved(choice: RankChoice) -> str:
    return f"{choice.dense_macs / 1e9:.3f} -> {choice.macs / 1e9:.3f} G MACs ({choice.mac_reduction:.1%} fewer)"


def comparison(choices: Mapping[str, RankChoice]) -> Table:
    """Choices of one network side by side, below the original."""
    table = Table(title="side by side", title_justify="left")
    table.add_column("ranks", overflow="fold")
    for column in ("layers", "us", "speed-up", "G MACs", "fewer MACs", "error proxy"):
        table.add_column(column, justify="right", no_wrap=True)
    first = next(iter(choices.values()))
    table.add_row("none (dense)", "0", f"{first.dense_us:.1f}", "1.00", f"{first.dense_macs / 1e9:.3f}", "", "0")
    for name, choice in choices.items():
        table.add_row(
            name,
            str(len(choice.plan.layers)),
            f"{choice.latency_us:.1f}",
            f"{choice.dense_us / choice.latency_us:.2f}",
            f"{choice.macs / 1e9:.3f}",
            f"{choice.mac_reduction:.1%}",
            f"{choice.error:.4g}",
        )
    return table


def as_text(choice: RankChoice, width: int = 160) -> str:
    """The choice as plain text."""
    console = Console(width=width, highlight=False, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(choice)
    return capture.get()


def write_front(
    path: str | os.PathLike, choice: RankChoice, front: Sequence[RankChoice], by_macs: Sequence[RankChoice]
) -> None:
    """Draw the front of latency against error: a ``.png``, or a ``.html`` page that needs no other file.

    Parameters
    ----------
    path : path
        The file to write.
    choice : RankChoice
        The plan, which is marked; the page has its table.
    front, by_macs : sequences of RankChoice
        Plans by latency, and by MACs.

    Raises
    ------
    TdcError
        If the suffix is another, the file cannot be written, or matplotlib is missing.
    """
    if Path(path).suffix not in (".png", ".html"):
        raise TdcError(f"a front is drawn as .png or .html; found {str(path)!r}")
    figure = _draw(choice, front, by_macs)
    with write_atomic(path) as temporary:
        if Path(path).suffix == ".png":
            figure.savefig(temporary, dpi=150)
        else:
            picture = io.StringIO()
            figure.savefig(picture, format="svg")
            svg = picture.getvalue()
            temporary.write_text(_page(choice, svg[svg.index("<svg") :], front), encoding="utf-8")


def check_plots() -> None:
    """Raise `TdcError` unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise TdcError("plots need matplotlib; install it with: pip install 'tdc-tvm[plots]'") from None


def _draw(choice: RankChoice, front: Sequence[RankChoice], by_macs: Sequence[RankChoice]) -> Any:
    check_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    # Latencies of equal errors: the distance between the lines is what latency tables are worth.
    for plans, marker, colour, label in (
        (by_macs, "s", "#b0b0b0", "ranks by MACs"),
        (front, "o", "#1f77b4", "ranks by latency"),
    ):
        ordered = sorted(plans, key=lambda plan: plan.error)
        axes.plot([plan.latency_us for plan in ordered], [plan.error for plan in ordered], marker=marker,
                  markersize=4, linewidth=1.4, color=colour, label=label)  # fmt: skip
    axes.plot(choice.latency_us, choice.error, marker="*", markersize=15, color="#d62728", linestyle="none",
              label=f"this plan: {choice.latency_us:.1f} us, {choice.mac_reduction:.0%} fewer MACs")  # fmt: skip
    axes.plot(choice.dense_us, 0, marker="D", markersize=7, color="black", linestyle="none", clip_on=False, zorder=5,
              label=f"original: {choice.dense_us:.1f} us")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"predicted latency of convolutions and fully connected layers on {choice.device}, us")
    axes.set_ylabel(f"error proxy: {choice.proxy}")
    axes.set_title(f"{choice.model} on {choice.device}, {choice.precision}", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; color: #222; }
svg { max-width: 100%; height: auto; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; } th { text-align: right; vertical-align: bottom; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; } td { text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; white-space: normal; } tr.dense { color: #888; } tr.total { font-weight: 600; }"""


def _page(choice: RankChoice, svg: str, front: Sequence[RankChoice]) -> str:
    title = html.escape(f"Ranks of {choice.model} on {choice.device}, {choice.precision}")
    header = list(_COLUMNS)
    rows = [("" if layer.ranks else "dense", _cells(layer)) for layer in choice.layers]
    points = ["latency, us", "speed-up", "fewer MACs", "error proxy", "layers"]
    ordered = sorted(front, key=lambda plan: plan.latency_us)
    plans = [
        (
            "",
            dict(zip(points, (f"{plan.latency_us:.2f}", f"{plan.dense_us / plan.latency_us:.2f}",
                              f"{plan.mac_reduction:.1%}", f"{plan.error:.4g}", str(len(plan.plan.layers))),
                     strict=True)),
        )
        for plan in ordered
    ]  # fmt: skip
    facts = (
        f"{choice.goal}: {choice.dense_us:.1f} -> {choice.latency_us:.1f} us, {_saved(choice)}.",
        f"Error proxy {choice.error:.4g} ({choice.proxy}). Latencies: {choice.source}.",
        *choice.notes,
    )
    text = "".join(f"<p>{html.escape(fact)}</p>\n" for fact in facts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{text}{svg}\n"
        f"<h2>Layers</h2>\n{_html_table(header, rows)}\n<h2>Front</h2>\n{_html_table(points, plans)}\n</body></html>\n"
    )


def _html_table(columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    def cell(kind: str, column: str, value: str) -> str:
        name = ' class="text"' if column in _TEXTS else ""
        return f"<{kind}{name}>{html.escape(value).replace(chr(10), '<br>')}</{kind}>"

    head = "".join(cell("th", column, column) for column in columns)
    body = "".join(
        f'<tr class="{kind}">' + "".join(cell("td", column, row.get(column, "")) for column in columns) + "</tr>\n"
        for kind, row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
