"""Memory for what belongs to one tenant: its own pages, which go back to the system when freed.

The engine's allocator keeps what is freed (``backends/child.py`` says why). Right for activations,
wrong for adapters: a tenant that is spilled to disk must not go on costing memory.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

SMALLEST_MAPPING_BYTES = 1 << 20
"""Smaller buffers are left to torch's allocator: a mapping is at least a page and a system call."""


def new_flat(
    num_params: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeros [num_params]. On a CPU large ones lie in a mapping that ends with their last view.

    Huge pages, because a buffer is nearly always written whole at once: filling 45 MB took 8 ms
    with them and 15 ms without.
    """
    num_bytes = num_params * dtype.itemsize
    if device.type != "cpu" or num_bytes < SMALLEST_MAPPING_BYTES:
        return torch.zeros(num_params, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def converted(flat: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """``flat`` itself where it is so already, else a copy in memory as of ``new_flat``."""
    if flat.dtype == dtype and flat.device == device:
        return flat
    return new_flat(flat.numel(), device, dtype).copy_(flat)


class _Spare(NamedTuple):
    given_at_s: float
    buffer: torch.Tensor


class GradientBuffers:
    """fp32 buffers that are used again and again: each step of a tenant needs one or two, and the
    pages of a fresh one take longer to fault in than its gradient to add.

    The last one given is the first taken, so that those too many grow old and can be told apart.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._spares: list[_Spare] = []

    @property
    def num_bytes(self) -> int:
        return sum(spare.buffer.nbytes for spare in self._spares)

    def has(self, num_params: int) -> bool:
        return any(spare.buffer.numel() == num_params for spare in self._spares)

    def take(self, num_params: int) -> torch.Tensor:
        """[num_params] of any content."""
        for index in reversed(range(len(self._spares))):
            if self._spares[index].buffer.numel() == num_params:
                return self._spares.pop(index).buffer
        return new_flat(num_params, self._device)

    def give(self, buffer: torch.Tensor) -> None:
        """The caller keeps no view of it."""
        self._spares.append(_Spare(self._clock(), buffer))

    def release(self, num_bytes: int) -> int:
        """Frees the oldest until ``num_bytes`` are freed or none is left; returns how many were."""
        freed = 0
        while self._spares and freed < num_bytes:
            freed += self._spares.pop(0).buffer.nbytes
        return freed

    def release_older(self, than_s: float) -> None:
        self._spares = [spare for spare in self._spares if spare.given_at_s > than_s]

    @property
    def oldest_at_s(self) -> float | None:
        return self._spares[0].given_at_s if self._spares else None
