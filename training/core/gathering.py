"""How long a unit waits for company: pure bookkeeping, told the time.

Tenants that train in step send their batches a few milliseconds apart. A unit that left with the
first of them would compute it alone, at half the speed, while the others wait for the next one; and
two halves that once got out of step would take turns for ever. So a unit waits for models that are
about to come: those that come back as soon as they did the last time, and those that left together
with one that is here, and came a moment after it the last time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from training.core.planner import Plan, PlanKind

MAX_SHARE = 0.1
"""Of the time that the unit would take with all who are expected: the most that it waits."""
MAX_PAUSE_S = 0.1
"""What company saves does not grow with a unit."""
UNITS_REMEMBERED = 16
JOINED = (PlanKind.FORWARD, PlanKind.FORWARD_BACKWARD)


@dataclass
class Rhythm:
    """Of one model that trains."""

    kind: PlanKind
    """Of its last passes, and their tokens."""
    num_tokens: int
    ended_s: float
    """When its last operation, of any kind, was done. Equal for all that were done together."""
    return_s: float = 0.0
    """How long after that the next one came, the last time."""
    previous_return_s: float = 0.0
    is_back: bool = False

    def arrived(self, now_s: float) -> None:
        if not self.is_back:
            self.previous_return_s, self.return_s = self.return_s, now_s - self.ended_s
            self.is_back = True


class Gathering:
    def __init__(self) -> None:
        self._rhythms: dict[str, Rhythm] = {}
        self._units = {kind: deque[tuple[float, int]](maxlen=UNITS_REMEMBERED) for kind in JOINED}
        self._free_s = 0.0

    def arrived(self, model_id: str, now_s: float) -> None:
        if (rhythm := self._rhythms.get(model_id)) is not None:
            rhythm.arrived(now_s)

    def ran(self, plan: Plan, started_s: float, ended_s: float) -> None:
        self._free_s = ended_s
        tokens: dict[str, int] = {}
        for operation in plan.operations:
            tokens[operation.model_id] = tokens.get(operation.model_id, 0) + operation.num_tokens
        if plan.kind in JOINED:
            self._units[plan.kind].append((ended_s - started_s, sum(tokens.values())))
            for model_id, num_tokens in tokens.items():
                rhythm = self._rhythms.setdefault(model_id, Rhythm(plan.kind, 0, ended_s))
                rhythm.kind, rhythm.num_tokens = plan.kind, num_tokens
        for model_id in tokens:
            if (known := self._rhythms.get(model_id)) is not None:
                known.ended_s, known.is_back = ended_s, False

    def forget(self, model_id: str) -> None:
        self._rhythms.pop(model_id, None)

    def pause_s(self, plan: Plan, ready: Iterable[str], now_s: float) -> float:
        """How long to wait before ``plan`` runs. ``ready``: the models with something to do.

        0 where nobody is expected, or those who were have not come in time.
        """
        if plan.kind not in JOINED or not self._units[plan.kind]:
            return 0.0
        oldest_s = min(operation.arrived_s for operation in plan.operations)
        since_s = max(oldest_s, self._free_s)  # the engine was busy until then
        num_tokens = sum(operation.num_tokens for operation in plan.operations)
        patience_s = 0.0
        # Each that comes makes the unit longer, and so the patience for all of them.
        for expected_s, tokens in self._expected(plan.kind, set(ready)):
            if expected_s < since_s - MAX_PAUSE_S:
                continue  # it should have been here
            num_tokens += tokens
            longer_s = min(MAX_SHARE * self._unit_s(plan.kind, num_tokens), MAX_PAUSE_S)
            if expected_s <= since_s + longer_s:
                patience_s = longer_s
        return max(since_s + patience_s - now_s, 0.0)

    def _expected(self, kind: PlanKind, present: set[str]) -> list[tuple[float, int]]:
        """When those come who are away, and with how many tokens; in order."""
        delays_s: dict[float, float] = {}
        away: list[Rhythm] = []
        for model_id, rhythm in self._rhythms.items():
            if model_id not in present:
                if rhythm.kind is kind:
                    away.append(rhythm)
            elif rhythm.is_back:
                delays_s[rhythm.ended_s] = rhythm.return_s - rhythm.previous_return_s
        return sorted(
            (each.ended_s + each.return_s + delays_s.get(each.ended_s, 0.0), each.num_tokens)
            for each in away
        )

    def _unit_s(self, kind: PlanKind, num_tokens: int) -> float:
        """An estimate from below: of late no unit took less, nor less for a token."""
        units = self._units[kind]
        at_least_s = min(unit_s for unit_s, _ in units)
        token_s = min(unit_s / max(tokens, 1) for unit_s, tokens in units)
        return max(at_least_s, token_s * num_tokens)
