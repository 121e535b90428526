"""Whose turn it is to train: start-time fair queueing over owners, in tokens.

Each owner has a clock that runs on by the tokens it was given, and who is furthest behind comes
first. No clock stands behind the server's own, which is where the last unit began, so nobody saves
up turns by staying away. Pure bookkeeping, told the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from training.core.operations import Operation
from training.core.planner import Standing, cost_tokens

ACTIVE_S = 30.0
"""An owner is about to come back for this long: others go on in small units until then."""


@dataclass
class _Owner:
    """``clock`` is where its next operation begins; ``seen_s``: when it last had work."""

    clock: float
    seen_s: float


class FairShares:
    """``turn_tokens``: how far one owner may get ahead of another within a unit, and so how long
    the other waits for its turn."""

    def __init__(self, turn_tokens: int) -> None:
        self._turn_tokens = turn_tokens
        self._owners: dict[str, _Owner] = {}
        self._clock = 0.0

    def standing(self, ready: Iterable[str], now_s: float) -> Standing:
        """``ready``: owners of what may run now."""
        present = set(ready)
        for owner in present & self._owners.keys():
            self._owners[owner].seen_s = now_s
        clocks = {owner: self._start(owner) for owner in present}
        active = {owner for owner, known in self._owners.items() if _is_active(known, now_s)}
        is_shared = len(present | active) > 1
        return Standing(clocks, self._turn_tokens if is_shared else math.inf)

    def took(self, operations: Iterable[Operation], now_s: float) -> None:
        """A plan of these begins."""
        costs: dict[str, int] = {}
        for operation in operations:
            costs[operation.owner] = costs.get(operation.owner, 0) + cost_tokens(operation)
        starts = {owner: self._start(owner) for owner in costs}
        if not any(costs.values()):
            return
        self._clock = min(starts.values())
        for owner, cost in costs.items():
            self._owners[owner] = _Owner(starts[owner] + cost, now_s)
        self._owners = {
            owner: known for owner, known in self._owners.items() if _is_active(known, now_s)
        }

    def _start(self, owner: str) -> float:
        known = self._owners.get(owner)
        return self._clock if known is None else max(known.clock, self._clock)


def _is_active(known: _Owner, now_s: float) -> bool:
    return now_s - known.seen_s < ACTIVE_S
