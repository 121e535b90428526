"""The adapter slots of one engine: which adapters there are, what a unit adds to their gradients.

Whether an adapter is in memory is ``SlotMemory``'s affair. A fresh one holds nothing until it is
used: its weights follow from its seed, its moments from its first step.
"""

from __future__ import annotations

import logging

import torch

from training.backends.base import AdamParams, OptimOutput
from training.core.errors import BackendDead, UnitError
from training.engine.adapter import Adapter, AdapterLayout
from training.engine.capture import Capture
from training.engine.optimizer import AdamArithmetic, adamw_step
from training.engine.slot import GRADIENT, PENDING, Slot
from training.engine.slot_memory import SlotMemory
from training.engine.slot_store import Entry
from training.engine.state_files import SavedState

_log = logging.getLogger(__name__)


class AdapterSlots:
    def __init__(self, memory: SlotMemory, max_slots: int, adam: AdamArithmetic) -> None:
        self.memory = memory
        self._adam = adam
        self._max_slots = max_slots
        self._entries: dict[int, Entry] = {}
        self._pending: set[int] = set()  # slots that the running unit has a gradient for

    # ------------------------------------------------------------------ which there are

    @property
    def available(self) -> int:
        return self._max_slots - len(self._entries)

    @property
    def resident(self) -> list[int]:
        """Numbers of the slots that are in memory."""
        return [number for number, entry in self._entries.items() if entry.slot is not None]

    def can_allocate(self, number: int) -> bool:
        return number in self._entries or self.available > 0

    def allocate(self, number: int, layout: AdapterLayout, saved: SavedState | None = None) -> None:
        """A fresh adapter, or the ``saved`` one. Replaces what the slot held.

        Raises ``UnitError`` where there is no room; the old adapter then remains.
        """
        if not self.can_allocate(number):
            raise UnitError(f"all {self._max_slots} adapter slots are in use")
        entry = self.memory.new_entry(layout, saved)
        self.free(number)
        self._entries[number] = entry

    def free(self, number: int) -> None:
        """Unknown numbers pass."""
        entry = self._entries.pop(number, None)
        if entry is not None:
            self._pending.discard(number)
            self.memory.forget(entry)

    def tidy(self, busy: bool) -> float | None:
        """See ``SlotMemory.tidy``. The books are looked through whenever an adapter has left; what
        is wrong with them is no reason to end an engine that others' adapters live in."""
        num_before = self.memory.num_resident
        pause_s = self.memory.tidy(busy)
        if self.memory.num_resident < num_before:
            try:
                self.check_integrity()
            except AssertionError as error:
                _log.error("%s", error)
        return pause_s

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the books do not agree with each other or the disk."""
        wrong = self.memory.problems(list(self._entries.values()))
        if not self._pending <= set(self._entries):
            wrong.append("pending gradients")
        if wrong:
            raise AssertionError(f"adapter slots are inconsistent: {', '.join(wrong)}")

    # ------------------------------------------------------------------ use

    def use(self, number: int) -> Slot:
        """The adapter, in memory until another one needs the room.

        Raises ``UnitError`` where there is no such slot, or no room because the disk refuses what
        would have to leave; ``BackendDead`` where its file is damaged.
        """
        return self.memory.bring(self._entry(number))

    def adapter(self, number: int) -> Adapter:
        """It may be used on after its slot has left memory."""
        return self.use(number).adapter

    def capture(self, number: int, with_optimizer: bool, base_model: str) -> Capture:
        """A copy of what the slot holds, gradients apart. Raises ``UnitError``."""
        captured = Capture.of(self.use(number), with_optimizer, base_model)
        self.memory.count_capture(captured)
        return captured

    def check_exists(self, number: int) -> None:
        """Raises ``UnitError``."""
        self._entry(number)

    def _entry(self, number: int) -> Entry:
        if number not in self._entries:
            raise UnitError(f"slot {number} holds no adapter")
        return self._entries[number]

    # ------------------------------------------------------------------ gradients of a unit

    def gradient_buffer(self, number: int) -> torch.Tensor:
        """fp32 [num_params] of any content, for the gradient of one operation."""
        buffer = self.memory.take_buffer(self._entry(number))
        self.memory.lent_bytes += buffer.nbytes
        return buffer

    def add_gradient(self, number: int, gradient: torch.Tensor) -> None:
        """Takes a ``gradient_buffer`` back: the slot's gradient plus this one is what the slot has
        after ``keep_gradients``. Until then its own is left alone: the unit may yet fail."""
        slot, entry = self.use(number), self._entry(number)
        self.memory.change(entry)
        before = slot.gradient if slot.pending is None else slot.pending
        if before is not None:
            gradient.add_(before)
        if slot.pending is not None:
            self.memory.spares.give(slot.pending)
        slot.pending = gradient
        self._pending.add(number)
        self.memory.lent_bytes -= gradient.nbytes
        self.memory.touch(entry)

    def keep_gradients(self) -> None:
        """The unit has succeeded."""
        for number in self._pending:
            entry = self._entries[number]
            self._drop(entry, GRADIENT)
            if entry.slot is not None:
                entry.slot.gradient, entry.slot.pending = entry.slot.pending, None
            if entry.file is not None:
                entry.file.sections[GRADIENT] = entry.file.sections.pop(PENDING)
        self._end_unit()

    def drop_gradients(self) -> None:
        """The unit has failed or was given up; buffers that it still holds go with it."""
        for number in self._pending:
            self._drop(self._entries[number], PENDING)
        self._end_unit()

    def _end_unit(self) -> None:
        self._pending.clear()
        self.memory.lent_bytes = 0

    def discard_gradient(self, number: int) -> None:
        """Of a slot on disk too, which stays there."""
        self._drop(self._entry(number), GRADIENT)

    def _drop(self, entry: Entry, name: str) -> None:
        """Forgets a gradient wherever it is: no file has to be written again for that."""
        self.memory.cancel_spilling(entry)
        if entry.slot is not None and (buffer := entry.slot.drop(name)) is not None:
            self.memory.count(entry)
            self.memory.spares.give(buffer)
        if entry.file is not None:
            entry.file.sections.pop(name, None)

    # ------------------------------------------------------------------ steps

    def step(self, number: int, params: AdamParams) -> OptimOutput:
        """An adapter that cannot be brought into memory has its own step refused, no other's. The
        gradient is discarded in any case."""
        entry = self._entry(number)
        try:
            slot = self._open_for_step(entry)
            assert slot.gradient is not None
            return adamw_step(
                slot.weights, slot.gradient, slot.adam, params, self._adam, slot.adapter
            )
        except UnitError as error:
            return OptimOutput(error=str(error))
        except BackendDead:
            raise  # the adapter cannot be read back from disk: its model comes back from a snapshot
        except Exception as error:  # border: the steps of other slots in this call stand
            return OptimOutput(error=f"the step failed: {type(error).__name__}: {error}")
        finally:
            self._drop(entry, GRADIENT)

    def _open_for_step(self, entry: Entry) -> Slot:
        """In memory with moments, and with a gradient of zero where there was none."""
        slot = self.memory.bring(entry)
        if not slot.has_moments:
            self.memory.make_room(8 * slot.layout.num_params, keep=entry)
        zeros = self.memory.take_buffer(entry).zero_() if slot.gradient is None else None
        self.memory.change(entry)
        if not slot.has_moments:
            slot.start_moments()
        if zeros is not None:
            slot.gradient = zeros
        self.memory.touch(entry)
        return slot
