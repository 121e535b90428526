"""Whose turn it is to train: start-time fair queueing over owners, in tokens.

Each owner has a clock that runs on by the tokens it was given, and who is furthest behind comes
first. No clock stands behind the server's own, which is where the last unit began, so nobody saves
up turns by staying away. Pure bookkeeping, told the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.core.operations import Operation
from training.core.planner import Run, Standing, cost_tokens

ACTIVE_S = 30.0
"""An owner is about to come back for this long: others go on in small units until then."""
MIN_TURN_TOKENS = 512
"""However little somebody wants at a time: passes of fewer tokens are slow."""


@dataclass
class _Owner:
    """``clock`` is where its next operation begins; ``seen_s``: when it last had work."""

    clock: float
    seen_s: float
    wants_tokens: int
    """What it had to compute when it last had something, at most a largest turn."""


class FairShares:
    """A unit cannot be interrupted, so none gets further ahead in one than the owner who wants
    least has to compute itself: a small batch waits for a small one. ``turn_tokens`` at most."""

    def __init__(self, turn_tokens: int) -> None:
        self._turn_tokens = turn_tokens
        self._owners: dict[str, _Owner] = {}
        self._clock = 0.0

    def standing(self, ready: Sequence[Run], now_s: float) -> Standing:
        for owner, wants_tokens in self._wants(ready).items():
            known = self._owners.setdefault(owner, _Owner(self._clock, now_s, wants_tokens))
            known.clock = max(known.clock, self._clock)
            known.seen_s = now_s
            known.wants_tokens = wants_tokens or known.wants_tokens
        self._owners = {
            owner: known for owner, known in self._owners.items() if now_s - known.seen_s < ACTIVE_S
        }
        clocks = {owner: known.clock for owner, known in self._owners.items()}
        if len(self._owners) <= 1:
            return Standing(clocks)
        wanted = [known.wants_tokens for known in self._owners.values() if known.wants_tokens]
        least = max(min(wanted, default=0), MIN_TURN_TOKENS)
        return Standing(clocks, min(least, self._turn_tokens))

    def took(self, operations: Iterable[Operation]) -> None:
        """A plan of these begins, which was made with the last standing."""
        costs: dict[str, int] = {}
        for operation in operations:
            costs[operation.owner] = costs.get(operation.owner, 0) + cost_tokens(operation)
        if any(costs.values()):
            self._clock = min(self._owners[owner].clock for owner in costs)
        for owner, cost in costs.items():
            self._owners[owner].clock += cost

    def _wants(self, ready: Sequence[Run]) -> dict[str, int]:
        """Tokens, by owner; 0 where there are only steps and calls."""
        wants: dict[str, int] = {}
        for run in ready:
            tokens = wants.get(run[0].owner, 0)
            for operation in run:
                if tokens >= self._turn_tokens:
                    break
                tokens += operation.num_tokens
            wants[run[0].owner] = min(tokens, self._turn_tokens)
        return wants
