"""The sampler's half of ``model.Transformer``: a paged KV cache of torch tensors and attention over
it by block tables.

Chunks of one row (decoding) are computed together, those of about one length in one batch: their
blocks are gathered side by side. Longer chunks (prefill) are computed one by one. Query heads that
share a kv head are the query "positions" of that head, so K and V are not repeated for decoding.

Shape legend: T packed rows, N heads, K kv heads, G = N / K, D head_dim, P blocks of the cache,
B tokens of a block, n sequences of a batch, m blocks of a sequence, L = m * B cells, t rows of a
chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from training.backends.base import Int32Array
from training.engine.adapter import Segment
from training.engine.decoder import BLOCK_TOKENS, Chunk
from training.engine.model_config import ModelConfig
from training.engine.torch_varlen import VarlenKernel, VarlenPagedAttention

Window = int | None
Masks = Mapping[Window, torch.Tensor]


class Attention(Protocol):
    """See ``model.Attention``."""

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor: ...


class HiddenStates(Protocol):
    """What is asked of the transformer."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def hidden(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        segments: Sequence[Segment],
        attention: Attention,
    ) -> torch.Tensor: ...


class TorchKvCache:
    """``k`` and ``v`` [layers, P, B, K, D]. Never holds NaN for long: masked cells are multiplied
    by zero."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        heads = (config.num_kv_heads, config.head_dim)
        shape = (config.num_layers, num_blocks, BLOCK_TOKENS, *heads)
        self.k = _zeros(shape, device, dtype)
        self.v = _zeros(shape, device, dtype)

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]

    def copy_block(self, source: int, destination: int) -> None:
        for tensor in (self.k, self.v):
            tensor[:, destination] = tensor[:, source]

    def clear(self, block: int) -> None:
        self.k[:, block] = 0
        self.v[:, block] = 0


def sampling_pass(
    model: HiddenStates,
    cache: TorchKvCache,
    tokens_T: Int32Array,
    chunks: Sequence[Chunk],
    segments: Sequence[Segment],
    varlen: VarlenKernel | None = None,
) -> torch.Tensor:
    """See ``decoder.Decoder.sampling_pass``. ``varlen`` attends in place of torch's kernels."""
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.num_rows for chunk in chunks])
    first_rows = np.cumsum(counts) - counts
    positions_T = np.arange(len(tokens_T)) + np.repeat(starts - first_rows, counts)
    blocks_T = np.concatenate(
        [
            chunk.blocks[chunk.start // BLOCK_TOKENS :].repeat(BLOCK_TOKENS)[
                chunk.start % BLOCK_TOKENS :
            ][: chunk.num_rows]
            for chunk in chunks
        ]
    )
    cells_T = blocks_T.astype(np.int64) * BLOCK_TOKENS + positions_T % BLOCK_TOKENS
    attention: Attention
    if varlen is None:
        attention = PagedAttention.of_chunks(model.config, cache, chunks, cells_T, model.device)
    else:
        attention = VarlenPagedAttention(model.config.windows, cache, chunks, varlen)
    return model.hidden(
        torch.from_numpy(tokens_T).to(model.device),
        torch.from_numpy(positions_T).to(model.device),
        segments,
        attention,
    )


@dataclass(frozen=True)
class _Batch:
    """Chunks of one row each: packed ``rows`` [n], block ``table`` [n, m]."""

    rows: torch.Tensor
    table: torch.Tensor
    masks: Masks


class _Span(NamedTuple):
    """One chunk of several rows: packed rows [``row``, ``row + num_rows``)."""

    row: int
    num_rows: int
    blocks: torch.Tensor
    masks: Masks


class PagedAttention:
    """The ``Attention`` of one forward pass; ``cells_T`` are the places of the rows' keys and
    values. Batches and spans cover the rows."""

    def __init__(
        self,
        windows: Sequence[Window],
        cache: TorchKvCache,
        cells_T: torch.Tensor,
        batches: Sequence[_Batch],
        spans: Sequence[_Span],
    ) -> None:
        self._windows = windows
        self._cache = cache
        self._cells_T = cells_T
        self._batches = batches
        self._spans = spans

    @classmethod
    def of_chunks(
        cls,
        config: ModelConfig,
        cache: TorchKvCache,
        chunks: Sequence[Chunk],
        cells_T: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        device: torch.device,
    ) -> PagedAttention:
        windows = set(config.windows)
        singles: dict[int, list[tuple[int, Chunk]]] = {}
        spans: list[_Span] = []
        row = 0
        for chunk in chunks:
            if chunk.num_rows == 1:
                # One batch for lengths within a factor of two: at most half of it is padding.
                singles.setdefault(_num_used(chunk).bit_length(), []).append((row, chunk))
            else:
                spans.append(_span(row, chunk, windows, device, cache.k.dtype))
            row += chunk.num_rows
        batches = [_batch(members, windows, device, cache.k.dtype) for members in singles.values()]
        return cls(config.windows, cache, torch.from_numpy(cells_T).to(device), batches, spans)

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        k_PBKD, v_PBKD = self._cache.k[layer], self._cache.v[layer]
        k_PBKD.flatten(0, 1).index_copy_(0, self._cells_T, k_TKD)
        v_PBKD.flatten(0, 1).index_copy_(0, self._cells_T, v_TKD)
        window = self._windows[layer]
        o_TND = torch.empty_like(q_TND)
        for batch in self._batches:
            o_nND = _attend_batch(batch, q_TND[batch.rows], k_PBKD, v_PBKD, window)
            o_TND.index_copy_(0, batch.rows, o_nND)
        for span in self._spans:
            rows = slice(span.row, span.row + span.num_rows)
            o_TND[rows] = _attend_span(span, q_TND[rows], k_PBKD, v_PBKD, window)
        return o_TND


