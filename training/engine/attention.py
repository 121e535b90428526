"""Causal attention over packed sequences, for training.

On the CPU the products are written out: torch's flash kernel was measured at 64 ms for the backward
pass of 8 sequences of 128 tokens (9 heads, bfloat16, one core), the products below take 2 ms. On
other devices torch's fused kernel is used.

Shape legend: T rows of the batch, B sequences of one length L, N heads, K kv heads, G = N / K,
D head_dim; Q rows of a block of queries, S keys that a block sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from training.engine.packing import equal_length_runs

BLOCK_SCORES = 2**21
"""Scores computed at once: 4 MiB in bfloat16, about the processor's cache."""
KEPT_LENGTH = 512
"""Up to this length the backward pass finds the probabilities kept (they are then no more memory
than a layer's other activations); beyond it they are computed again."""


class PackedAttention:
    """Each sequence sees itself alone. ``lengths`` are those of the sequences in packed order, one
    list per segment.

    Neighbours of one length within a segment are computed as one batch, so what a segment gets
    does not depend on other segments; no sequence is padded. ``windows`` are the model's sliding
    windows by layer.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], windows: Sequence[int | None]) -> None:
        self.runs = [run for each in lengths for run in equal_length_runs(each)]
        self.windows = windows

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        outputs = []
        row = 0
        for length, count in self.runs:
            stop = row + length * count
            q, k, v = (
                packed[row:stop].view(count, length, *packed.shape[1:])
                for packed in (q_TND, k_TKD, v_TKD)
            )
            o_BLND = causal_attention(q, k, v, self.windows[layer])
            outputs.append(o_BLND.flatten(0, 1))
            row = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def causal_attention(
    q_BLND: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """``window``: how many positions a query sees, itself included; None sees all before it."""
    if q_BLND.device.type != "cpu":
        return fused_attention(q_BLND, k_BLKD, v_BLKD, window)
    if not torch.is_grad_enabled():
        return _forward(_arrange(q_BLND, k_BLKD, v_BLKD), window, keep=False)[0]
    o_BLND: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q_BLND, k_BLKD, v_BLKD, window
    )
    return o_BLND


def fused_attention(
    q_BLND: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, window: int | None
) -> torch.Tensor:
    """The same by torch's own kernels."""
    q, k, v = (each.transpose(1, 2) for each in (q_BLND, k_BLKD, v_BLKD))
    length = q.shape[2]
    if window is None or window >= length:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position
        mask_LL = (distance >= 0) & (distance < window)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, enable_gqa=True)
    return o.transpose(1, 2)


# --------------------------------------------------------------------------- written out


class _Arranged(NamedTuple):
    """Contiguous copies: ``q`` [B * K, G, L, D] scaled by 1 / sqrt(D), ``k``, ``v`` [B * K, L, D].

    The heads that share a kv head become rows of one product.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    num_sequences: int


class _Block(NamedTuple):
    """Queries [``start``, ``stop``) see keys [``first``, ``stop``)."""

    start: int
    stop: int
    first: int


def _arrange(q_BLND: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor) -> _Arranged:
    batch, length, num_heads, head_dim = q_BLND.shape
    num_kv_heads = k_BLKD.shape[2]
    q = q_BLND.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scaled = torch.mul(q.permute(0, 2, 3, 1, 4), 1 / math.sqrt(head_dim)).contiguous()
    k = k_BLKD.transpose(1, 2).reshape(batch * num_kv_heads, length, head_dim)
    v = v_BLKD.transpose(1, 2).reshape(batch * num_kv_heads, length, head_dim)
    return _Arranged(scaled.flatten(0, 1), k, v, batch)


def _restore(x: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[B * K, G, L, D] or [B * K, L, D] -> [B, L, heads, D]."""
    length, head_dim = x.shape[-2:]
    return x.reshape(num_sequences, -1, length, head_dim).transpose(1, 2)


def _blocks(arranged: _Arranged, window: int | None) -> Iterator[_Block]:
    """Blocks whose scores stay within ``BLOCK_SCORES``; a short sequence is one block."""
    rows, group, length, _ = arranged.q.shape
    size = max(16, BLOCK_SCORES // (rows * group * length))
    for start in range(0, length, size):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(start, min(start + size, length), first)


def _probabilities(arranged: _Arranged, block: _Block, window: int | None) -> torch.Tensor:
    """softmax(q k^T + mask) [B * K, G * Q, S]; the mask rides on the product."""
    q = _queries(arranged, block)
    k = arranged.k[:, block.first : block.stop]
    mask = _mask(block, window, arranged.q.shape[1], q)
    return torch.softmax(torch.baddbmm(mask, q, k.mT), -1)


def _queries(arranged: _Arranged, block: _Block) -> torch.Tensor:
    return arranged.q[:, :, block.start : block.stop].flatten(1, 2)


def _mask(block: _Block, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor:
    """0 or -inf, [G * Q, S], the same for each of the G heads."""
    queries = torch.arange(block.start, block.stop, device=like.device)
    keys = torch.arange(block.first, block.stop, device=like.device)
    distance = queries[:, None] - keys
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    return mask.repeat(group, 1)


def _forward(
    arranged: _Arranged, window: int | None, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """o [B, L, N, D] and, if asked for, each block's probabilities."""
    o = torch.empty_like(arranged.q)
    kept = []
    for block in _blocks(arranged, window):
        p = _probabilities(arranged, block, window)
        v = arranged.v[:, block.first : block.stop]
        part = torch.bmm(p, v).view(len(p), -1, block.stop - block.start, v.shape[2])
        o[:, :, block.start : block.stop] = part
        if keep:
            kept.append(p)
    return _restore(o, arranged.num_sequences), kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BLND: torch.Tensor,
        k_BLKD: torch.Tensor,
        v_BLKD: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        arranged = _arrange(q_BLND, k_BLKD, v_BLKD)
        o_BLND, kept = _forward(arranged, window, keep=q_BLND.shape[1] <= KEPT_LENGTH)
        ctx.save_for_backward(arranged.q, arranged.k, arranged.v, *kept)
        ctx.num_sequences, ctx.window = arranged.num_sequences, window
        return o_BLND

    @staticmethod
    def backward(ctx: Any, do_BLND: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        arranged = _Arranged(q, k, v, ctx.num_sequences)
        rows, group, length, head_dim = q.shape
        do = do_BLND.transpose(1, 2).reshape(rows, group, length, head_dim)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for number, block in enumerate(_blocks(arranged, ctx.window)):
            p = kept[number] if kept else _probabilities(arranged, block, ctx.window)
            keys = slice(block.first, block.stop)
            queries = slice(block.start, block.stop)
            do_block = do[:, :, queries].flatten(1, 2)
            dv[:, keys] += torch.bmm(p.mT, do_block)
            dp = torch.bmm(do_block, v[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq_block = torch.bmm(ds, k[:, keys]).view(rows, group, -1, head_dim)
            torch.mul(dq_block, 1 / math.sqrt(head_dim), out=dq[:, :, queries])
            dk[:, keys] += torch.bmm(ds.mT, _queries(arranged, block))
        restored = (_restore(each.to(q.dtype), ctx.num_sequences) for each in (dq, dk, dv))
        return *restored, None
