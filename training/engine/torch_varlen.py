"""Attention over sequences of any lengths packed one after another, by one kernel call.

For CUDA in bfloat16: torch's flash kernel. It reads no paged cache of ours (its own pages are
multiples of 256 tokens, our blocks have 32), so the sampler gathers keys and values first.

Written without a GPU at hand: the kernel itself has never run here (``torch_probe`` tries it
before it is used), everything around it has, with ``plain_varlen`` in its place.

Shape legend: T query rows of all sequences, S key rows, n sequences, N heads, K kv heads,
D head_dim; Q and L those of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from training.backends.base import Int32Array
from training.engine.decoder import BLOCK_TOKENS, Chunk


class Jagged:
    """How rows belong to sequences. The last query of a sequence is at its last key's position."""

    def __init__(
        self, num_queries: Sequence[int], num_keys: Sequence[int], device: torch.device
    ) -> None:
        self.num_queries = list(num_queries)
        self.num_keys = list(num_keys)
        self.query_starts = _starts(num_queries, device)
        self.key_starts = _starts(num_keys, device)


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [n + 1]."""
    starts: Int32Array = np.cumsum([0, *lengths], dtype=np.int32)
    return torch.from_numpy(starts).to(device)


class VarlenKernel(Protocol):
    def __call__(
        self,
        q_TND: torch.Tensor,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        jagged: Jagged,
        window: int | None,
    ) -> torch.Tensor:
        """o [T, N, D], causal; ``window``: how many positions a query sees, itself included."""


def flash_varlen(
    q_TND: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    jagged: Jagged,
    window: int | None,
) -> torch.Tensor:
    """Raises where this torch, dtype, head size or device has no such kernel."""
    from torch.nn.attention.varlen import varlen_attn  # younger than the oldest torch we take

    o_TND = varlen_attn(
        q_TND,
        k_SKD,
        v_SKD,
        jagged.query_starts,
        jagged.key_starts,
        max(jagged.num_queries),
        max(jagged.num_keys),
        # Flash counts the positions before a query, not the query itself.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        # Keys are never split: how they would be depends on the longest sequence of the batch.
        num_splits=1,
    )
    assert isinstance(o_TND, torch.Tensor)
    return o_TND


def plain_varlen(
    q_TND: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    jagged: Jagged,
    window: int | None,
) -> torch.Tensor:
    """The same one sequence after another, on any device and in any dtype: what the fast kernel is
    compared with."""
    parts = zip(
        torch.split(q_TND, jagged.num_queries),
        torch.split(k_SKD, jagged.num_keys),
        torch.split(v_SKD, jagged.num_keys),
        strict=True,
    )
    return torch.cat([_attend(q, k, v, window) for q, k, v in parts])


def _attend(
    q_QND: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, window: int | None
) -> torch.Tensor:
    keys_L = torch.arange(len(k_LKD), device=q_QND.device)
    distance_QL = keys_L[len(k_LKD) - len(q_QND) :, None] - keys_L
    seen_QL = distance_QL >= 0
    if window is not None:
        seen_QL &= distance_QL < window
    q, k, v = (each.transpose(0, 1)[None] for each in (q_QND, k_LKD, v_LKD))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_QL, enable_gqa=True)
    return o[0].transpose(0, 1)


class VarlenAttention:
    """``model.Attention`` of a training pass: each sequence sees itself alone."""

    def __init__(
        self,
        lengths: Sequence[int],
        windows: Sequence[int | None],
        kernel: VarlenKernel,
        device: torch.device,
    ) -> None:
        self._jagged = Jagged(lengths, lengths, device)
        self._windows = windows
        self._kernel = kernel

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        return self._kernel(q_TND, k_TKD, v_TKD, self._jagged, self._windows[layer])


class Cells(Protocol):
    """``torch_sampling.TorchKvCache``: ``k`` and ``v`` [layers, P, B, K, D]."""

    k: torch.Tensor
    v: torch.Tensor


class VarlenPagedAttention:
    """``model.Attention`` of a sampling pass over ``chunks``, packed in their order: prompts and
    decoding rows in one call, without padding."""

    def __init__(
        self,
        windows: Sequence[int | None],
        cache: Cells,
        chunks: Sequence[Chunk],
        kernel: VarlenKernel,
    ) -> None:
        device = cache.k.device
        seen = [_cells(chunk) for chunk in chunks]
        new = [cells[chunk.start :] for cells, chunk in zip(seen, chunks, strict=True)]
        self._seen_S = torch.from_numpy(np.concatenate(seen)).to(device)
        self._new_T = torch.from_numpy(np.concatenate(new)).to(device)
        self._jagged = Jagged([len(each) for each in new], [len(each) for each in seen], device)
        self._windows = windows
        self._cache = cache
        self._kernel = kernel

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        k_CKD, v_CKD = self._cache.k[layer].flatten(0, 1), self._cache.v[layer].flatten(0, 1)
        k_CKD.index_copy_(0, self._new_T, k_TKD)
        v_CKD.index_copy_(0, self._new_T, v_TKD)
        k_SKD, v_SKD = k_CKD[self._seen_S], v_CKD[self._seen_S]
        return self._kernel(q_TND, k_SKD, v_SKD, self._jagged, self._windows[layer])


def _cells(chunk: Chunk) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Places in the cache of all positions that the chunk's last row sees."""
    positions = np.arange(chunk.start + chunk.num_rows, dtype=np.int64)
    return chunk.blocks[positions // BLOCK_TOKENS] * np.int64(BLOCK_TOKENS) + (
        positions % BLOCK_TOKENS
    )
