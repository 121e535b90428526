"""One model's operations in the order of their seq_id, whatever order they arrive in.

Pure: no clock, no I/O. Also keeps the gradient window: what was accumulated since the last
optim_step is usable only as a whole, so a failed forward_backward fails the step that would apply
the rest. And what a snapshot would save: how far the model is past its last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from training.core.operations import Operation, SlotOf
from training.core.progress import Progress

LONGEST_RUN = 64


class ModelQueue:
    """``next_seq`` is the one that may run next; later ones wait for it.

    ``generation`` is that of the engine whose slot holds the model; None: no engine's yet.
    ``busy``: an operation runs that the next one has to wait for.
    """

    def __init__(self, model_id: str, slot: SlotOf, next_seq: int = 0) -> None:
        self.model_id = model_id
        self.slot = slot
        self.next_seq = next_seq
        self.high_seq = next_seq
        """All below were taken out at least once."""
        self.generation: int | None = None
        self.must_revive = False
        """The model has to be brought back before anything runs."""
        self.reviving: asyncio.Task[None] | None = None
        self.has_stored = False
        """The database holds operations that have to run and do not wait here."""
        self.is_stored = False
        """Nothing of the model was told to this process: the database knows all there is."""
        self.replay_failures = 0
        self.busy = False
        self.window_error: str | None = None
        self.progress = Progress()
        self._waiting: dict[int, Operation] = {}
        self._revived: set[str] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        """Something waits to be run."""
        return self.has_stored or bool(self._waiting)

    def is_idle(self) -> bool:
        """Nothing is to be run, brought back or saved."""
        return not (
            self._waiting
            or self.has_stored
            or self.busy
            or self.reviving is not None
            or self.progress.steps
        )

    def push(self, operation: Operation) -> bool:
        """False when the operation comes too late: its place was given up."""
        if operation.request_id in self._revived:
            return True  # found in the database before its acceptance was told here
        if operation.seq < self.next_seq and not self.must_revive:
            return False
        self._waiting[operation.seq] = operation
        return True

    def loaded(self, seq: int, generation: int) -> None:
        """Operation ``seq`` put weights into the slot; what was accumulated belonged to others."""
        self.generation = generation
        self.close_window()
        self.progress = Progress(boundary_seq=seq)

    def revive(
        self, next_seq: int, stored: Sequence[Operation], generation: int | None
    ) -> list[Operation]:
        """The model is as it was before ``next_seq``; ``stored`` is what the database has from
        there on. What waits here already is the same, and decoded.

        Returns what came too late: the model is past it.
        """
        self.next_seq = next_seq
        self.high_seq = max(self.high_seq, next_seq)
        self.generation = generation
        self.must_revive = self.has_stored = self.is_stored = False
        self.window_error = None
        self.progress = Progress()
        self._revived = {item.request_id for item in stored if not item.is_settled}
        for operation in stored:
            present = self._waiting.get(operation.seq)
            if present is None or operation.is_settled:
                self._waiting[operation.seq] = operation
        late = [self._waiting.pop(seq) for seq in sorted(self._waiting) if seq < next_seq]
        return [operation for operation in late if not operation.is_settled]

    def head(self) -> Operation | None:
        return self._waiting.get(self.next_seq)

    def run_of_ready(self) -> list[Operation]:
        """The operations that may run one after the other now, oldest first; not all of a long
        queue, which is looked at for every unit."""
        ready: list[Operation] = []
        while (operation := self._waiting.get(self.next_seq + len(ready))) is not None:
            ready.append(operation)
            if len(ready) == LONGEST_RUN:
                break
        return ready

    def pop(self, operation: Operation) -> None:
        """Takes the head out, to be run or failed."""
        if operation is not self.head():
            raise AssertionError(f"{operation.request_id} is not at the head of {self.model_id}")
        del self._waiting[operation.seq]
        if not operation.is_settled:
            self.replay_failures = 0
        self.next_seq += 1
        self.high_seq = max(self.high_seq, self.next_seq)

    def has_gap(self) -> bool:
        """Something waits for an operation that has not arrived."""
        return bool(self._waiting) and self.next_seq not in self._waiting

    def missing(self) -> range:
        """The places before what waits for an operation that has not arrived."""
        return range(self.next_seq, min(self._waiting))

    def skip_gap(self) -> range:
        """Gives up on what is missing; returns the sequence numbers given up.

        A missing operation may have been a forward_backward, so the window is spoiled.
        """
        missing = self.missing()
        self.next_seq = min(self._waiting)
        self.high_seq = max(self.high_seq, self.next_seq)
        names = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        self.spoil_window(f"operation {names} never arrived")
        return missing

    def gap_is_settled(self) -> bool:
        """What comes after the gap ran in an earlier life, so the gap was given up then."""
        return self.has_gap() and self._waiting[min(self._waiting)].is_settled

    def spoil_window(self, reason: str) -> None:
        """The first reason is kept: it is the one the user needs."""
        if self.window_error is None:
            self.window_error = reason

    def close_window(self) -> str | None:
        """At an optim_step: a new window begins; returns why the old one cannot be applied."""
        reason, self.window_error = self.window_error, None
        return reason

    def drain(self) -> list[Operation]:
        """Takes everything out, for a model that has ended."""
        drained = [self._waiting[seq] for seq in sorted(self._waiting)]
        self._waiting.clear()
        return drained
