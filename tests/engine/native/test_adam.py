"""AdamW and the global norm against torch's."""

from __future__ import annotations

import ctypes

import pytest
import torch

from training.backends.base import MAX_STEP_NORM, AdamParams
from training.engine.native import library
from training.engine.native.optimizer import NativeAdam
from training.engine.optimizer import AdamState, TorchAdam, adamw_step

SIZES = [1, 16, 17, 40_000, 100_003]


def random(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def norm(kernels: ctypes.CDLL, values: torch.Tensor) -> float:
    kernels.tc_global_norm.restype = ctypes.c_double
    found: float = kernels.tc_global_norm(at(values), ctypes.c_int64(len(values)))
    return found


class Adam:
    def __init__(
        self,
        kernels: ctypes.CDLL,
        weights: torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        self.kernels, self.weights = kernels, weights.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        self.hyper = (1e-3, *betas, 1e-8, weight_decay)
        self.steps = 0

    def step(self, gradient: torch.Tensor, scale: float = 1.0) -> None:
        self.steps += 1
        self.kernels.tc_adamw_step(
            *(at(each) for each in (self.weights, self.exp_avg, self.exp_avg_sq, gradient)),
            len(gradient),
            ctypes.byref(library.AdamStep(self.steps, *self.hyper, scale)),
        )


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.999), (0.0, 0.0)])
@pytest.mark.parametrize("count", SIZES)
def test_steps_are_those_of_torch(
    kernels: ctypes.CDLL, count: int, betas: tuple[float, float]
) -> None:
    ours = Adam(kernels, random(count, 0), betas)
    theirs = random(count, 0)
    optimizer = torch.optim.AdamW(
        [theirs], lr=1e-3, betas=betas, eps=1e-8, weight_decay=0.1, fused=True
    )
    for step in range(5):
        gradient = random(count, step + 1, 10.0 ** (step - 3))
        kept = gradient.clone()
        ours.step(gradient)
        assert torch.equal(gradient, kept)
        theirs.grad = kept
        optimizer.step()
    state = optimizer.state[theirs]
    torch.testing.assert_close(ours.weights, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.exp_avg, state["exp_avg"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.exp_avg_sq, state["exp_avg_sq"], rtol=1e-6, atol=1e-30)


def test_clipping_scales_the_gradient(kernels: ctypes.CDLL) -> None:
    scaled, plain = (Adam(kernels, random(1000, 0)) for _ in range(2))
    gradient = random(1000, 1)
    scaled.step(gradient, 0.25)
    plain.step(gradient * 0.25)
    assert torch.equal(scaled.weights, plain.weights)
    assert torch.equal(scaled.exp_avg_sq, plain.exp_avg_sq)


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
@pytest.mark.parametrize("clip", [0.0, MAX_STEP_NORM])
@pytest.mark.usefixtures("kernels")
def test_the_largest_gradient_that_is_taken_leaves_finite_moments(
    beta2: float, clip: float
) -> None:
    for arithmetic in (NativeAdam(), TorchAdam()):
        weights = torch.zeros(20)
        state = AdamState.zeros_like(weights)
        params = AdamParams(0.1, beta2=beta2, grad_clip_norm=clip)
        for _ in range(3):
            gradient = torch.zeros(20)
            gradient[3] = 3e38 if clip else MAX_STEP_NORM * 0.999999
            assert adamw_step(weights, gradient, state, params, arithmetic).error is None
        assert state.exp_avg_sq.isfinite().all()
        before = weights.clone()
        assert adamw_step(weights, torch.ones(20), state, params, arithmetic).error is None
        assert not torch.equal(weights, before)
        gradient[3] = MAX_STEP_NORM * 1.000001
        refused = adamw_step(weights, gradient, state, AdamParams(0.1), arithmetic)
        assert "too large" in (refused.error or "")
        assert state.step == 4


def test_a_zero_gradient_decays_and_no_more(kernels: ctypes.CDLL) -> None:
    adam = Adam(kernels, random(1000, 0))
    adam.step(torch.zeros(1000))
    torch.testing.assert_close(adam.weights, random(1000, 0) * (1 - 1e-4), rtol=1e-6, atol=0)


def test_the_number_of_threads_changes_nothing(threads: ctypes.CDLL) -> None:
    results = []
    for count in (1, 2):
        threads.tc_set_num_threads(count)
        adam = Adam(threads, random(300_001, 0))
        adam.step(random(300_001, 1))
        results.append((adam.weights, norm(threads, adam.weights)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("count", SIZES)
def test_norm(kernels: ctypes.CDLL, count: int, scale: float) -> None:
    """At 1e30 and 1e-30 an fp32 square would be infinity or zero."""
    values = random(count, 3, scale)
    exact = torch.linalg.vector_norm(values.double()).item()
    assert norm(kernels, values) == pytest.approx(exact, rel=1e-13)


def test_norm_of_nothing(kernels: ctypes.CDLL) -> None:
    assert norm(kernels, torch.zeros(0)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 40_000, 100_002])
def test_norm_shows_what_is_not_finite(kernels: ctypes.CDLL, value: float, place: int) -> None:
    values = random(100_003, 0)
    values[place] = value
    assert not torch.tensor(norm(kernels, values)).isfinite()
