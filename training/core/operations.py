"""What waits in a model's queue: one client operation, decoded and checked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.backends.base import AdamParams, Datum, TrainOp
from training.core.errors import TinkercloudError
from training.core.records import FutureKind, FutureResult, StoredOperation

SlotOf = Callable[[], int]
"""Tells a model's slot when the operation runs: it may be queued before the model has one."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """A result and what must become durable with it.

    ``also`` runs in the transaction that stores the result, with the storage's connection, perhaps
    more than once until that is committed; if it raises a ``TinkercloudError``, the operation fails
    with that and ``undo`` runs. ``then`` runs after the commit.
    """

    result: FutureResult
    also: Callable[[Any], None] | None = None
    undo: Callable[[], Awaitable[None]] | None = None
    then: Callable[[], Awaitable[None]] | None = None


Finish = Callable[[], Awaitable[Outcome]]


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
    """Anything that runs alone in its model's order: create, load, save, export.

    ``run`` returns when the model may go on: what comes later does not change what is saved.
    What it returns finishes the work beside the operations that follow.
    """

    run: Callable[[], Awaitable[Finish]]


@dataclass(frozen=True, eq=False)
class RefusedWork:
    """Found wrong on arrival; it keeps its place in the order and fails there."""

    error: TinkercloudError


@dataclass(frozen=True, eq=False)
class StoredWork:
    """Still in the database, where an earlier process or an earlier engine left it."""

    load: Callable[[], Awaitable[Work]]
    num_tokens: int


Work = TrainWork | OptimWork | CallWork | RefusedWork | StoredWork


@dataclass(frozen=True, eq=False)
class Operation:
    """``arrived_s`` is a monotonic time; of one owner's operations the oldest goes first.

    ``stored`` is there when the operation came from the database; with an outcome, the operation
    is part of a replay and settles nothing.
    """

    request_id: str
    model_id: str
    seq: int
    kind: FutureKind
    work: Work
    arrived_s: float
    owner: str = ""
    stored: StoredOperation | None = None

    @property
    def num_tokens(self) -> int:
        return self.work.num_tokens if isinstance(self.work, TrainWork | StoredWork) else 0

    @property
    def is_settled(self) -> bool:
        """The client's answer is stored; only the model has to be brought back."""
        return self.stored is not None and self.stored.outcome is not None

    @property
    def is_passed_over(self) -> bool:
        """Settled, and no part of what made the model what it is."""
        return self.stored is not None and self.is_settled and not self.stored.is_replayed
