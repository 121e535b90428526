"""How far a model is past its last snapshot. Pure: told the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SnapshotPolicy:
    """When a model that trains is saved in the background."""

    steps: int = 8
    """Optimizer steps since the last snapshot that make one worth while."""
    tokens: int = 1_000_000
    """Tokens trained on since then that do."""
    pause_s: float = 5.0
    """Of one model, between two snapshots."""
    idle_s: float = 2.0
    """A model that does nothing for so long is saved whatever it is past."""
    share: float = 0.05
    """Of all time, the most that a trainer's snapshots may take; 1 means no limit."""


@dataclass
class Progress:
    """``boundary_seq``: the last operation, where no gradient is accumulated after it.

    Only there a model can be saved whole: gradients are no part of a snapshot.
    """

    boundary_seq: int | None = None
    steps: int = 0
    """Taken since the last snapshot."""
    tokens: int = 0
    """Of forward_backward since then: what a replay would compute again."""
    saved_s: float = 0.0
    changed_s: float = 0.0
    is_saving: bool = False

    def accumulated(self, num_tokens: int, now_s: float) -> None:
        """A forward_backward ran or failed: there may be gradients."""
        self.boundary_seq = None
        self.tokens += num_tokens
        self.changed_s = now_s

    def stepped(self, seq: int, now_s: float) -> None:
        self.boundary_seq = seq
        self.steps += 1
        self.changed_s = now_s

    def discarded(self, seq: int) -> None:
        """The gradients are gone, the model is what it was."""
        self.boundary_seq = seq

    def saved(self, steps: int, tokens: int, now_s: float) -> None:
        """A snapshot is durable that was begun when so many steps and tokens were due."""
        self.steps -= steps
        self.tokens -= tokens
        self.saved_s = now_s

    def is_dirty(self) -> bool:
        """Whether a snapshot now would save anything, and could be taken."""
        return self.boundary_seq is not None and self.steps > 0 and not self.is_saving

    def due_in_s(self, policy: SnapshotPolicy, now_s: float) -> float | None:
        """Seconds until it is worth a snapshot if nothing more happens; None: there is nothing to
        save."""
        if not self.is_dirty():
            return None
        after_pause_s = self.saved_s + policy.pause_s - now_s
        if self.steps >= policy.steps or self.tokens >= policy.tokens:
            return max(after_pause_s, 0.0)
        return max(self.changed_s + policy.idle_s - now_s, after_pause_s, 0.0)
