"""Which adapters are in memory and which on disk: by a budget, and by how long they were not used.

Every way there and back keeps all bits. Knows entries, not slot numbers. Not thread-safe.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from training.config import EngineConfig
from training.core.errors import DamagedFile, UnitError
from training.engine.adapter import AdapterLayout, fresh_weights
from training.engine.buffers import GradientBuffers, new_flat
from training.engine.decoder import Decoder
from training.engine.slot import EXP_AVG, EXP_AVG_SQ, WEIGHTS, Slot
from training.engine.spill_files import SpillDirectory, SpillFile, open_for_writing, write_spill
from training.engine.state_files import SavedState

_log = logging.getLogger(__name__)

BUSY_SHARE = 0.02
"""Of the engine's time that spilling idle adapters may take from others' work."""
FAILED_PAUSE_S = 30.0
"""Until idle adapters are spilled again after a disk refused one."""
CPU = torch.device("cpu")


@dataclass(eq=False)
class Entry:
    """An adapter: in memory (``slot``), on disk (``file``), in both while memory has not changed
    since, or in neither: then it is what its seed gives.

    ``changed``: memory alone has the truth. ``step`` is that of an adapter on disk.
    """

    layout: AdapterLayout
    slot: Slot | None = None
    file: SpillFile | None = None
    changed: bool = False
    step: int = 0
    used_at_s: float = 0.0
    counted_bytes: int = 0


class _Spilling(NamedTuple):
    entry: Entry
    write: Generator[None, None, None]


class SlotMemory:
    """``clock`` in seconds; ``open_file`` opens spill files for writing."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        directory: SpillDirectory,
        clock: Callable[[], float] = time.monotonic,
        open_file: Callable[[Path], BinaryIO] = open_for_writing,
    ) -> None:
        self.spares = GradientBuffers(decoder.device, clock)
        self.lent_bytes = 0
        """Gradient buffers that a running unit holds."""
        self._decoder = decoder
        self._budget_bytes = config.adapter_memory_bytes
        self._idle_spill_s = config.idle_spill_s
        self._directory = directory
        self._clock = clock
        self._open_file = open_file
        self._recent: OrderedDict[Entry, None] = OrderedDict()  # in memory; last used last
        self._entry_bytes = 0
        self._spilling: _Spilling | None = None  # an idle one, chunk by chunk
        self._paused_until_s = 0.0

    @property
    def num_resident(self) -> int:
        return len(self._recent)

    @property
    def num_bytes(self) -> int:
        """Of adapters and their gradients, spare buffers included."""
        return self._entry_bytes + self.lent_bytes + self.spares.num_bytes

    # ------------------------------------------------------------------ in

    def bring(self, entry: Entry) -> Slot:
        """The adapter, read or made where it is not in memory. Raises ``UnitError``."""
        self.cancel_spilling(entry)
        if entry.slot is None:
            self.make_room(self._needed_bytes(entry), keep=entry)
            entry.slot = self._load(entry)
        self.touch(entry)
        return entry.slot

    def take_over(self, entry: Entry, saved: SavedState) -> None:
        """Fills a new entry. Raises ``UnitError``."""
        found = {WEIGHTS: saved.weights}
        if saved.adam is not None:
            found |= {EXP_AVG: saved.adam.exp_avg, EXP_AVG_SQ: saved.adam.exp_avg_sq}
        self.make_room(sum(each.nbytes for each in found.values()), keep=entry)
        # Copied, because what was read from a file lies in memory that is not given back.
        flats = {name: new_flat(each.numel(), CPU).copy_(each) for name, each in found.items()}
        entry.slot = self._new_slot(entry.layout, flats, saved.adam.step if saved.adam else 0)
        entry.changed = True
        self.touch(entry)

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
        self._delete_file(entry)

    def take_buffer(self, entry: Entry) -> torch.Tensor:
        """fp32 [num_params] of any content. Raises ``UnitError``."""
        num_params = entry.layout.num_params
        if not self.spares.has(num_params):
            self.make_room(4 * num_params, keep=entry)
        return self.spares.take(num_params)

    def _needed_bytes(self, entry: Entry) -> int:
        """With the adapter's own copy of the weights; in fp32 it computes on the masters."""
        num_params, dtype = entry.layout.num_params, self._decoder.dtype
        state = entry.file.num_bytes if entry.file is not None else 4 * num_params
        return state + (0 if dtype == torch.float32 else dtype.itemsize * num_params)

    def _load(self, entry: Entry) -> Slot:
        flats: dict[str, torch.Tensor] = {}

        def buffer_for(name: str, num_bytes: int) -> memoryview:
            flats[name] = new_flat(num_bytes // 4, CPU)
            return _bytes_of(flats[name])

        if entry.file is None:
            flats[WEIGHTS] = fresh_weights(entry.layout, new_flat(entry.layout.num_params, CPU))
        else:
            try:
                entry.file.read(buffer_for)
            except (DamagedFile, OSError) as error:
                _log.error("an adapter cannot be read back from disk: %s", error)
                raise UnitError(
                    f"the adapter was put on disk and cannot be read back ({_reason(error)}); "
                    "go on from its last checkpoint"
                ) from error
        return self._new_slot(entry.layout, flats, entry.step)

    def _new_slot(self, layout: AdapterLayout, flats: dict[str, torch.Tensor], step: int) -> Slot:
        moved = {name: flat.to(self._decoder.device) for name, flat in flats.items()}
        adapter = self._decoder.new_adapter(layout, moved[WEIGHTS], trainable=True)
        return Slot.of(moved, step, adapter)

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
                    f"({_reason(error)})"
                ) from error
            if over <= 0:
                return

    def forget(self, entry: Entry) -> None:
        """Its memory and its file go at once."""
        self.cancel_spilling(entry)
        self._recent.pop(entry, None)
        entry.slot = None
        self.count(entry)
        self._delete_file(entry)

    def _evict(self, entry: Entry) -> None:
        """Raises ``OSError`` where it cannot be written; it then stays in memory."""
        if entry.changed:
            self.cancel_spilling(entry)
            for _ in self._write(entry):
                pass
        self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        assert entry.slot is not None
        assert not entry.changed
        entry.step = entry.slot.adam.step
        entry.slot = None
        del self._recent[entry]
        self.count(entry)

    def _write(self, entry: Entry) -> Generator[None, None, None]:
        assert entry.slot is not None
        state = entry.slot.buffers()
        buffers = {name: _bytes_of(buffer.cpu()) for name, buffer in state.items()}
        path = self._directory.new_path()
        entry.file = yield from write_spill(path, buffers, self._open_file)
        entry.changed = False

    def _delete_file(self, entry: Entry) -> None:
        if entry.file is not None:
            entry.file.delete()
            entry.file = None

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
            write = self._write(oldest) if oldest.changed else _nothing_to_write()
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
            "files": files == self._directory.files(),
        }
        return [name for name, holds in checks.items() if not holds]


_DONE = object()


def _nothing_to_write() -> Generator[None, None, None]:
    yield from ()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _reason(error: Exception) -> str:
    """Without paths of ours: a client reads it."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
