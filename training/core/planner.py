"""Decides what the trainer does next: a pure function of the queues.

Forward passes of all models share one unit, so do optimizer steps. Fair in two ways: the kind of
work of the oldest waiting operation goes first, and a unit takes one operation of each model in
turn until its token budget is full, so a tenant with a long queue cannot crowd out the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from training.core.operations import Operation, RefusedWork
from training.core.records import FutureKind


class PlanKind(Enum):
    INSTANT = "instant"
    """Nothing to compute: refused, or settled before."""
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    CALL = "call"


@dataclass(frozen=True, eq=False)
class Plan:
    """Operations to take out of their queues and run together; queue order within a model."""

    kind: PlanKind
    operations: Sequence[Operation]


def plan_next(ready: Sequence[Sequence[Operation]], unit_tokens: int) -> Plan | None:
    """``ready``: per model, what may run one after the other now (never empty inside).

    What costs nothing goes first; a call runs alone.
    """
    if not ready:
        return None
    instant = [run[0] for run in ready if plan_kind(run[0]) is PlanKind.INSTANT]
    if instant:
        return Plan(PlanKind.INSTANT, instant)
    by_age = sorted(ready, key=lambda run: run[0].arrived_s)
    kind = plan_kind(by_age[0][0])
    if kind is PlanKind.CALL:
        return Plan(kind, [by_age[0][0]])
    runs = [run for run in by_age if plan_kind(run[0]) is kind]
    if kind is PlanKind.OPTIM_STEP:
        return Plan(kind, [run[0] for run in runs])
    return Plan(kind, _fill(runs, kind, unit_tokens))


def plan_kind(operation: Operation) -> PlanKind:
    if operation.is_passed_over or isinstance(operation.work, RefusedWork):
        return PlanKind.INSTANT
    return _KINDS.get(operation.kind, PlanKind.CALL)


_KINDS = {
    FutureKind.FORWARD: PlanKind.FORWARD,
    FutureKind.FORWARD_BACKWARD: PlanKind.FORWARD_BACKWARD,
    FutureKind.OPTIM_STEP: PlanKind.OPTIM_STEP,
}


def _fill(runs: Sequence[Sequence[Operation]], kind: PlanKind, unit_tokens: int) -> list[Operation]:
    """Round robin over the models; the first operation always fits, however large it is."""
    taken: list[Operation] = []
    budget = unit_tokens
    depth = 0
    open_runs = list(runs)
    while open_runs:
        still_open = []
        for run in open_runs:
            if depth >= len(run) or plan_kind(run[depth]) is not kind:
                continue
            if taken and run[depth].num_tokens > budget:
                continue
            taken.append(run[depth])
            budget -= run[depth].num_tokens
            still_open.append(run)
        open_runs = still_open
        depth += 1
    return taken
