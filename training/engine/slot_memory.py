"""Which adapters are in memory and which on disk: by a budget, and by how long they were not used.

Every way there and back keeps all bits. Knows entries, not slot numbers. Not thread-safe.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import NamedTuple
from weakref import ref

import torch

from training.backends.state_files import reason
from training.config import EngineConfig
from training.core.errors import UnitError
from training.engine.adapter import AdapterLayout
from training.engine.buffers import GradientBuffers
from training.engine.capture import Capture
from training.engine.machine import memory_bytes
from training.engine.slot import Slot
from training.engine.slot_store import Entry, SlotStore
from training.engine.state_files import SavedState

_log = logging.getLogger(__name__)

DEFAULT_PARTS = 3
"""Of the memory; one for adapters, the others for models, their caches and whatever else runs."""
BUSY_SHARE = 0.02
"""Of the engine's time that spilling idle adapters may take from others' work."""
FAILED_PAUSE_S = 30.0
"""Until idle adapters are spilled again after a disk refused one."""


class _Spilling(NamedTuple):
    entry: Entry
    write: Generator[None, None, None]


class SlotMemory:
    """``clock`` in seconds."""

    def __init__(
        self, store: SlotStore, config: EngineConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spares = GradientBuffers(store.device, clock)
        self.lent_bytes = 0
        """Gradient buffers that a running unit holds."""
        self._captures: list[ref[Capture]] = []  # until their writer lets go of them
        self._store = store
        self._budget_bytes = (
            config.adapter_memory_bytes or memory_bytes(store.device) // DEFAULT_PARTS
        )
        self._idle_spill_s = config.idle_spill_s
        self._clock = clock
        self._recent: OrderedDict[Entry, None] = OrderedDict()  # in memory; last used last
        self._entry_bytes = 0
        self._spilling: _Spilling | None = None  # an idle one, chunk by chunk
        self._paused_until_s = 0.0

    @property
    def num_resident(self) -> int:
        return len(self._recent)

    @property
    def num_bytes(self) -> int:
        """Of adapters and their gradients, spare buffers and states being written included."""
        captured = sum(each.num_bytes for each in self._living_captures())
        return self._entry_bytes + self.lent_bytes + self.spares.num_bytes + captured

    def _living_captures(self) -> list[Capture]:
        return [captured for each in self._captures if (captured := each()) is not None]

    def count_capture(self, captured: Capture) -> None:
        """From now until it is gone. Nobody has to leave for it: it goes by itself soon, and a save
        must not fail because another adapter cannot be put on disk."""
        self._captures = [ref(each) for each in (*self._living_captures(), captured)]

    # ------------------------------------------------------------------ in

    def new_entry(self, layout: AdapterLayout, saved: SavedState | None) -> Entry:
        """In memory where it was ``saved``: its files may go at any time. Raises ``UnitError``."""
        entry = self._store.new_entry(layout)
        if saved is not None:
            self.make_room(saved.num_bytes + entry.adapter_bytes, keep=entry)
            self._store.load_saved(entry, saved)
            self.touch(entry)
        return entry

    def bring(self, entry: Entry) -> Slot:
        """Reads or makes the adapter where it is not in memory. Raises ``UnitError``."""
        self.cancel_spilling(entry)
        if entry.slot is None:
            self.make_room(entry.needed_bytes, keep=entry)
            self._store.load(entry)
        self.touch(entry)
        assert entry.slot is not None
        return entry.slot

    def touch(self, entry: Entry) -> None:
        """It was used or has grown."""
        self._recent[entry] = None
        self._recent.move_to_end(entry)
        entry.used_at_s = self._clock()
        self.count(entry)

    def count(self, entry: Entry) -> None:
        num_bytes = entry.slot.num_bytes if entry.slot is not None else 0
        self._entry_bytes += num_bytes - entry.counted_bytes
        entry.counted_bytes = num_bytes

    def change(self, entry: Entry) -> None:
        """Before the adapter in memory is changed: its file is no longer true."""
        self.cancel_spilling(entry)
        entry.changed = True
        entry.delete_file()

    def take_buffer(self, entry: Entry) -> torch.Tensor:
        """fp32 [num_params] of any content. Raises ``UnitError``."""
        num_params = entry.layout.num_params
        if not self.spares.has(num_params):
            self.make_room(4 * num_params, keep=entry)
        return self.spares.take(num_params)

    # ------------------------------------------------------------------ out

    def make_room(self, num_bytes: int, keep: Entry) -> None:
        """Frees memory until ``num_bytes`` more fit, sparing ``keep`` alone: one adapter is always
        served, whatever the budget. Raises ``UnitError`` where the disk refuses another one."""
        over = self.num_bytes + num_bytes - self._budget_bytes
        if over > 0:
            over -= self.spares.release(over)
        for entry in list(self._recent) if over > 0 else []:
            if entry is keep:
                continue
            over -= entry.counted_bytes
            try:
                self._evict(entry)
            except OSError as error:
                _log.error("an adapter cannot be put on disk: %s", error)
                raise UnitError(
                    "no memory for this adapter: another one cannot be put on disk "
                    f"({reason(error)})"
                ) from error
            if over <= 0:
                return

    def forget(self, entry: Entry) -> None:
        """Its memory and its file go at once."""
        self.cancel_spilling(entry)
        self._recent.pop(entry, None)
        entry.slot = None
        self.count(entry)
        entry.delete_file()

    def _evict(self, entry: Entry) -> None:
        """Raises ``OSError`` where it cannot be written; it then stays in memory."""
        if entry.changed:
            self.cancel_spilling(entry)
            for _ in self._store.write(entry):
                pass
        self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        assert entry.slot is not None
        assert not entry.changed
        entry.step = entry.slot.adam.step
        entry.slot = None
        del self._recent[entry]
        self.count(entry)

    # ------------------------------------------------------------------ when idle

    def tidy(self, busy: bool) -> float | None:
        """One small piece of work: spills what was not used for ``idle_spill_s``. With ``busy`` it
        takes no more than ``BUSY_SHARE`` of the time.

        Returns the seconds until there is more to do if nothing else happens; None: nothing.
        """
        now_s = self._clock()
        if now_s < self._paused_until_s:
            return self._paused_until_s - now_s
        self.spares.release_older(now_s - self._idle_spill_s)
        if self._spilling is None:
            oldest = next(iter(self._recent), None)
            if oldest is None or oldest.used_at_s + self._idle_spill_s > now_s:
                return self._idle_in_s(oldest, now_s)
            write = self._store.write(oldest) if oldest.changed else _nothing_to_write()
            self._spilling = _Spilling(oldest, write)
        pause_s = 0.0
        try:
            self._continue_spilling(self._spilling)
        except OSError as error:
            self._spilling = None
            pause_s = FAILED_PAUSE_S
            _log.error("an idle adapter stays in memory, it cannot be put on disk: %s", error)
        if busy:
            pause_s = max(pause_s, (self._clock() - now_s) * (1 / BUSY_SHARE - 1))
        self._paused_until_s = self._clock() + pause_s
        return pause_s

    def _continue_spilling(self, spilling: _Spilling) -> None:
        if next(spilling.write, _DONE) is _DONE:
            self._spilling = None
            self._leave(spilling.entry)

    def cancel_spilling(self, entry: Entry) -> None:
        """Before anything of it changes: a half written file holds what was."""
        if self._spilling is not None and self._spilling.entry is entry:
            self._spilling.write.close()
            self._spilling = None

    def _idle_in_s(self, oldest: Entry | None, now_s: float) -> float | None:
        times = [self.spares.oldest_at_s, oldest.used_at_s if oldest is not None else None]
        known = [time_s for time_s in times if time_s is not None]
        return max(min(known) + self._idle_spill_s - now_s, 0.0) if known else None

    def problems(self, entries: list[Entry]) -> list[str]:
        """What the books say wrongly, ``entries`` being all there are."""
        files = sorted(entry.file.path for entry in entries if entry.file is not None)
        checks = {
            "recently used": {each for each in entries if each.slot is not None}
            == set(self._recent),
            "bytes": self._entry_bytes
            == sum(each.slot.num_bytes for each in entries if each.slot is not None),
            "changed": not any(
                each.changed and (each.slot is None or each.file is not None) for each in entries
            ),
            "files": files == self._store.directory.files(),
        }
        return [name for name, holds in checks.items() if not holds]


_DONE = object()


def _nothing_to_write() -> Generator[None, None, None]:
    yield from ()
