"""Attention kernels: against fp32 torch, and bit for bit against themselves in other company."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.engine.native.attention_cases import (
    Attended,
    PagedAttention,
    Rows,
    Shape,
    reference,
)
from training.engine.decoder import BLOCK_TOKENS

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = [
    Shape(9, 3, 64),
    Shape(4, 4, 32, scale=0.2),
    Shape(8, 2, 128),
    Shape(12, 1, 96),
    Shape(2, 2, 256, scale=0.0625),
    Shape(9, 3, 64, window=40),
    Shape(4, 4, 32, window=7),
    Shape(8, 2, 128, window=100),
]
RAGGED = [1, 5, 16, 31, 32, 33, 77, 200]
LONG = [600, 3, 1100]
"""The first and last are taken in several parts by the backward pass."""

# bf16 has 8 bits: rounding errs by 2^-9 at most, 0.29 of that in the root mean square.
TOLERANCE = 2.5e-3
GRADIENT_TOLERANCE = 4e-3


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


def same(left: Attended, right: Attended) -> bool:
    return same_bits(left.o, right.o) and same_bits(left.lse, right.lse)


def join(parts: list[Attended]) -> Attended:
    return Attended(torch.cat([p.o for p in parts]), torch.cat([p.lse for p in parts]))


def split(tensor: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    return torch.split_with_sizes(tensor, lengths)


def derivatives(rows: int, shape: Shape, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, shape.num_heads * shape.head_dim, generator=generator).bfloat16()


@pytest.fixture
def two_threads(threads: ctypes.CDLL) -> None:
    threads.tc_set_num_threads(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_exact_as_bf16_allows(shape: Shape) -> None:
    case = PagedAttention(shape, RAGGED)
    actual = case.run(case.whole())
    expected = join([reference(shape, qkv.float()) for qkv in case.qkv])
    assert relative_error(actual.o, expected.o) < TOLERANCE
    assert float((actual.lse - expected.lse).abs().max()) < 1e-5


def test_scores_far_apart() -> None:
    """Probabilities that underflow; the largest score far from zero."""
    shape = Shape(9, 3, 64, scale=8.0)
    case = PagedAttention(shape, [150])
    actual = case.run(case.whole())
    expected = reference(shape, case.qkv[0].double())
    assert relative_error(actual.o, expected.o) < TOLERANCE
    assert relative_error(actual.lse, expected.lse) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["ragged", "long"])
def test_backward_matches_autograd(shape: Shape, lengths: list[int]) -> None:
    case = PagedAttention(shape, lengths)
    rows = case.whole()
    qkv = case.pack(rows).float().requires_grad_()
    expected = join([reference(shape, part) for part in split(qkv, lengths)])
    do = derivatives(len(qkv), shape)
    expected.o.backward(do.float())  # type: ignore[no-untyped-call]
    assert qkv.grad is not None
    actual = case.backward(rows, case.run(rows), do)
    for got, want in zip(shape.split(actual), shape.split(qkv.grad), strict=True):
        assert relative_error(got, want) < GRADIENT_TOLERANCE


def test_a_lone_token_has_the_derivative_of_its_value_only() -> None:
    shape = Shape(9, 3, 64)
    case = PagedAttention(shape, [1])
    do = derivatives(1, shape)
    dq, dk, dv = shape.split(case.backward(case.whole(), case.run(case.whole()), do))
    assert relative_error(dv, do.float().view(1, 3, 3, 64).sum(2)) < GRADIENT_TOLERANCE
    assert max(float(dq.abs().max()), float(dk.abs().max())) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [[64, 64, 72], [1, 30, 2, 40, 127], [199, 1]])
def test_chunks_of_a_prompt_give_the_same_bits(shape: Shape, sizes: list[int]) -> None:
    whole = PagedAttention(shape, [200])
    expected = whole.run(whole.whole())
    case = PagedAttention(shape, [200])
    parts, start = [], 0
    for size in sizes:
        parts.append(case.run([Rows(0, start, size)]))
        start += size
    assert same(join(parts), expected)
    used = torch.from_numpy(case.blocks[0]).long()[: 200 // BLOCK_TOKENS]
    assert same_bits(case.k[used], whole.k[used])
    assert same_bits(case.v[used], whole.v[used])


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_gives_the_bits_of_a_prompt(shape: Shape) -> None:
    lengths = [70, 33, 97]
    case = PagedAttention(shape, lengths)
    expected = [part.o for part in (case.run([row]) for row in case.whole())]
    case = PagedAttention(shape, lengths)
    prompts = [Rows(i, 0, length - 20) for i, length in enumerate(lengths)]
    case.run(prompts)
    for step in range(20):
        rows = [Rows(i, length - 20 + step, 1) for i, length in enumerate(lengths)]
        decoded = case.run(rows).o
        for i, row in enumerate(rows):
            assert same_bits(decoded[i], expected[i][row.start])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["ragged", "long"])
def test_neighbours_change_no_bits(shape: Shape, lengths: list[int]) -> None:
    case = PagedAttention(shape, lengths)
    rows = case.whole()
    do = derivatives(sum(lengths), shape)
    together = case.run(rows)
    gradients = split(case.backward(rows, together, do), lengths)
    for i, row in enumerate(rows):
        alone = case.run([row])
        assert same_bits(alone.o, split(together.o, lengths)[i])
        assert same_bits(alone.lse, split(together.lse, lengths)[i])
        assert same_bits(case.backward([row], alone, split(do, lengths)[i]), gradients[i])


@pytest.mark.parametrize("stale", [0.0, 1.0, 1e30])
def test_cells_without_a_key_change_no_bits(stale: float) -> None:
    shape = Shape(9, 3, 64, window=90)
    clean, dirty = (PagedAttention(shape, RAGGED, stale=s) for s in (3.0, stale))
    assert same(clean.run(clean.whole()), dirty.run(dirty.whole()))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_threads_changes_no_bits(shape: Shape, threads: ctypes.CDLL) -> None:
    lengths = [150, 600, 40, 9]
    case = PagedAttention(shape, lengths)
    rows = case.whole()
    do = derivatives(sum(lengths), shape)
    several = case.run(rows)
    gradients = case.backward(rows, several, do)
    threads.tc_set_num_threads(1)
    case.k.zero_()
    case.v.zero_()
    single = case.run(rows)
    assert same(single, several)
    assert same_bits(case.backward(rows, single, do), gradients)


def test_layout_of_a_block() -> None:
    shape = Shape(2, 2, 64)
    case = PagedAttention(shape, [BLOCK_TOKENS])
    case.store(case.whole())
    _q, k_LKD, v_LKD = shape.split(case.qkv[0])
    block = int(case.blocks[0][0])
    keys = case.k[block].view(2, 2, 2, 16, 16, 2)  # K, tile, D / 32, pair, key, 2
    assert same_bits(
        keys.permute(1, 4, 0, 2, 3, 5).reshape(BLOCK_TOKENS, 2, 64).contiguous(), k_LKD.contiguous()
    )
    values = case.v[block].view(2, 4, 16, 16, 2)  # K, D / 16, pair of keys, d, 2
    assert same_bits(
        values.permute(2, 4, 0, 1, 3).reshape(BLOCK_TOKENS, 2, 64).contiguous(), v_LKD.contiguous()
    )


@pytest.mark.parametrize("window", [0, 2090])
def test_more_keys_than_one_span(window: int) -> None:
    """Over 2048 keys: maxima grow from span to span, 128 rows share their keys, queries see
    several parts of the backward pass."""
    shape = Shape(3, 1, 32, window=window, scale=1.0)
    case = PagedAttention(shape, [2300])
    case.qkv[0] *= torch.linspace(0.2, 2.0, 2300)[:, None].bfloat16()
    rows = case.whole()
    whole = case.run(rows)
    qkv = case.qkv[0].float().requires_grad_()
    expected = reference(shape, qkv)
    assert relative_error(whole.o, expected.o.detach()) < TOLERANCE
    do = derivatives(2300, shape)
    expected.o.backward(do.float())  # type: ignore[no-untyped-call]
    assert qkv.grad is not None
    for got, want in zip(
        shape.split(case.backward(rows, whole, do)), shape.split(qkv.grad), strict=True
    ):
        assert relative_error(got, want) < 2 * GRADIENT_TOLERANCE
    chunked = PagedAttention(shape, [2300], stale=1.0)
    chunked.qkv = case.qkv
    sizes, start, parts = [1000, 1030, 100, 1, 1, 168], 0, []
    for size in sizes:
        parts.append(chunked.run([Rows(0, start, size)]))
        start += size
    assert same(join(parts), whole)
