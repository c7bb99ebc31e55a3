"""Taking turns: each round runs every system once, in alternating order; figures are medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bed import Measured

__all__ = ["Figure", "figure", "ratio", "rounds"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with its spread (least and greatest of the rounds)."""

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "low": self.low, "high": self.high}


def figure(values: Sequence[float]) -> Figure:
    """The median and spread of the rounds."""
    return Figure(statistics.median(values), min(values), max(values))


def rounds(
    systems: Sequence[str], count: int, run: Callable[[str, int], Measured]
) -> dict[str, list[Measured]]:
    """Run all systems ``count`` times, A B C, C B A, A B C...

    What else the machine does then meets neighbours alike, and none is always first.
    """
    found: dict[str, list[Measured]] = {system: [] for system in systems}
    for number in range(count):
        order = systems if number % 2 == 0 else list(reversed(systems))
        for system in order:
            found[system].append(run(system, number))
    return found


def ratio(
    ours: Sequence[Measured], theirs: Sequence[Measured], of: Callable[[Measured], float]
) -> Figure:
    """The ratio of each round's pair, as median and spread."""
    pairs = [
        of(mine) / of(other) for mine, other in zip(ours, theirs, strict=True) if of(other) > 0
    ]
    return figure(pairs) if pairs else Figure(float("nan"), float("nan"), float("nan"))
