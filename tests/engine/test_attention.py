"""The written-out attention against torch's own kernels, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.engine.training_cases import relative_error
from training.engine.attention import (
    BLOCK_SCORES,
    KEPT_LENGTH,
    PackedAttention,
    causal_attention,
    fused_attention,
)

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_qkv(batch: int, length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> Qkv:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(batch, length, count, 16, generator=generator).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 5, 4000])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads"),
    [(1, 1, 2, 1), (3, 7, 4, 2), (2, 64, 4, 4), (2, 500, 6, 3), (1, 1500, 6, 2)],
)
def test_it_is_the_fused_attention(
    batch: int, length: int, heads: int, kv_heads: int, window: int | None
) -> None:
    qkv = random_qkv(batch, length, heads, kv_heads, torch.float32)
    do = torch.randn(batch, length, heads, 16)
    found, expected = causal_attention(*qkv, window), fused_attention(*qkv, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, qkv, do), torch.autograd.grad(expected, qkv, do), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


def test_both_longer_cases_take_several_blocks() -> None:
    """Guards the cases above: one keeps its probabilities, one computes them again."""
    assert BLOCK_SCORES < 2 * 6 * 500 * 500
    assert 500 <= KEPT_LENGTH < 1500


def test_without_gradients_it_is_bit_for_bit_the_same() -> None:
    qkv = random_qkv(2, 33, 4, 2, torch.bfloat16)
    with torch.no_grad():
        alone = causal_attention(*qkv, None)
    assert torch.equal(alone, causal_attention(*qkv, None))


def test_bfloat16_is_as_exact_as_the_fused_kernel() -> None:
    q, k, v = (each.detach() for each in random_qkv(4, 128, 4, 2, torch.bfloat16))
    exact = fused_attention(q.float(), k.float(), v.float(), None)
    ours = relative_error(causal_attention(q, k, v, None).float(), exact)
    theirs = relative_error(fused_attention(q, k, v, None).float(), exact)
    assert ours < 2 * theirs


def test_packed_sequences_do_not_see_each_other() -> None:
    lengths = [[5, 5, 9], [5, 1]]
    windows = [None, 3]
    attention = PackedAttention(lengths, windows)
    q, k, v = (each[0] for each in random_qkv(1, 25, 4, 2, torch.float32))
    for layer, window in enumerate(windows):
        found = attention(layer, q, k, v)
        row = 0
        for length in (5, 5, 9, 5, 1):
            rows = slice(row, row + length)
            expected = fused_attention(q[None, rows], k[None, rows], v[None, rows], window)[0]
            torch.testing.assert_close(found[rows], expected, atol=1e-5, rtol=1e-5)
            row += length
