"""Logprobs and the logits' gradient against double precision."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

Array = np.ndarray[Any, np.dtype[Any]]
SIZES = [1, 15, 16, 255, 257, 1000, 49155]
ROWS = 3
NAN, INFINITY = float("nan"), float("inf")


class Scores(NamedTuple):
    lse: Array
    logprobs: Array


def logits_of(vocab: int, rows: int = ROWS, scale: float = 3.0) -> Array:
    return np.random.default_rng(vocab).normal(5, scale, (rows, vocab)).astype(np.float32)


def targets_of(vocab: int, num_targets: int, rows: int = ROWS) -> Array:
    return np.random.default_rng(1).integers(0, vocab, (rows, num_targets)).astype(np.int32)


def at(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def score(kernels: ctypes.CDLL, logits: Array, targets: Array, ld: int | None = None) -> Scores:
    rows, num_targets = targets.shape
    lse, logprobs = np.zeros(rows), np.zeros(targets.shape, np.float32)
    stride = ctypes.c_ssize_t(ld or logits.shape[1])
    sizes = (rows, logits.shape[1], at(targets), num_targets)
    kernels.tc_target_rows(at(logits), stride, *sizes, at(lse), at(logprobs))
    return Scores(lse, logprobs)


def exact_logprobs(logits: Array, targets: Array) -> Array:
    all_of_them = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    return np.take_along_axis(all_of_them, targets.astype(np.int64), 1)


@pytest.mark.parametrize("vocab", SIZES)
def test_logprobs(kernels: ctypes.CDLL, vocab: int) -> None:
    logits, targets = logits_of(vocab), targets_of(vocab, 4)
    found = score(kernels, logits, targets)
    expected = exact_logprobs(logits, targets)
    np.testing.assert_allclose(found.logprobs, expected, rtol=1.2e-7, atol=2e-7)
    lse = torch.logsumexp(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(found.lse, lse, rtol=0, atol=2e-7)
    assert (found.logprobs <= 0).all()


def test_a_certain_token_has_logprob_zero(kernels: ctypes.CDLL) -> None:
    logits = np.full((1, 1000), -80, np.float32)
    logits[0, 321] = 30.1
    found = score(kernels, logits, np.array([[321]], np.int32))
    assert found.logprobs[0, 0] == 0


def test_a_row_depends_on_itself_alone(threads: ctypes.CDLL) -> None:
    logits, targets = logits_of(5000, 9), targets_of(5000, 2, 9)
    threads.tc_set_num_threads(2)
    together = score(threads, logits, targets)
    threads.tc_set_num_threads(1)
    for row in range(9):
        alone = score(threads, logits[row : row + 1].copy(), targets[row : row + 1])
        np.testing.assert_array_equal(alone.logprobs[0], together.logprobs[row])
    padded = np.full((9, 5008), NAN, np.float32)
    padded[:, :5000] = logits
    flat = np.zeros((9, 2), np.float32)
    lse = np.zeros(9)
    threads.tc_target_rows(
        at(padded), ctypes.c_ssize_t(5008), 9, 5000, at(targets), 2, at(lse), at(flat)
    )
    np.testing.assert_array_equal(flat, together.logprobs)


def test_impossible_tokens(kernels: ctypes.CDLL) -> None:
    logits, targets = logits_of(300, 1), np.array([[7, 8]], np.int32)
    logits[0, ::2] = -INFINITY
    logits[0, 8] = -INFINITY
    found = score(kernels, logits, targets).logprobs
    np.testing.assert_allclose(found, exact_logprobs(logits, targets), rtol=1e-6)
    assert found[0, 1] == -INFINITY


@pytest.mark.parametrize("place", [0, 100, 255, 299])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_damaged_rows_have_no_logprobs(kernels: ctypes.CDLL, value: float, place: int) -> None:
    logits, targets = logits_of(300), targets_of(300, 2)
    logits[1, place] = value
    found = score(kernels, logits, targets).logprobs
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_a_row_without_any_possible_token(kernels: ctypes.CDLL) -> None:
    logits = np.full((1, 300), -INFINITY, np.float32)
    assert np.isnan(score(kernels, logits, np.array([[3]], np.int32)).logprobs).all()


def exact_gradient(logits: Array, targets: Array, dlogprobs: Array) -> torch.Tensor:
    wide = torch.from_numpy(logits).double().requires_grad_()
    logprobs = torch.log_softmax(wide, -1).gather(1, torch.from_numpy(targets).long())
    (gradient,) = torch.autograd.grad(logprobs, wide, torch.from_numpy(dlogprobs).double())
    return gradient


class Gradients(NamedTuple):
    from_probabilities: torch.Tensor
    from_logits: torch.Tensor


def gradients(kernels: ctypes.CDLL, logits: Array, targets: Array, dlogprobs: Array) -> Gradients:
    found = score(kernels, logits, targets)
    both = Gradients(*(torch.zeros(logits.shape, dtype=torch.bfloat16) for _ in range(2)))
    vocab, num_targets = logits.shape[1], targets.shape[1]
    for row in range(len(logits)):
        mine = at(logits[row])
        lse = ctypes.c_double(found.lse[row])
        terms = (at(targets[row]), at(found.logprobs[row]), at(dlogprobs[row]), num_targets)
        kept = ctypes.c_void_p(both.from_probabilities[row].data_ptr())
        kernels.tc_store_probabilities(mine, lse, vocab, kept)
        kernels.tc_head_gradient(kept, vocab, *terms)
        out = ctypes.c_void_p(both.from_logits[row].data_ptr())
        kernels.tc_logits_gradient(mine, lse, vocab, *terms, out)
    return both


@pytest.mark.parametrize("num_targets", [1, 6, 100])
@pytest.mark.parametrize("vocab", SIZES)
def test_head_gradient(kernels: ctypes.CDLL, vocab: int, num_targets: int) -> None:
    """With 100 targets of a small vocabulary many stand twice."""
    logits, targets = logits_of(vocab), targets_of(vocab, num_targets)
    rng = np.random.default_rng(2)
    dlogprobs = rng.standard_normal((ROWS, num_targets), np.float32)
    exact = exact_gradient(logits, targets, dlogprobs)
    found = gradients(kernels, logits, targets, dlogprobs)
    noise = 1e-6 * np.abs(dlogprobs).sum()
    one_rounding, two_roundings = exact.abs() * 2**-8 + noise, exact.abs() * 2**-7 + noise
    assert ((found.from_logits.double() - exact).abs() <= one_rounding).all()
    assert ((found.from_probabilities.double() - exact).abs() <= two_roundings).all()


def test_the_gradient_of_a_confident_token(kernels: ctypes.CDLL) -> None:
    """1 - p is 2e-4 here; p rounded to bfloat16 is 1."""
    logits = np.zeros((1, 300), np.float32)
    logits[0, 42] = 14.2
    targets, dlogprobs = np.array([[42]], np.int32), np.array([[-1.0]], np.float32)
    exact = exact_gradient(logits, targets, dlogprobs)[0, 42].item()
    for found in gradients(kernels, logits, targets, dlogprobs):
        assert found[0, 42].item() == pytest.approx(exact, rel=2**-7)
