"""One curve as its points come in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console

from benchmarks.run import Values
from benchmarks.workload import Work

Point = tuple[float, float]


class Curve:
    """For the console at once, for the file at the end."""

    def __init__(self, x: str, unit: str, console: Console) -> None:
        self.x, self.unit = x, unit
        self.series: dict[str, list[Point]] = {}
        self._console = console

    def add(self, way: str, x: float, y: float) -> None:
        self.series.setdefault(way, []).append((x, y))
        self._console.print(f"{self.x} {x:g}: {way} {y:,.0f} {self.unit}")

    def values(self, limits: Sequence[Point] = (), limit: str = "") -> Values:
        """``limits``: what the machine's ``limit`` allows at each x."""
        values: Values = {"x": self.x, "unit": self.unit, "series": self.series}
        if limits:
            values["machine"] = {"limit": limit, "points": list(limits)}
        return values


def settled_s(work: Work, budget_s: float = 3.0, most: int = 5) -> float:
    """Median of the runs after the first two, which meet memory that is new to the machine (see
    ``as_in_a_loop``)."""
    work()
    work()
    seconds: list[float] = []
    while len(seconds) < most and (not seconds or sum(seconds) < budget_s):
        seconds.append(work())
    return statistics.median(seconds)
