"""Results: one JSON document and one Markdown table for each experiment, and its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .pairing import Figure

__all__ = ["Plot", "Result", "save", "size_name"]

Cell = str | int | float | Figure


@dataclass(frozen=True, slots=True)
class Plot:
    """A line for each system.

    Attributes:
        file: name without its ending.
        lines: by label, the points ``(x label, figure)``.
        limit: a horizontal line, such as the links' rate; ``None``: none.
    """

    file: str
    title: str
    unit: str
    lines: dict[str, list[tuple[str, Figure]]]
    limit: float | None = None


@dataclass(slots=True)
class Result:
    """What an experiment has found.

    Attributes:
        columns: headings; ``rows`` have as many cells.
        notes: what has to be known to read it.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, with title and notes."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + " --- |" * len(self.columns))
        lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in self.rows]
        lines.append("")
        lines += [f"- {note}" for note in self.notes]
        lines += [f"\n![{plot.title}]({plot.file}.svg)" for plot in self.plots]
        return "\n".join(lines) + "\n"

    def to_dict(self, facts: dict[str, str]) -> dict[str, Any]:
        """For JSON."""
        cells = [
            [cell.to_dict() if isinstance(cell, Figure) else cell for cell in row]
            for row in self.rows
        ]
        return {
            "name": self.name,
            "title": self.title,
            "machine": facts,
            "columns": list(self.columns),
            "rows": cells,
            "notes": self.notes,
        }


def size_name(octets: int) -> str:
    """``64 KiB``, ``1 MiB``."""
    return f"{octets >> 20} MiB" if octets >= 1 << 20 else f"{octets >> 10} KiB"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(cell: Cell) -> str:
    if isinstance(cell, Figure):
        return f"{_number(cell.median)} ({_number(cell.low)}-{_number(cell.high)})"
    return cell if isinstance(cell, str) else _number(cell)


def save(result: Result, facts: dict[str, str], directory: Path) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and the plots; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    document, table = directory / f"{result.name}.json", directory / f"{result.name}.md"
    document.write_text(json.dumps(result.to_dict(facts), indent=1) + "\n")
    table.write_text(result.markdown())
    return [document, table, *(_draw(plot, directory) for plot in result.plots)]


def _draw(plot: Plot, directory: Path) -> Path:
    import matplotlib  # noqa: PLC0415 - heavy, and only here

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prism"  # the same figures give the same file
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, points in plot.lines.items():
        middles = [figure.median for _, figure in points]
        below = [figure.median - figure.low for _, figure in points]
        above = [figure.high - figure.median for _, figure in points]
        axes.errorbar(
            [x for x, _ in points], middles, yerr=[below, above], marker="o", capsize=3, label=label
        )
    if plot.limit is not None:
        axes.axhline(plot.limit, linestyle=":", color="grey", label="links")
    axes.set(title=plot.title, ylabel=plot.unit, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / f"{plot.file}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
