"""Extents of finished sequences, kept so that later prompts can copy a common beginning."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from training.backends.base import Int32Array
from training.engine.kv_cache import Extent

MAX_ENTRIES = 256
"""Bounds the search, which compares a prompt with every entry of its weights."""


class Entry(NamedTuple):
    """``tokens`` int32: those whose keys and values lie in ``extent``, computed with the weights of
    ``version``."""

    version: int
    tokens: Int32Array
    extent: Extent


class Match(NamedTuple):
    """The first ``num_tokens`` cells from ``start`` on can be copied."""

    start: int
    num_tokens: int


class PrefixCache:
    """Owns the extents it is given until it hands them back for freeing."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, Entry] = OrderedDict()

    @property
    def extents(self) -> set[Extent]:
        return {entry.extent for entry in self._entries.values()}

    def put(self, entry: Entry) -> Extent | None:
        """Takes the entry as the most recent one; returns an extent to free where that is one too
        many."""
        self._entries[entry.extent.start] = entry
        return self.evict() if len(self._entries) > MAX_ENTRIES else None

    def find(self, version: int, tokens: Int32Array) -> Match | None:
        """The longest common beginning, and marks its entry as recently used."""
        best: Match | None = None
        for start, entry in self._entries.items():
            if entry.version != version:
                continue
            num_tokens = common_prefix(entry.tokens, tokens)
            if num_tokens > (best.num_tokens if best else 0):
                best = Match(start, num_tokens)
        if best is not None:
            self._entries.move_to_end(best.start)
        return best

    def evict(self) -> Extent | None:
        """Drops the least recently used entry; returns its extent to free."""
        return self._entries.popitem(last=False)[1].extent if self._entries else None

    def drop(self, version: int) -> list[Extent]:
        """Drops what was computed with these weights; returns the extents to free."""
        starts = [start for start, entry in self._entries.items() if entry.version == version]
        return [self._entries.pop(start).extent for start in starts]


def common_prefix(a: Int32Array, b: Int32Array) -> int:
    num = min(len(a), len(b))
    differ = np.flatnonzero(a[:num] != b[:num])
    return int(differ[0]) if len(differ) else num
