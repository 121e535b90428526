"""Makes adapters from seeds, saved states and spill files, and writes the latter.

Knows nothing of how many there are or which should be where.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from training.backends.state_files import reason
from training.core.errors import BackendDead, DamagedFile, DeathCause
from training.engine.adapter import AdapterLayout, fresh_weights
from training.engine.buffers import new_flat
from training.engine.decoder import Decoder
from training.engine.slot import EXP_AVG, EXP_AVG_SQ, WEIGHTS, Slot
from training.engine.spill_files import SpillDirectory, SpillFile, open_for_writing, write_spill
from training.engine.state_files import SavedState

_log = logging.getLogger(__name__)
CPU = torch.device("cpu")


@dataclass(eq=False)
class Entry:
    """An adapter: in memory (``slot``), on disk (``file``), in both while memory has not changed
    since, or in neither: then it is what its seed gives.

    ``changed``: memory alone has the truth. ``step`` is that of an adapter on disk.
    ``adapter_bytes``: beside the masters, a guess before there was one.
    """

    layout: AdapterLayout
    adapter_bytes: int
    slot: Slot | None = None
    file: SpillFile | None = None
    changed: bool = False
    step: int = 0
    used_at_s: float = 0.0
    counted_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """To bring it into memory."""
        state = self.file.num_bytes if self.file is not None else 4 * self.layout.num_params
        return state + self.adapter_bytes

    def delete_file(self) -> None:
        if self.file is not None:
            self.file.delete()
            self.file = None


class SlotStore:
    """``open_file`` opens spill files for writing."""

    def __init__(
        self,
        decoder: Decoder,
        directory: SpillDirectory,
        open_file: Callable[[Path], BinaryIO] = open_for_writing,
    ) -> None:
        self.directory = directory
        self.device = decoder.device
        self._decoder = decoder
        self._open_file = open_file
        # In fp32 decoders need no copy of the weights.
        self._computes_on_masters = decoder.dtype == torch.float32

    def new_entry(self, layout: AdapterLayout) -> Entry:
        return Entry(layout, 0 if self._computes_on_masters else 4 * layout.num_params)

    def load(self, entry: Entry) -> None:
        """Fills ``entry.slot``. Raises ``UnitError`` where its file is not what was written."""
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
                # To the service as if the engine had died: it loads the model's last snapshot.
                raise BackendDead(
                    f"the adapter was put on disk and cannot be read back ({reason(error)})",
                    DeathCause.LOST,
                ) from error
        self._fill(entry, flats)

    def load_saved(self, entry: Entry, saved: SavedState) -> None:
        found = {WEIGHTS: saved.weights}
        if saved.adam is not None:
            found |= {EXP_AVG: saved.adam.exp_avg, EXP_AVG_SQ: saved.adam.exp_avg_sq}
            entry.step = saved.adam.step
        # Copied, because what was read from a file lies in memory that is not given back.
        flats = {name: new_flat(each.numel(), CPU).copy_(each) for name, each in found.items()}
        self._fill(entry, flats)
        entry.changed = True

    def _fill(self, entry: Entry, flats: dict[str, torch.Tensor]) -> None:
        moved = {name: flat.to(self.device) for name, flat in flats.items()}
        adapter = self._decoder.new_adapter(entry.layout, moved[WEIGHTS], trainable=True)
        entry.adapter_bytes = 0 if self._computes_on_masters else adapter.num_bytes
        entry.slot = Slot.of(moved, entry.step, adapter, entry.adapter_bytes)

    def write(self, entry: Entry) -> Generator[None, None, None]:
        """Yields after each chunk; at the end memory and file say the same. Raises ``OSError``."""
        assert entry.slot is not None
        state = entry.slot.buffers()
        buffers = {name: _bytes_of(buffer.cpu()) for name, buffer in state.items()}
        path = self.directory.new_path()
        entry.file = yield from write_spill(path, buffers, self._open_file)
        entry.changed = False


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
