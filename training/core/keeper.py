"""What the task manager asks of whoever keeps models and promises: the services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from training.core.errors import TinkercloudError
from training.core.operations import Operation, Outcome


@dataclass(frozen=True, eq=False)
class Revival:
    """A model as it was before operation ``next_seq``, in an engine's slot; ``operations`` are
    those that the database has from there on, in order.

    ``generation`` of that engine; None: nothing is loaded, operation 0 creates the model.
    """

    next_seq: int
    operations: Sequence[Operation]
    generation: int | None


FinishSnapshot = Callable[[], Awaitable[bool]]
"""Makes a captured snapshot durable; False where it could not be of use."""


class Keeper(Protocol):
    async def settle(self, operation: Operation, outcome: Outcome) -> None:
        """Makes the outcome durable and wakes its waiter; settles once, later ones are ignored."""

    async def revive(self, model_id: str, until: int | None) -> Revival:
        """Loads a model's newest good snapshot. With ``until``, operations from there on are known
        to the caller.

        Raises ``ModelLost`` when it cannot be brought back; after another error it is tried again.
        """

    async def fill_gap(self, model_id: str, missing: Sequence[int]) -> Sequence[Operation]:
        """Stores a failed operation in every one of these places that is still empty, and returns
        them: the gap is given up for good, and whoever still comes for such a place finds it taken.
        """

    async def snapshot(self, model_id: str, seq: int) -> FinishSnapshot:
        """Captures a model that is as operation ``seq`` left it, without gradients."""

    def note_running(self, engine: str, request_ids: Sequence[str]) -> None:
        """Leaves word of what is about to run, for the next process if this one is killed."""

    async def note_deaths(self, request_ids: Sequence[str]) -> None:
        """Remembers that an engine crashed while it ran them."""

    async def mark_corrupted(self, operation: Operation) -> None:
        """Run again, it came to another result than the client has."""

    async def give_up(self, model_id: str, error: TinkercloudError) -> None:
        """The model cannot be brought back; it and what waits for it ends with ``error``."""
