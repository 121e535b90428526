"""Published adapter snapshots, and those of them that are in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from training.core.errors import UserError
from training.engine.adapter import Adapter


@dataclass(frozen=True)
class Snapshot:
    """One publication of an id: publishing the id again makes another ``version``."""

    snapshot_id: str
    directory: Path
    version: int


BASE_VERSION = 0
"""Version of the base model without an adapter."""


class AdapterStore:
    """Loads snapshots at first use and keeps those last used, up to ``capacity_bytes``.

    One that is evicted while requests run on it stays alive through them, and is never loaded a
    second time meanwhile.
    """

    def __init__(self, load: Callable[[Path], Adapter], capacity_bytes: int) -> None:
        self._load = load
        self._capacity_bytes = capacity_bytes
        self._num_bytes = 0
        self._published: dict[str, Snapshot] = {}
        self._recent: OrderedDict[int, Adapter] = OrderedDict()
        self._alive: WeakValueDictionary[int, Adapter] = WeakValueDictionary()
        self._last_version = BASE_VERSION

    def publish(self, snapshot_id: str, directory: Path) -> Snapshot | None:
        """Returns the snapshot that this one replaces."""
        replaced = self.retire(snapshot_id)
        self._last_version += 1
        self._published[snapshot_id] = Snapshot(snapshot_id, directory, self._last_version)
        return replaced

    def retire(self, snapshot_id: str) -> Snapshot | None:
        """Forgets the id, if known; returns what it stood for."""
        snapshot = self._published.pop(snapshot_id, None)
        if snapshot is not None:
            self._drop(snapshot.version)
        return snapshot

    def find(self, snapshot_id: str) -> Snapshot:
        """Raises ``UserError`` for an unknown id."""
        snapshot = self._published.get(snapshot_id)
        if snapshot is None:
            raise UserError(f"no weights are published as {snapshot_id!r}")
        return snapshot

    def is_published(self, snapshot: Snapshot | None) -> bool:
        """Whether later requests can use these weights; the base model's they always can."""
        return snapshot is None or self._published.get(snapshot.snapshot_id) == snapshot

    def adapter(self, snapshot: Snapshot) -> Adapter:
        """Raises ``UserError`` where the files are missing, damaged or do not fit the model."""
        adapter = self._alive.get(snapshot.version)
        if adapter is None:
            adapter = self._load(snapshot.directory)
            self._alive[snapshot.version] = adapter
        if self.is_published(snapshot):
            self._drop(snapshot.version)
            self._recent[snapshot.version] = adapter
            self._num_bytes += adapter.num_bytes
            while self._num_bytes > self._capacity_bytes:
                self._drop(next(iter(self._recent)))
        return adapter

    @property
    def num_cached(self) -> int:
        return len(self._recent)

    def _drop(self, version: int) -> None:
        adapter = self._recent.pop(version, None)
        if adapter is not None:
            self._num_bytes -= adapter.num_bytes
