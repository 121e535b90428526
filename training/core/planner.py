"""Decides what the trainer does next: a pure function of the queues and of who got how much.

Fair to owners first, whatever number of models they have: the oldest operation of the owner that
is furthest behind says what kind of work goes next, and a unit takes one operation at a time from
whoever is then furthest behind, of its models in turn, until the token budget is full. Work of many
owners and models shares one unit, and so do optimizer steps.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from training.core.operations import Operation, RefusedWork
from training.core.records import FutureKind

STEP_TOKENS = 64
"""What an optimizer step counts for: with rank 32 it takes about as long as so many tokens."""
CALL_TOKENS = 1024
"""The same of a call; they read or write files of an adapter."""


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


@dataclass(frozen=True)
class Standing:
    """How much each owner has had.

    ``clocks``: in tokens, by owner; 0 for others. ``turn_tokens``: how far an owner may get ahead
    of the one furthest behind before its next operation must wait for another unit.
    """

    clocks: Mapping[str, float] = field(default_factory=dict)
    turn_tokens: float = math.inf

    def clock(self, operation: Operation) -> float:
        return self.clocks.get(operation.owner, 0.0)


ALONE = Standing()
Run = Sequence[Operation]
"""Operations of one model that may run one after the other now; never empty."""


def plan_next(ready: Sequence[Run], unit_tokens: int, standing: Standing = ALONE) -> Plan | None:
    """What costs nothing goes first; a call runs alone."""
    if not ready:
        return None
    instant = [run[0] for run in ready if plan_kind(run[0]) is PlanKind.INSTANT]
    if instant:
        return Plan(PlanKind.INSTANT, instant)
    by_turn = sorted(ready, key=lambda run: (standing.clock(run[0]), run[0].arrived_s))
    kind = plan_kind(by_turn[0][0])
    if kind is PlanKind.CALL:
        return Plan(kind, [by_turn[0][0]])
    runs = [run for run in by_turn if plan_kind(run[0]) is kind]
    if kind is PlanKind.OPTIM_STEP:
        return Plan(kind, _fill([run[:1] for run in runs], kind, math.inf, standing))
    return Plan(kind, _fill(runs, kind, unit_tokens, standing))


def plan_kind(operation: Operation) -> PlanKind:
    if operation.is_passed_over or isinstance(operation.work, RefusedWork):
        return PlanKind.INSTANT
    return _KINDS.get(operation.kind, PlanKind.CALL)


_KINDS = {
    FutureKind.FORWARD: PlanKind.FORWARD,
    FutureKind.FORWARD_BACKWARD: PlanKind.FORWARD_BACKWARD,
    FutureKind.OPTIM_STEP: PlanKind.OPTIM_STEP,
}


def cost_tokens(operation: Operation) -> int:
    """What an operation counts for in its owner's share."""
    match plan_kind(operation):
        case PlanKind.INSTANT:
            return 0
        case PlanKind.CALL:
            return CALL_TOKENS
        case PlanKind.OPTIM_STEP:
            return STEP_TOKENS
        case PlanKind.FORWARD | PlanKind.FORWARD_BACKWARD:
            return max(operation.num_tokens, 1)


def _fill(
    runs: Sequence[Run], kind: PlanKind, unit_tokens: float, standing: Standing
) -> list[Operation]:
    """``runs`` in the order of their turn. The first operation always fits, however large."""
    models: dict[str, deque[tuple[Run, int]]] = {}
    for run in runs:
        models.setdefault(run[0].owner, deque()).append((run, 0))
    turns = [
        (standing.clock(waiting[0][0][0]), number, waiting)
        for number, waiting in enumerate(models.values())
    ]
    latest = turns[0][0] + standing.turn_tokens
    taken: list[Operation] = []
    while turns:
        clock, number, waiting = turns[0]
        if taken and clock >= latest:
            break
        operation = _next_of(waiting, kind, unit_tokens if taken else math.inf)
        if operation is None:
            heapq.heappop(turns)
            continue
        taken.append(operation)
        unit_tokens -= operation.num_tokens
        heapq.heapreplace(turns, (clock + cost_tokens(operation), number, waiting))
    return taken


def _next_of(
    waiting: deque[tuple[Run, int]], kind: PlanKind, at_most_tokens: float
) -> Operation | None:
    """Of one owner's models in turn; one whose next operation does not fit is out of this unit."""
    while waiting:
        run, depth = waiting.popleft()
        if depth >= len(run) or plan_kind(run[depth]) is not kind:
            continue
        if run[depth].num_tokens <= at_most_tokens:
            waiting.append((run, depth + 1))
            return run[depth]
    return None
