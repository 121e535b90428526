"""AdamW against torch's plain implementation, and its refusals."""

from __future__ import annotations

import pytest
import torch

from training.backends.base import AdamParams
from training.engine.native.build import BuildError
from training.engine.native.optimizer import NativeAdam
from training.engine.optimizer import AdamArithmetic, AdamState, TorchAdam, adamw_step


@pytest.fixture(params=[TorchAdam, NativeAdam])
def adam(request: pytest.FixtureRequest) -> AdamArithmetic:
    try:
        arithmetic: AdamArithmetic = request.param()
    except BuildError as error:
        pytest.skip(f"no native kernels: {error}")
    return arithmetic


STEPS = [
    AdamParams(1e-2, 0.9, 0.95, 1e-12, 0.1),
    AdamParams(3e-3, 0.8, 0.99, 1e-8, 0.0),
    AdamParams(1e-2, 0.0, 0.5, 1e-4, 0.3, grad_clip_norm=0.5),
    AdamParams(1e-2, grad_clip_norm=1e6),
    AdamParams(0.0),
]


def test_steps_are_those_of_torch(adam: AdamArithmetic) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1003, generator=generator)
    state = AdamState.zeros_like(weights)
    reference = torch.nn.Parameter(weights.double().clone())
    optimizer = torch.optim.AdamW([reference], foreach=False, fused=False)
    for number, params in enumerate(STEPS, start=1):
        gradient = torch.randn(1003, generator=generator)
        reference.grad = gradient.double()
        norm = reference.grad.norm().item()
        if params.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([reference], params.grad_clip_norm)
        for group in optimizer.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        optimizer.step()

        output = adamw_step(weights, gradient, state, params, adam)

        assert output.error is None
        assert output.metrics == {
            "grad_norm": pytest.approx(norm, rel=1e-6),
            "optimizer_step": number,
        }
        torch.testing.assert_close(weights.double(), reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, adam: AdamArithmetic) -> None:
    weights, gradient = torch.ones(5), torch.ones(5)
    gradient[3] = bad
    state = AdamState(torch.ones(5), torch.ones(5), 7)
    output = adamw_step(weights, gradient, state, AdamParams(0.1), adam)
    assert output.error is not None
    assert "not finite" in output.error
    assert state.step == 7
    for tensor in (weights, state.exp_avg, state.exp_avg_sq):
        assert torch.equal(tensor, torch.ones(5))


@pytest.mark.parametrize(
    "params",
    [AdamParams(-1.0), AdamParams(float("nan")), AdamParams(beta1=1.0), AdamParams(eps=-1.0)],
)
def test_parameters_out_of_range_are_refused(params: AdamParams, adam: AdamArithmetic) -> None:
    weights = torch.ones(5)
    state = AdamState.zeros_like(weights)
    output = adamw_step(weights, torch.ones(5), state, params, adam)
    assert output.error is not None
    assert "Invalid" in output.error
    assert state.step == 0
    assert torch.equal(weights, torch.ones(5))


def test_a_huge_gradient_has_a_finite_norm(adam: AdamArithmetic) -> None:
    """Its square would overflow fp32; what counts is what is left of it after clipping."""
    weights = torch.zeros(4)
    state = AdamState.zeros_like(weights)
    params = AdamParams(0.1, grad_clip_norm=1.0)
    output = adamw_step(weights, torch.full((4,), 1e30), state, params, adam)
    assert output.metrics["grad_norm"] == pytest.approx(2e30)
    torch.testing.assert_close(weights, torch.full((4,), -0.1))


@pytest.mark.parametrize("clip", [0.0, 1e20])
@pytest.mark.parametrize(("count", "value"), [(1, 1.81e19), (4, 1e19), (4, 1e30), (4, 3e38)])
def test_a_gradient_whose_square_overflows_the_moments_changes_nothing(
    count: int, value: float, clip: float, adam: AdamArithmetic
) -> None:
    weights = torch.ones(count)
    state = AdamState(torch.ones(count), torch.ones(count), 7)
    params = AdamParams(0.1, grad_clip_norm=clip)
    output = adamw_step(weights, torch.full((count,), value), state, params, adam)
    assert output.error is not None
    assert "too large" in output.error
    assert state.step == 7
    for tensor in (weights, state.exp_avg, state.exp_avg_sq):
        assert torch.equal(tensor, torch.ones(count))
