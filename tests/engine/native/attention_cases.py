"""The attention kernels called on packed sequences, and the same in plain fp32 torch.

Shape legend: T packed rows, N query heads, K key/value heads, D head size, L rows of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from training.engine.decoder import BLOCK_TOKENS
from training.engine.native import library

SPARE_BLOCKS = 3


class Shape(NamedTuple):
    """``window`` 0: none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    scale: float = 0.125

    @property
    def columns(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def split(self, qkv_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (
            part.reshape(len(part), -1, self.head_dim)
            for part in torch.split_with_sizes(qkv_TC, sizes, -1)
        )
        return q, k, v


class Rows(NamedTuple):
    """Rows of a batch: positions [``start``, ``start`` + ``num_rows``) of sequence ``sequence``."""

    sequence: int
    start: int
    num_rows: int


class Attended(NamedTuple):
    o: torch.Tensor
    lse: torch.Tensor


def _pointer(array: torch.Tensor | np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> object:
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous()
        return ctypes.c_void_p(array.data_ptr())
    return ctypes.c_void_p(array.ctypes.data)


class PagedAttention:
    """Some sequences whose blocks lie in random order in one layer of a cache.

    Cells that hold no key have random values of size ``stale``.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], seed: int = 0, stale: float = 100.0):
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.lengths = list(lengths)
        self.qkv = [
            torch.randn(length, shape.columns, generator=generator).bfloat16() for length in lengths
        ]
        per_sequence = [-(-length // BLOCK_TOKENS) for length in lengths]
        num_blocks = sum(per_sequence) + SPARE_BLOCKS
        order = torch.randperm(num_blocks, generator=generator).to(torch.int32).numpy()
        ends = np.cumsum(per_sequence)
        self.blocks = [order[end - n : end] for end, n in zip(ends, per_sequence, strict=True)]
        size = (num_blocks, shape.num_kv_heads, BLOCK_TOKENS * shape.head_dim)
        self.k = (torch.randn(size, generator=generator) * stale).bfloat16()
        self.v = (torch.randn(size, generator=generator) * stale).bfloat16()

    def whole(self) -> list[Rows]:
        return [Rows(i, 0, length) for i, length in enumerate(self.lengths)]

    def pack(self, rows: Sequence[Rows]) -> torch.Tensor:
        return torch.cat([self.qkv[r.sequence][r.start : r.start + r.num_rows] for r in rows])

    def _sequences(self, rows: Sequence[Rows]) -> tuple[object, int, object, list[object]]:
        first_row, first_block, entries = 0, 0, []
        for r in rows:
            entries.append([first_row, r.num_rows, r.start, first_block])
            first_row += r.num_rows
            first_block += len(self.blocks[r.sequence])
        table = np.array(entries, np.int32)
        blocks = np.concatenate([self.blocks[r.sequence] for r in rows]).astype(np.int32)
        return _pointer(table), len(entries), _pointer(blocks), [table, blocks]

    def _shape(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.array(self.shape[:4], np.int32)

    def store(self, rows: Sequence[Rows]) -> None:
        shape, qkv = self._shape(), self.pack(rows)
        table, num, blocks, _alive = self._sequences(rows)
        library.load().tc_store_keys_values(
            _pointer(shape),
            _pointer(qkv),
            ctypes.c_int64(self.shape.columns),
            table,
            num,
            blocks,
            _pointer(self.k),
            _pointer(self.v),
        )

    def attend(self, rows: Sequence[Rows]) -> Attended:
        """Of rows whose keys, and all earlier ones, are stored."""
        shape, qkv = self._shape(), self.pack(rows)
        table, num, blocks, _alive = self._sequences(rows)
        columns = self.shape.num_heads * self.shape.head_dim
        result = Attended(
            torch.full((len(qkv), columns), float("nan"), dtype=torch.bfloat16),
            torch.full((len(qkv), self.shape.num_heads), float("nan")),
        )
        library.load().tc_attend(
            _pointer(shape),
            ctypes.c_float(self.shape.scale),
            _pointer(qkv),
            ctypes.c_int64(self.shape.columns),
            table,
            num,
            blocks,
            _pointer(self.k),
            _pointer(self.v),
            _pointer(result.o),
            _pointer(result.lse),
        )
        return result

    def run(self, rows: Sequence[Rows]) -> Attended:
        self.store(rows)
        return self.attend(rows)

    def backward(self, rows: Sequence[Rows], attended: Attended, do: torch.Tensor) -> torch.Tensor:
        """Derivative with respect to the packed rows (whole sequences)."""
        shape, qkv = self._shape(), self.pack(rows)
        table, num, _blocks, _alive = self._sequences(rows)
        dqkv = torch.full_like(qkv, float("nan"))
        library.load().tc_attend_backward(
            _pointer(shape),
            ctypes.c_float(self.shape.scale),
            _pointer(qkv),
            ctypes.c_int64(self.shape.columns),
            table,
            num,
            _pointer(attended.o),
            _pointer(do),
            _pointer(attended.lse),
            _pointer(dqkv),
        )
        return dqkv


def reference(shape: Shape, qkv_LC: torch.Tensor) -> Attended:
    """One whole sequence in the dtype of ``qkv_LC``, differentiable."""
    q_LND, k_LKD, v_LKD = shape.split(qkv_LC)
    group = shape.num_heads // shape.num_kv_heads
    k_LND, v_LND = (x.repeat_interleave(group, dim=1) for x in (k_LKD, v_LKD))
    scores = torch.einsum("inD,jnD->nij", q_LND, k_LND) * shape.scale
    position = torch.arange(len(qkv_LC))
    distance = position[:, None] - position[None, :]
    hidden = distance < 0
    if shape.window:
        hidden |= distance >= shape.window
    scores = scores.masked_fill(hidden, -torch.inf)
    o = torch.einsum("nij,jnD->inD", scores.softmax(-1), v_LND)
    return Attended(o.flatten(1), scores.logsumexp(-1).T)
