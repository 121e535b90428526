"""Memory of the KV cache: who owns which tokens (``ExtentPool``) and the tensors (``KvCache``).

A sequence owns one contiguous extent whose size is a power of two, aligned to its size (a buddy
system). So extents of one size that lie side by side are a plain strided view [n, size, K, D] of
the cache, and attention over many sequences needs no gather and no copy of K or V.

Shape legend: C cache tokens, K kv heads, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from training.engine.model_config import ModelConfig

MIN_EXTENT_TOKENS = 16


class Extent(NamedTuple):
    """Cache tokens [``start``, ``start + size``)."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


def extent_size(num_tokens: int) -> int:
    """The smallest extent that holds ``num_tokens``."""
    size = MIN_EXTENT_TOKENS
    while size < num_tokens:
        size *= 2
    return size


class ExtentPool:
    """Buddy allocator over ``num_tokens`` cache tokens, rounded down to whole minimal extents.

    Of the free extents the smallest that fits is split, the lowest address first: extents of one
    size gather side by side, where attention reads them together.
    """

    def __init__(self, num_tokens: int) -> None:
        if num_tokens < MIN_EXTENT_TOKENS:
            raise ValueError(f"a KV cache needs at least {MIN_EXTENT_TOKENS} tokens")
        self.num_tokens = num_tokens // MIN_EXTENT_TOKENS * MIN_EXTENT_TOKENS
        self._roots = _aligned_roots(self.num_tokens)
        self._free: dict[int, set[int]] = {}
        for root in self._roots:
            self._free.setdefault(root.size, set()).add(root.start)
        self._owned: dict[int, int] = {}

    @property
    def available(self) -> int:
        """Free tokens, perhaps in pieces."""
        return sum(size * len(starts) for size, starts in self._free.items())

    @property
    def largest_extent(self) -> int:
        """The size of the largest extent of an empty pool."""
        return self._roots[0].size

    def can_allocate(self, num_tokens: int) -> bool:
        return self._best_fit(extent_size(num_tokens)) is not None

    def allocate(self, num_tokens: int) -> Extent:
        """Raises ``MemoryError`` where ``can_allocate`` says no."""
        size = extent_size(num_tokens)
        found = self._best_fit(size)
        if found is None:
            raise MemoryError(f"no free extent of {size} tokens")
        start = min(self._free[found])
        self._take(start, found)
        self._owned[start] = size
        while found > size:  # the lower half is kept, the upper one becomes free
            found //= 2
            self._free.setdefault(found, set()).add(start + found)
        return Extent(start, size)

    def free(self, extent: Extent) -> None:
        """Merges the extent with its free buddies."""
        self._disown(extent)
        start, size = extent
        while (start ^ size) in self._free.get(size, ()):
            self._take(start ^ size, size)
            start, size = min(start, start ^ size), size * 2
        self._free.setdefault(size, set()).add(start)

    def shrink(self, extent: Extent, num_tokens: int) -> Extent:
        """Gives back the upper part that ``num_tokens`` do not need."""
        size = extent_size(num_tokens)
        if size >= extent.size:
            return extent
        self._disown(extent)
        self._owned[extent.start] = size
        half = extent.size
        while half > size:
            half //= 2
            self._free.setdefault(half, set()).add(extent.start + half)
        return Extent(extent.start, size)

    def grow(self, extent: Extent) -> Extent | None:
        """Doubles the extent in place, keeping its start; None where its upper buddy is taken."""
        start, size = extent
        if start & size or (start ^ size) not in self._free.get(size, ()):
            return None
        self._disown(extent)
        self._take(start ^ size, size)
        self._owned[start] = size * 2
        return Extent(start, size * 2)

    def check_integrity(self, expected: set[Extent]) -> None:
        """Raises ``RuntimeError`` unless exactly ``expected`` is owned and the rest is free."""
        owned = {Extent(start, size) for start, size in self._owned.items()}
        if owned != expected:
            raise RuntimeError(f"extents {sorted(owned ^ expected)} are owned wrongly")
        free = {Extent(start, size) for size, starts in self._free.items() for start in starts}
        position = 0
        for start, size in sorted(owned | free):
            if start != position or start % size:
                raise RuntimeError(f"extent {start}+{size} is out of place: expected {position}")
            position += size
        if position != self.num_tokens:
            raise RuntimeError(f"{self.num_tokens - position} cache tokens are lost")
        for start, size in free:
            if Extent(start ^ size, size) in free and Extent(start, size) not in self._roots:
                raise RuntimeError(f"free extent {start}+{size} was not merged with its buddy")

    def _best_fit(self, size: int) -> int | None:
        return min(
            (each for each, starts in self._free.items() if each >= size and starts), default=None
        )

    def _take(self, start: int, size: int) -> None:
        self._free[size].remove(start)

    def _disown(self, extent: Extent) -> None:
        if self._owned.get(extent.start) != extent.size:
            raise RuntimeError(f"{extent} is not owned")
        del self._owned[extent.start]


def _aligned_roots(num_tokens: int) -> list[Extent]:
    """Powers of two, largest first, that sum to ``num_tokens``: each start is aligned."""
    roots, start = [], 0
    for bit in reversed(range(num_tokens.bit_length())):
        if num_tokens & (1 << bit):
            roots.append(Extent(start, 1 << bit))
            start += 1 << bit
    return roots


class KvCache:
    """``k`` and ``v`` [layers, C, K, D]. Never holds NaN: masked cells are multiplied by zero."""

    def __init__(
        self, config: ModelConfig, num_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, num_tokens, config.num_kv_heads, config.head_dim)
        self.k = _zeros(shape, device, dtype)
        self.v = _zeros(shape, device, dtype)

    def copy_prefix(self, source: int, destination: int, num_tokens: int) -> None:
        """Copies ``num_tokens`` cells; the two ranges must not overlap."""
        for tensor in (self.k, self.v):
            tensor[:, destination : destination + num_tokens] = tensor[
                :, source : source + num_tokens
            ]

    def clear(self, extent: Extent) -> None:
        """Zeros cells that may hold NaN, before somebody else owns them."""
        self.k[:, extent.start : extent.stop] = 0
        self.v[:, extent.start : extent.stop] = 0


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy's zeros come from calloc: pages that are never used take no memory. torch.zeros
    # writes to all of them.
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
