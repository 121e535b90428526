"""Each loss against its formula written in torch: value by value, derivative by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.losses import LOSSES, REFUSED
from training.losses.base import Float64Array

Tensors = Mapping[str, torch.Tensor]
Formula = Callable[[torch.Tensor, Tensors, Mapping[str, float]], torch.Tensor]


def _clipped(ratio: torch.Tensor, inputs: Tensors, config: Mapping[str, float]) -> torch.Tensor:
    low, high = _bounds(inputs, config)
    advantages = inputs["advantages"]
    clamped = torch.clamp(ratio, low, high)
    return -torch.min(ratio * advantages, clamped * advantages).sum()


def _bounds(inputs: Tensors, config: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = inputs["advantages"]
    return (
        inputs.get("clip_low_threshold", torch.full_like(shape, config["clip_low_threshold"])),
        inputs.get("clip_high_threshold", torch.full_like(shape, config["clip_high_threshold"])),
    )


def cross_entropy(lp: torch.Tensor, inputs: Tensors, _: Mapping[str, float]) -> torch.Tensor:
    return -(lp * inputs["weights"]).sum()


def importance_sampling(lp: torch.Tensor, inputs: Tensors, _: Mapping[str, float]) -> torch.Tensor:
    return -(torch.exp(lp - inputs["logprobs"]) * inputs["advantages"]).sum()


def ppo(lp: torch.Tensor, inputs: Tensors, config: Mapping[str, float]) -> torch.Tensor:
    return _clipped(torch.exp(lp - inputs["logprobs"]), inputs, config)


def cispo(lp: torch.Tensor, inputs: Tensors, config: Mapping[str, float]) -> torch.Tensor:
    low, high = _bounds(inputs, config)
    ratio = torch.clamp(torch.exp(lp - inputs["logprobs"]), low, high).detach()
    return -(ratio * lp * inputs["advantages"]).sum()


def dro(lp: torch.Tensor, inputs: Tensors, config: Mapping[str, float]) -> torch.Tensor:
    pull = 0.5 * config["beta"] * (lp - inputs["logprobs"]) ** 2
    return -(lp * inputs["advantages"] - pull).sum()


def gspo(lp: torch.Tensor, inputs: Tensors, config: Mapping[str, float]) -> torch.Tensor:
    selected = inputs["sequence_ratio_mask"] != 0
    mean = (lp.detach() - inputs["logprobs"])[selected].mean()
    return _clipped(torch.exp(mean + lp - lp.detach()), inputs, config)


FORMULAS: Mapping[str, Formula] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}


def _arrays(length: int, values: st.SearchStrategy[float]) -> st.SearchStrategy[Float64Array]:
    return arrays(np.float64, length, elements=values)


@st.composite
def _cases(draw: st.DrawFn, name: str) -> tuple[Float64Array, dict[str, Float64Array], bool]:
    """Logprobs and inputs. A difference of exactly 0 meets bounds of exactly 1: the clip's edge."""
    length = draw(st.integers(1, 6))
    logprobs = draw(_arrays(length, st.floats(-8, 0)))
    differences = draw(_arrays(length, st.sampled_from([0.0, 0.0, -0.5, 0.4, 1e-4, -1e-4, 1.9])))
    signed = st.sampled_from([0.0, 1.0, -1.0, 0.37, -2.5])
    inputs = {
        "logprobs": logprobs - differences,
        "advantages": draw(_arrays(length, signed)),
        "weights": draw(_arrays(length, signed)),
        "sequence_ratio_mask": draw(_arrays(length, st.sampled_from([0.0, 1.0]))),
    }
    inputs["sequence_ratio_mask"][0] = 1.0
    per_token = draw(st.booleans())
    spec = LOSSES[name]
    known = {key: value for key, value in inputs.items() if key in spec.required}
    if per_token and "clip_low_threshold" in spec.optional:
        known["clip_low_threshold"] = draw(_arrays(length, st.sampled_from([0.0, 0.9, 1.0])))
        known["clip_high_threshold"] = draw(_arrays(length, st.sampled_from([1.0, 1.1, 5.0])))
    return logprobs, known, per_token


@pytest.mark.parametrize("name", sorted(LOSSES))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_value_and_derivative_are_those_of_the_formula(name: str, data: st.DataObject) -> None:
    logprobs, inputs, _ = data.draw(_cases(name))
    spec = LOSSES[name]
    learner = torch.tensor(logprobs, requires_grad=True)
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    expected = FORMULAS[name](learner, tensors, spec.config)
    torch.autograd.backward(expected)
    assert learner.grad is not None

    value = spec.fn(logprobs, inputs, spec.config)

    assert value.loss == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(value.dlogprobs, learner.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_every_loss_has_a_formula_here() -> None:
    assert set(LOSSES) == set(FORMULAS)
    assert not set(LOSSES) & set(REFUSED)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_configured_bounds_are_used(name: str) -> None:
    spec = LOSSES[name]
    inputs = {
        "logprobs": np.zeros(2),
        "advantages": np.ones(2),
        "sequence_ratio_mask": np.ones(2),
    }
    logprobs = np.full(2, np.log(3.0))
    narrow = spec.fn(logprobs, inputs, {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0})
    wide = spec.fn(logprobs, inputs, {"clip_low_threshold": 0.5, "clip_high_threshold": 4.0})
    assert wide.loss / narrow.loss == pytest.approx(1.5)


def test_soft_targets_sum_over_both_axes() -> None:
    logprobs = np.log(np.array([[0.5, 0.25], [0.125, 0.25]]))
    weights = np.array([[0.75, 0.25], [0.0, 1.0]])
    value = LOSSES["cross_entropy"].fn(logprobs, {"weights": weights}, {})
    assert value.loss == pytest.approx(-(logprobs * weights).sum())
    np.testing.assert_array_equal(value.dlogprobs, -weights)


def test_a_target_of_weight_zero_may_be_impossible() -> None:
    weights = np.array([1.0, 0.0])
    value = LOSSES["cross_entropy"].fn(np.array([-1.0, -np.inf]), {"weights": weights}, {})
    assert value.loss == 1.0


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_prompt_positions_with_made_up_logprobs_add_nothing(name: str) -> None:
    spec = LOSSES[name]
    inputs = {"logprobs": np.array([-2000.0, -1.0]), "advantages": np.array([0.0, 0.5])}
    alone = {"logprobs": np.array([-1.0]), "advantages": np.array([0.5])}
    value = spec.fn(np.array([-3.0, -1.2]), inputs, spec.config)
    assert value.loss == spec.fn(np.array([-1.2]), alone, spec.config).loss
    assert value.dlogprobs[0] == 0


def test_gspo_without_a_selected_token_is_not_a_number() -> None:
    spec = LOSSES["gspo"]
    inputs = {
        "logprobs": np.zeros(2),
        "advantages": np.ones(2),
        "sequence_ratio_mask": np.zeros(2),
    }
    assert np.isnan(spec.fn(np.zeros(2), inputs, spec.config).loss)


def test_an_overflowing_ratio_is_infinite_and_not_a_warning() -> None:
    spec = LOSSES["importance_sampling"]
    inputs = {"logprobs": np.array([-2000.0]), "advantages": np.array([1.0])}
    assert spec.fn(np.array([-1.0]), inputs, {}).loss == -np.inf
