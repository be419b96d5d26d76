"""What a build did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tdc_tvm.relay_passes.layers import LayerReport


@dataclass(frozen=True)
class Verification:
    """The comparison of a compiled model with ONNX Runtime on seeded random input.

    Parameters
    ----------
    status : str
        ``"passed"``, or ``"skipped"`` with the reason in ``detail``.
    detail : str
        The largest error and the output it is in, or the reason.
    max_error : float or None
        Largest absolute difference over all outputs.
    """

    status: str
    detail: str
    max_error: float | None = None


@dataclass(frozen=True)
class BuildReport:
    """The result of a build; prints as a table.

    Parameters
    ----------
    target, device, precision : str
        What it was built for.
    layers : tuple[LayerReport, ...]
        Every convolution and every Tucker layer.
    macs : int
        Multiply-adds of all convolutions.
    parameters : int
        Floating-point weights of the model.
    build_seconds : float
        Time of the whole build, verification not counted; zero for a plan.
    verification : Verification
        Agreement with ONNX Runtime.
    notes : tuple[str, ...]
        What the user should know besides.
    batch : int or None
        The batch size that was asked for.
    further : tuple[BuildReport, ...]
        Of further batch sizes, their layers and multiply-adds.
    """

    target: str
    device: str
    precision: str
    layers: tuple[LayerReport, ...] = ()
    macs: int = 0
    parameters: int = 0
    build_seconds: float = 0.0
    verification: Verification = field(default_factory=lambda: Verification("skipped", "not asked for"))
    notes: tuple[str, ...] = ()
    batch: int | None = None
    further: tuple[BuildReport, ...] = ()

    def to_dict(self) -> dict:
        """The report as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> BuildReport:
        """Read what `to_dict` gave."""
        layers = tuple(
            LayerReport(**{**layer, "ranks": tuple(layer["ranks"]) if layer["ranks"] else None})
            for layer in data["layers"]
        )
        return BuildReport(
            **{
                **data,
                "layers": layers,
                "notes": tuple(data["notes"]),
                "further": tuple(BuildReport.from_dict(report) for report in data["further"]),
                "verification": Verification(**data["verification"]),
            }
        )

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """The Tucker layers that are one operator."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def unfused(self) -> tuple[LayerReport, ...]:
        """The Tucker layers that are not one operator."""
        return tuple(layer for layer in self.layers if layer.kind == "tucker_conv" and not layer.fused)

    @property
    def tuned(self) -> tuple[LayerReport, ...]:
        """The layers that measurements decided, of all batch sizes."""
        layers = (layer for report in (self, *self.further) for layer in report.layers)
        return tuple(layer for layer in layers if layer.measured_latency_us is not None)

    def predictions(self) -> Text:
        """How each layer is computed, and what the model's prediction is the sum of, a line for each."""
        lines = []
        for report in (self, *self.further):
            lines.append(f"prediction of the analytical model{self._at(report)}, us:")
            for layer in report.layers:
                if layer.predicted_parts_us:
                    # Zero is added, so that what rounds to -0.00 has no sign.
                    sums = ((name, round(us, 2) + 0.0) for name, us in layer.predicted_parts_us.items())
                    parts = " + ".join(f"{name} {us:.2f}" for name, us in sums)
                    how = f"{layer.strategy} {layer.config}"
                    measured = layer.measured_latency_us
                    tuned = "" if measured is None else f"; tuned, measured {measured:.2f}"
                    lines.append(f"  {layer.name} ({how}): {parts} = {layer.predicted_latency_us:.2f}{tuned}")
        return Text("\n".join(lines))

    def _at(self, report: BuildReport) -> str:
        return f" at batch {report.batch}" if self.further else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}"
        title = f"{count} on {self.device}, {self.precision}{self._at(self)}"
        table = Table(title=title, title_justify="left")
        columns = [
            "layer",
            "kind",
            "shape",
            "ranks out, in",
            "fused",
            "strategy",
            "config",
            "predicted us",
            "tuned us",
        ]
        # Configurations would be folded into narrow columns of many lines.
        hidden = {"config"} if options.max_width < 170 else set()
        hidden |= {"kind", "strategy"} if options.max_width < 120 else set()
        if not self.tuned:
            hidden.add("tuned us")
        elif options.max_width < 100:
            # What is not fused is said below, too.
            hidden.add("fused")
        for column in columns:
            if column not in hidden:
                numeric = column.endswith(" us")
                foldable = column in ("layer", "config")
                table.add_column(
                    column.replace(" us", "\nus").replace("ranks ", "ranks\n"),
                    justify="right" if numeric else "left",
                    overflow="fold",
                    no_wrap=not foldable,
                )
        for layer in self.layers:
            tucker = layer.kind == "tucker_conv"
            latency = layer.predicted_latency_us
            cells = {
                "layer": layer.name,
                "kind": layer.kind,
                "shape": layer.shape,
                "ranks out, in": f"{layer.ranks[0]}, {layer.ranks[1]}" if layer.ranks else "",
                "fused": Text("yes", "green") if layer.fused else Text("no", "red") if tucker else "",
                "strategy": layer.strategy,
                "config": layer.config,
                "predicted us": "" if latency is None else f"{latency:.1f}",
                "tuned us": "" if layer.measured_latency_us is None else f"{layer.measured_latency_us:.1f}",
            }
            # Plain text would be searched for rich's markup, which names and reasons may look like.
            shown = (cells[column] for column in columns if column not in hidden)
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in shown))
        yield table
        for name, reason in dict.fromkeys((x.name, x.reason) for r in (self, *self.further) for x in r.unfused):
            yield Text(f"not fused: {name}: {reason}", "red")
        tucker_count = len(self.fused) + len(self.unfused)
        yield Text(
            f"{len(self.fused)} of {tucker_count} Tucker layers fused; "
            f"{_count(self.macs)} multiply-adds in convolutions, {_count(self.parameters)} parameters"
        )
        if self.tuned:
            every = [layer for report in (self, *self.further) for layer in report.layers]
            yield Text(
                f"tuned: {len(self.tuned)} of {len(every)} layers decided by measurements in the tuning database, "
                "the others by the model"
            )
        for report in (self, *self.further) if self.further else ():
            predicted = sum(layer.predicted_latency_us or 0.0 for layer in report.layers)
            yield Text(f"batch {report.batch}: {predicted:.1f} us predicted for all layers")
        if self.build_seconds:
            style = "green" if self.verification.status == "passed" else "yellow"
            yield Text(f"built in {self.build_seconds:.1f} s for {self.target}")
            yield Text(
                f"verification against ONNX Runtime {self.verification.status}: {self.verification.detail}", style
            )
        else:
            yield Text(f"planned for {self.target}, not built")
        for note in self.notes:
            yield Text(f"note: {note}", "yellow")

    def __str__(self) -> str:
        console = Console(width=170, highlight=False, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _count(number: int) -> str:
    """A count as people say it, with three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return str(number)
