"""Puts results into ``docs/performance.md``: the goals, each experiment's table, and its plots.

What stands between two marks is replaced; all else is written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism.errors import PrismError

from .latency import HANDOFF

__all__ = ["refresh"]

PLOTS = "performance"  # beside the page
Results = dict[str, dict[str, Any]]


def refresh(results: Path, page: Path, order: Iterable[str]) -> list[Path]:
    """Write the page anew from what is in ``results``; returns what was written.

    Args:
        results: where experiments have put their JSON, tables and plots.
        page: has the marks ``goals`` and ``results``.
        order: of the experiments.

    Raises:
        PrismError: there are no results, or the page lacks a mark.
    """
    found = {name: results / f"{name}.json" for name in order}
    known = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    if not known:
        raise PrismError(f"{results} has no results yet: run experiments first")
    text = _between(page.read_text(), "goals", _goals(known))
    text = _between(text, "results", "\n".join(_section(results, name, known) for name in known))
    page.write_text(text)
    plots = page.with_name(PLOTS)
    plots.mkdir(exist_ok=True)
    copied = [Path(shutil.copy(plot, plots)) for plot in sorted(results.glob("*.svg"))]
    return [page, *copied]


def _between(text: str, mark: str, new: str) -> str:
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        raise PrismError(f"the page has no marks {begin} and {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def _section(results: Path, name: str, known: Results) -> str:
    table = (results / f"{name}.md").read_text()
    table = re.sub(r"\]\(([^)/]+\.svg)\)", rf"]({PLOTS}/\1)", table)
    machine = known[name]["machine"]
    facts = f"Prism {machine['prism']}, Linux {machine['kernel']}, {machine['cores']} cores, load "
    return f"{table}\n`scripts/bench {name}`: {facts}{machine['load before'].split()[0]} before.\n"


# -- goals ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal.

    Attributes:
        text: what it is about.
        aim: the figure.
        form: how figures are written.
        experiment: that measures it.
        measure: takes the rows, as dictionaries, to the figure; ``None``: it was not measured.
        less: less is better.
    """

    text: str
    aim: float
    form: str
    experiment: str
    measure: Callable[[list[dict[str, Any]]], float | None]
    less: bool = False


def _value(cell: Any) -> float | None:
    """A cell's figure: the median where there were rounds."""
    if isinstance(cell, dict):
        cell = cell["median"]
    return cell if isinstance(cell, int | float) else None


def _least(column: str, system: str, *whats: str) -> Callable[[list[dict[str, Any]]], float | None]:
    """The least figure among the rows that were measured."""

    def measure(rows: list[dict[str, Any]]) -> float | None:
        cells = (
            _value(row[column]) for row in rows if row["what"] in whats and row["system"] == system
        )
        return min((cell for cell in cells if cell is not None), default=None)

    return measure


def _large(method: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{method} {size} MiB {kind}" for size in (1, 4, 16))


def _saved(rows: list[dict[str, Any]]) -> float | None:
    """How many times less frontend processor time for each GB than nginx."""
    column, what = "frontend CPU s/GB", "GET 1 MiB TCP"
    ours, theirs = (_least(column, system, what)(rows) for system in ("prism", "nginx"))
    return theirs / ours if ours and theirs else None


def _handoffs(rows: list[dict[str, Any]]) -> float | None:
    return max((_value(row["handoffs/s"]) or 0 for row in rows), default=None)


def _idle(rows: list[dict[str, Any]]) -> float | None:
    return _value(rows[-1]["backends kB each"]) if rows else None


RATIOS = (
    ("GET 1 MiB and up", "get", _large("GET", ""), 3.9, 3.9),
    ("GET 64 KiB", "get", ("GET 64 KiB ",), 3.5, 3.3),
    ("GET 16 KiB", "get", ("GET 16 KiB ",), 2.0, 2.0),
    ("GET 1 KiB", "get", ("GET 1 KiB ",), 1.0, 1.0),
    ("PUT 1 MiB and up", "put", _large("PUT", ""), 3.9, 3.9),
)
FIRST = "request to first octet of a handed-off connection, idle, "
GOALS = (
    *(
        Goal(
            f"{text}, {kind}",
            aim,
            "{:.2f}x",
            experiment,
            _least("of nginx", "prism", *(what + kind for what in whats)),
        )
        for text, experiment, whats, *aims in RATIOS
        for kind, aim in zip(("TCP", "TLS"), aims, strict=True)
    ),
    Goal("frontend CPU for each GB at 1 MiB, TCP", 50, "1/{:.0f}", "cost", _saved),
    *(
        Goal(
            text + kind,
            aim,
            "{:.0f} us",
            "latency",
            _least("median us", system, f"{kind}, idle"),
            less=True,
        )
        for text, system in (("handoff, idle, ", HANDOFF), (FIRST, "prism"))
        for kind, aim in (("TCP", 150), ("TLS", 200))
    ),
    Goal("handoffs a second, one frontend", 5000, "{:,.0f}", "handoffs", _handoffs),
    Goal("idle handed-off connection, backend memory", 10, "{:.1f} kB", "idle", _idle, less=True),
)


def _goals(known: Results) -> str:
    lines = ["| what | measured | goal | met |", "| --- | --- | --- | --- |"]
    for goal in GOALS:
        measured = None
        if goal.experiment in known:
            document = known[goal.experiment]
            columns = document["columns"]
            measured = goal.measure(
                [dict(zip(columns, row, strict=True)) for row in document["rows"]]
            )
        if measured is None:
            lines.append(f"| {goal.text} | - | {goal.form.format(goal.aim)} | - |")
            continue
        met = measured <= goal.aim if goal.less else measured >= goal.aim
        figures = goal.form.format(measured), goal.form.format(goal.aim)
        lines.append(f"| {goal.text} | {figures[0]} | {figures[1]} | {'yes' if met else 'no'} |")
    return "\n".join(lines)