def decoding_attention(
    config: ModelConfig,
    cache: TorchKvCache,
    positions_n: torch.Tensor,
    cells_n: torch.Tensor,
    table_nm: torch.Tensor,
) -> PagedAttention:
    """Of one row per sequence, all in one batch, from tensors on the device alone: nothing is read
    back, and no shape depends on what they hold."""
    rows = torch.arange(len(positions_n), device=positions_n.device)
    masks = _masks(positions_n[:, None], table_nm.shape[1], set(config.windows), cache.k.dtype)
    batch = _Batch(rows, table_nm, _over_heads(masks))
    return PagedAttention(config.windows, cache, cells_n, [batch], [])


def _num_used(chunk: Chunk) -> int:
    """Blocks that hold what the chunk's last row sees."""
    return (chunk.start + chunk.num_rows - 1) // BLOCK_TOKENS + 1


def _batch(
    members: Sequence[tuple[int, Chunk]],
    windows: set[Window],
    device: torch.device,
    dtype: torch.dtype,
) -> _Batch:
    used = [_num_used(chunk) for _, chunk in members]
    # Missing blocks repeat the sequence's own last one: what is masked must not be another's NaN.
    table = np.stack(
        [
            chunk.blocks[np.minimum(np.arange(max(used)), num - 1)]
            for (_, chunk), num in zip(members, used, strict=True)
        ]
    )
    positions_n1 = torch.tensor([[chunk.start] for _, chunk in members], device=device)
    masks = _masks(positions_n1, max(used), windows, dtype)
    return _Batch(
        torch.tensor([row for row, _ in members], device=device),
        torch.from_numpy(table).to(device=device, dtype=torch.int64),
        _over_heads(masks),
    )


def _over_heads(masks: Masks) -> Masks:
    """[n, L] -> [n, 1, 1, L]."""
    return {window: mask_nL[:, None, None] for window, mask_nL in masks.items()}


def _span(
    row: int, chunk: Chunk, windows: set[Window], device: torch.device, dtype: torch.dtype
) -> _Span:
    num_used = _num_used(chunk)
    positions_t1 = torch.arange(chunk.start, chunk.start + chunk.num_rows, device=device)[:, None]
    blocks = torch.from_numpy(chunk.blocks[:num_used].astype(np.int64)).to(device)
    masks = _masks(positions_t1, num_used, windows, dtype)
    return _Span(row, chunk.num_rows, blocks, masks)


def _masks(
    positions_t1: torch.Tensor, num_blocks: int, windows: set[Window], dtype: torch.dtype
) -> Masks:
    """Per window [t, L]: 0 where a query at its position sees the cell, -inf elsewhere."""
    cells_L = torch.arange(num_blocks * BLOCK_TOKENS, device=positions_t1.device)
    masks = {}
    for window in windows:
        seen_tL = cells_L <= positions_t1
        if window is not None:
            seen_tL &= cells_L > positions_t1 - window
        mask_tL = torch.zeros(seen_tL.shape, dtype=dtype, device=seen_tL.device)
        masks[window] = mask_tL.masked_fill_(~seen_tL, float("-inf"))
    return masks


def _attend_batch(
    batch: _Batch, q_nND: torch.Tensor, k_PBKD: torch.Tensor, v_PBKD: torch.Tensor, window: Window
) -> torch.Tensor:
    num_kv_heads, head_dim = k_PBKD.shape[2:]
    num = len(batch.rows)
    k_nKLD = k_PBKD[batch.table].view(num, -1, num_kv_heads, head_dim).transpose(1, 2)
    v_nKLD = v_PBKD[batch.table].view(num, -1, num_kv_heads, head_dim).transpose(1, 2)
    q_nKGD = q_nND.reshape(num, num_kv_heads, -1, head_dim)
    mask = batch.masks[window].expand(-1, 1, q_nKGD.shape[2], -1)
    o_nKGD = F.scaled_dot_product_attention(q_nKGD, k_nKLD, v_nKLD, attn_mask=mask)
    return o_nKGD.reshape(q_nND.shape)


def _attend_span(
    span: _Span, q_tND: torch.Tensor, k_PBKD: torch.Tensor, v_PBKD: torch.Tensor, window: Window
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q_tND.shape
    num_kv_heads = k_PBKD.shape[2]
    group = num_heads // num_kv_heads
    q_KGtD = q_tND.reshape(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_LKD, v_LKD = k_PBKD[span.blocks].flatten(0, 1), v_PBKD[span.blocks].flatten(0, 1)
    k_KGLD = k_LKD.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    v_KGLD = v_LKD.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    o_KGtD = F.scaled_dot_product_attention(q_KGtD, k_KGLD, v_KGLD, attn_mask=span.masks[window])
    return o_KGtD.permute(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy's zeros come from calloc: pages that are never used take no memory. torch.zeros
    # writes to all of them.
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
