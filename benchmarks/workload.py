"""What is measured: shapes, data, turns, medians. No torch, no SDK, no server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

OURS = "tinkercloud"
"""The first way of every comparison."""
IN_BACKEND = f"{OURS}, in the backend"
"""By the server's own clock: without HTTP, database and client."""
RECOMPUTING = f"{OURS}, recomputing"
"""Each layer of every sequence that is longer than a micro-batch."""
RECOMPUTING_ENGINE: Mapping[str, Any] = {"activation_memory_bytes": 1}
"""Its settings."""
RANK = 32
TENANT_RANKS = (4, 8, 12, 16, 20, 24, 28, 32)
"""Of the 8 tenants that train at once; 18 on average."""
LOW_TENANT_RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Together about as many parameters as one adapter of ``RANK``."""
PROMPT_TOKENS, NEW_TOKENS = 64, 128
VOCAB_SIZE = 49152
"""Of SmolLM2-135M, whose shape all figures are for."""

Work = Callable[[], float]
"""Does the work once and returns the seconds it took."""
Int64Rows = np.ndarray[Any, np.dtype[np.int64]]


class Shape(NamedTuple):
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of ``8x128``."""
        batch, length = text.split("x")
        return cls(int(batch), int(length))

    @property
    def num_tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def token_rows(batch: int, length: int, seed: int) -> Int64Rows:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length))


def training_rows(shape: Shape, seed: int = 0) -> Int64Rows:
    """[batch, length + 1]: inputs are all but the last column, targets all but the first. The same
    numbers for everybody."""
    return token_rows(shape.batch, shape.length + 1, seed)


def clocked(function: Callable[[], object]) -> Work:
    def work() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return work


def take_turns(
    ways: Mapping[str, Work],
    rounds: int,
    budget_s: float = float("inf"),
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way, ``rounds`` times in turn; ``warm_up``: after one not counted.

    After ``budget_s`` no further round begins, but one is always counted. Every second round goes
    backwards: who runs after whom makes no difference then.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for work in ways.values() if warm_up else ():
        work()
    start = clock()
    for number in range(rounds):
        if number and clock() - start > budget_s:
            break
        order = list(ways)[:: 1 if number % 2 == 0 else -1]
        for way in order:
            seconds[way].append(ways[way]())
    return seconds


def as_in_a_loop(work: Work) -> Work:
    """Does the work twice and counts the second time.

    Virtual machines give idle memory back to their host: fresh pages were seen to cost 2.5 s/GiB
    after a pause of 20 s, 0.5 within a loop. Programs that keep their memory do not care; those
    that do not would be punished for every pause in which others have their turn.
    """

    def twice() -> float:
        work()
        return work()

    return twice


class Case(NamedTuple):
    """The same work done in several ways, the first of them ours.

    ``amount`` of ``unit`` is done each time; None: the time itself is the figure.
    """

    name: str
    seconds: Mapping[str, Sequence[float]]
    amount: int | None = None
    unit: str = "tokens/s"

    def median_s(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def figure(self, way: str) -> float:
        """``unit`` per second, or milliseconds."""
        if self.amount is None:
            return 1000 * self.median_s(way)
        return self.amount / self.median_s(way)

    def shown(self, way: str) -> str:
        if way not in self.seconds:
            return ""
        figure = self.figure(way)
        if self.amount is None:
            return f"{figure:,.1f} ms"
        return f"{figure:,.0f} {self.unit}"

    def ratio(self, way: str, over: str) -> float:
        """How many times faster ``way`` is than ``over``."""
        return self.median_s(over) / self.median_s(way)

    def to_json(self) -> dict[str, Any]:
        rounded = {way: [round(each, 5) for each in all_] for way, all_ in self.seconds.items()}
        return {"name": self.name, "amount": self.amount, "unit": self.unit, "seconds": rounded}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Case:
        return cls(value["name"], value["seconds"], value["amount"], value["unit"])
