"""How long a unit waits for company: pure bookkeeping, told the time.

Tenants that train in step send their batches a few milliseconds apart. A unit that left with the
first of them would compute it alone, at half the speed, while the others wait for the next one.
"""

from __future__ import annotations

from collections.abc import Iterable

from training.core.planner import Plan, PlanKind

MAX_SHARE = 0.05
"""Of the last unit's time: the most that waiting may add to a step."""
MEMORY_UNITS = 10
"""A model is expected for so many times the last unit's time after it was last in one."""
JOINED = (PlanKind.FORWARD, PlanKind.FORWARD_BACKWARD)


class Gathering:
    def __init__(self) -> None:
        self._unit_s: dict[PlanKind, float] = {}
        self._last_s: dict[tuple[PlanKind, str], float] = {}

    def ran(self, plan: Plan, started_s: float, ended_s: float) -> None:
        if plan.kind in JOINED:
            self._unit_s[plan.kind] = ended_s - started_s
            for operation in plan.operations:
                self._last_s[plan.kind, operation.model_id] = ended_s

    def forget(self, model_id: str) -> None:
        for kind in JOINED:
            self._last_s.pop((kind, model_id), None)

    def pause_s(self, plan: Plan, ready: Iterable[str], now_s: float) -> float:
        """How long to wait before ``plan`` runs. ``ready``: the models with something to do.

        0 where nobody is missing, or the oldest operation has waited long enough.
        """
        unit_s = self._unit_s.get(plan.kind)
        if unit_s is None:
            return 0.0
        present = set(ready)
        expected_since_s = now_s - MEMORY_UNITS * unit_s
        is_missing = any(
            kind is plan.kind and last_s >= expected_since_s and model_id not in present
            for (kind, model_id), last_s in self._last_s.items()
        )
        if not is_missing:
            return 0.0
        oldest_s = min(operation.arrived_s for operation in plan.operations)
        return max(oldest_s + MAX_SHARE * unit_s - now_s, 0.0)
