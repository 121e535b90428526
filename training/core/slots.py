"""The adapter slots of one trainer: who holds which."""

from __future__ import annotations

from training.core.errors import BackendError


class SlotPool:
    """Numbers 0 .. num_slots - 1; the lowest free one is given first."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders: dict[int, str] = {}

    @property
    def available(self) -> int:
        return len(self._free)

    def allocate(self, holder: str) -> int:
        """Raises ``BackendError`` when every slot is taken."""
        if not self._free:
            raise BackendError(
                f"the server is full: {len(self._holders)} models are loaded; "
                "try again when a session has finished"
            )
        slot = self._free.pop()
        self._holders[slot] = holder
        return slot

    def free(self, slot: int) -> None:
        del self._holders[slot]
        self._free.append(slot)
        self._free.sort(reverse=True)

    def check_integrity(self) -> None:
        taken = set(self._holders)
        if taken & set(self._free) or len(self._free) != len(set(self._free)):
            raise AssertionError(f"slot pool is inconsistent: {sorted(taken)} / {self._free}")
