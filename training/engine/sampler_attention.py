"""Attention of one sampler step over the KV cache.

Chunks of a single row (decoding) are computed together: those whose extents have one size and lie
near each other form a run, read as one strided view of the cache. Longer chunks (prefill) are
computed one by one, with a mask even where they begin the sequence: in bfloat16 on the CPU the
masked kernel gives a row the same bits whatever rows are beside it, the causal one does not. Query
heads that share a kv head are the query "positions" of that head, so K and V are never repeated.

Shape legend: T packed rows, N heads, K kv heads, G = N / K, D head_dim, n sequences of a run,
L cache tokens read, t rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from training.engine.kv_cache import Extent, KvCache
from training.engine.model_config import ModelConfig

MAX_GAP_TOKENS = 256
"""A run reads over foreign extents up to this long: cheaper than one more call per layer."""
LENGTH_MULTIPLE = 16
"""CUDA kernels want masks whose rows are aligned. No extent is smaller."""

Window = int | None
Masks = Mapping[Window, torch.Tensor | None]


class Chunk(NamedTuple):
    """Rows of one sequence at positions [``start``, ``start + num_rows``); before ``start``
    its extent holds keys and values."""

    extent: Extent
    start: int
    num_rows: int


@dataclass(frozen=True)
class Run:
    """Extents [``base``, ``base + n * size``), n in all; ``rows`` [n] of the packed batch, 0 for
    a foreign extent. ``own`` [m] are the places in the run that are not foreign and ``own_rows``
    [m] their rows; None where all are and the rows are the whole batch in order."""

    base: int
    size: int
    num_extents: int
    length: int
    rows: torch.Tensor
    own: torch.Tensor
    own_rows: torch.Tensor
    is_whole_batch: bool
    masks: Masks


@dataclass(frozen=True)
class Span:
    """One chunk of several rows: packed rows [``row``, ``row + num_rows``), reading L cells."""

    row: int
    num_rows: int
    base: int
    length: int
    masks: Masks


class StepAttention:
    """The ``Attention`` of one forward pass over ``chunks``, packed in their order.

    Rows after theirs are padding: they are neither stored nor attended to.
    """

    def __init__(
        self, config: ModelConfig, cache: KvCache, chunks: Sequence[Chunk], device: torch.device
    ) -> None:
        self._config = config
        self._cache = cache
        windows = set(config.windows)
        slots: list[int] = []
        singles: list[tuple[int, Chunk]] = []
        self._spans: list[Span] = []
        for chunk in chunks:
            first = chunk.extent.start + chunk.start
            row = len(slots)
            slots.extend(range(first, first + chunk.num_rows))
            if chunk.num_rows == 1:
                singles.append((row, chunk))
            else:
                self._spans.append(_span(row, chunk, windows, device, cache.k.dtype))
        self._slots_T = torch.tensor(slots, device=device)
        self._runs = [
            _run(members, len(slots), windows, device, cache.k.dtype)
            for members in group_runs(singles)
        ]

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        k_CKD, v_CKD = self._cache.k[layer], self._cache.v[layer]
        num_rows = len(self._slots_T)
        k_CKD.index_copy_(0, self._slots_T, k_TKD[:num_rows])
        v_CKD.index_copy_(0, self._slots_T, v_TKD[:num_rows])
        window = self._config.windows[layer]
        if len(self._runs) == 1 and self._runs[0].is_whole_batch and num_rows == len(q_TND):
            return _attend_run(self._runs[0], q_TND, k_CKD, v_CKD, window)
        o_TND = torch.zeros_like(q_TND)
        for run in self._runs:
            o_nND = _attend_run(run, q_TND[run.rows], k_CKD, v_CKD, window)
            o_TND.index_copy_(0, run.own_rows, o_nND[run.own])
        for span in self._spans:
            rows = slice(span.row, span.row + span.num_rows)
            o_TND[rows] = _attend_span(span, q_TND[rows], k_CKD, v_CKD, window)
        return o_TND


def group_runs(singles: Sequence[tuple[int, Chunk]]) -> list[list[tuple[int, Chunk]]]:
    """Splits (row, chunk) pairs into runs: one extent size, gaps of at most MAX_GAP_TOKENS."""
    ordered = sorted(singles, key=lambda each: (each[1].extent.size, each[1].extent.start))
    runs: list[list[tuple[int, Chunk]]] = []
    for row, chunk in ordered:
        last = runs[-1][-1][1].extent if runs else None
        if (
            last is not None
            and last.size == chunk.extent.size
            and chunk.extent.start - last.stop <= MAX_GAP_TOKENS
        ):
            runs[-1].append((row, chunk))
        else:
            runs.append([(row, chunk)])
    return runs


def _run(
    members: Sequence[tuple[int, Chunk]],
    num_rows: int,
    windows: set[Window],
    device: torch.device,
    dtype: torch.dtype,
) -> Run:
    base, size = members[0][1].extent
    num_extents = (members[-1][1].extent.stop - base) // size
    rows, lengths = [0] * num_extents, [1] * num_extents
    places = [(chunk.extent.start - base) // size for _, chunk in members]
    for place, (row, chunk) in zip(places, members, strict=True):
        rows[place], lengths[place] = row, chunk.start + 1
    own_rows = [row for row, _ in members]
    length = _round_up(max(lengths), size)
    lengths_n1 = torch.tensor(lengths, device=device)[:, None]
    cells_L = torch.arange(length, device=device)
    masks: dict[Window, torch.Tensor | None] = {}
    for window in windows:
        seen_nL = cells_L < lengths_n1
        if window is not None:
            seen_nL &= cells_L >= lengths_n1 - window
        masks[window] = (
            None
            if all(each == length for each in lengths) and (window is None or window >= length)
            else _additive(seen_nL, dtype)[:, None, None]
        )
    return Run(
        base,
        size,
        num_extents,
        length,
        torch.tensor(rows, device=device),
        torch.tensor(places, device=device),
        torch.tensor(own_rows, device=device),
        own_rows == list(range(num_rows)) and num_extents == num_rows,
        masks,
    )


def _span(
    row: int, chunk: Chunk, windows: set[Window], device: torch.device, dtype: torch.dtype
) -> Span:
    end = chunk.start + chunk.num_rows
    length = _round_up(end, chunk.extent.size)
    positions_t1 = torch.arange(chunk.start, end, device=device)[:, None]
    cells_L = torch.arange(length, device=device)
    masks: dict[Window, torch.Tensor | None] = {}
    for window in windows:
        seen_tL = cells_L <= positions_t1
        if window is not None:
            seen_tL &= cells_L > positions_t1 - window
        masks[window] = _additive(seen_tL, dtype)
    return Span(row, chunk.num_rows, chunk.extent.start, length, masks)


def _attend_run(
    run: Run, q_nND: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, window: Window
) -> torch.Tensor:
    num_kv_heads, head_dim = k_CKD.shape[1:]
    cells = slice(run.base, run.base + run.num_extents * run.size)
    shape = (run.num_extents, run.size, num_kv_heads, head_dim)
    k_nKLD = k_CKD[cells].view(shape)[:, : run.length].transpose(1, 2)
    v_nKLD = v_CKD[cells].view(shape)[:, : run.length].transpose(1, 2)
    q_nKGD = q_nND.reshape(run.num_extents, num_kv_heads, -1, head_dim)
    mask = run.masks[window]
    if mask is not None:
        mask = mask.expand(-1, 1, q_nKGD.shape[2], -1)
    o_nKGD = F.scaled_dot_product_attention(q_nKGD, k_nKLD, v_nKLD, attn_mask=mask)
    return o_nKGD.reshape(q_nND.shape)


def _attend_span(
    span: Span, q_tND: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, window: Window
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q_tND.shape
    num_kv_heads = k_CKD.shape[1]
    group = num_heads // num_kv_heads
    q_KGtD = q_tND.reshape(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    cells = slice(span.base, span.base + span.length)
    k_KGLD = k_CKD[cells].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    v_KGLD = v_CKD[cells].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    mask = span.masks[window]
    o_KGtD = F.scaled_dot_product_attention(q_KGtD, k_KGLD, v_KGLD, attn_mask=mask)
    return o_KGtD.permute(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def _round_up(length: int, size: int) -> int:
    return min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, size)
