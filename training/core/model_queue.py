"""One model's operations in the order of their seq_id, whatever order they arrive in.

Pure: no clock, no I/O. Also keeps the gradient window: what was accumulated since the last
optim_step is usable only as a whole, so a failed forward_backward fails the step that would apply
the rest.
"""

from __future__ import annotations

from training.core.operations import Operation


class ModelQueue:
    """``next_seq`` is the one that may run next; later ones wait for it."""

    def __init__(self, model_id: str, next_seq: int = 0) -> None:
        self.model_id = model_id
        self.next_seq = next_seq
        self.window_error: str | None = None
        self._waiting: dict[int, Operation] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, operation: Operation) -> bool:
        """False when the operation comes too late: its place was given up."""
        if operation.seq < self.next_seq:
            return False
        self._waiting[operation.seq] = operation
        return True

    def head(self) -> Operation | None:
        return self._waiting.get(self.next_seq)

    def run_of_ready(self) -> list[Operation]:
        """The operations that may run one after the other now, oldest first."""
        ready = []
        seq = self.next_seq
        while (operation := self._waiting.get(seq)) is not None:
            ready.append(operation)
            seq += 1
        return ready

    def pop(self, operation: Operation) -> None:
        """Takes the head out, to be run or failed."""
        if operation is not self.head():
            raise AssertionError(f"{operation.request_id} is not at the head of {self.model_id}")
        del self._waiting[operation.seq]
        self.next_seq += 1

    def has_gap(self) -> bool:
        """Something waits for an operation that has not arrived."""
        return bool(self._waiting) and self.next_seq not in self._waiting

    def skip_gap(self) -> range:
        """Gives up on what is missing; returns the sequence numbers given up.

        A missing operation may have been a forward_backward, so the window is spoiled.
        """
        missing = range(self.next_seq, min(self._waiting))
        self.next_seq = min(self._waiting)
        names = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        self.spoil_window(f"operation {names} never arrived")
        return missing

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
