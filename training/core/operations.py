"""What waits in a model's queue: one client operation, decoded and checked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from training.backends.base import AdamParams, Datum, TrainOp
from training.core.errors import TinkercloudError
from training.core.records import FutureKind, FutureResult

SlotOf = Callable[[], int]
"""Tells a model's slot when the operation runs: it may be queued before the model has one."""


@dataclass(frozen=True, eq=False)
class TrainWork:
    """A forward or forward_backward; may share an engine unit with other models' work."""

    slot: SlotOf
    loss: str
    loss_config: Mapping[str, float]
    data: Sequence[Datum]
    num_tokens: int

    def op(self) -> TrainOp:
        return TrainOp(self.slot(), self.loss, self.loss_config, self.data)


@dataclass(frozen=True, eq=False)
class OptimWork:
    """An optimizer step; steps of several models go in one call."""

    slot: SlotOf
    params: AdamParams


@dataclass(frozen=True, eq=False)
class CallWork:
    """Anything that runs alone in its model's order: create, load, save, export."""

    run: Callable[[], Awaitable[FutureResult]]


@dataclass(frozen=True, eq=False)
class RefusedWork:
    """Found wrong on arrival; it keeps its place in the order and fails there."""

    error: TinkercloudError


Work = TrainWork | OptimWork | CallWork | RefusedWork


@dataclass(frozen=True, eq=False)
class Operation:
    """``arrived_s`` is a monotonic time; fairness between models goes by it."""

    request_id: str
    model_id: str
    seq: int
    kind: FutureKind
    work: Work
    arrived_s: float

    @property
    def num_tokens(self) -> int:
        return self.work.num_tokens if isinstance(self.work, TrainWork) else 0
