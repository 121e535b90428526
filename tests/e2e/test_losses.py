"""Every loss through the SDK: its value, its gradient, its inputs and its settings.

Values are compared with formulas written here, gradients with the SDK's own client-side custom
loss: two models of one seed, one trained by the server's loss and one by torch, must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.e2e.clients import (
    CLOSE,
    RATE,
    datum,
    logprobs_of,
    loss_of,
    next_token,
    service_client,
    train,
    trainer_of,
)
from tests.servers import Server

TOKENS = [1, 9, 30, 4, 11, 30]
TARGETS = [9, 30, 4, 11, 30, 2]
SAMPLER_LOGPROBS = [-3.0, -7.0, -5.5, -4.0, -9.0, -6.5]
ADVANTAGES = [0.0, 1.0, -1.5, 2.0, 0.5, -0.25]
MASK = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]

TorchLoss = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def ratio(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.exp(lp - x["logprobs"])


def clipped(r: torch.Tensor, x: Mapping[str, torch.Tensor], low: Any, high: Any) -> torch.Tensor:
    a = x["advantages"]
    held = torch.minimum(torch.maximum(r, torch.as_tensor(low)), torch.as_tensor(high))
    return -torch.minimum(r * a, held * a).sum()


def importance_sampling(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return -(ratio(lp, x) * x["advantages"]).sum()


def ppo(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return clipped(ratio(lp, x), x, 0.8, 1.2)


def wide_ppo(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return clipped(ratio(lp, x), x, 0.1, 30.0)


def per_token_ppo(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return clipped(ratio(lp, x), x, x["clip_low_threshold"], x["clip_high_threshold"])


def cispo(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return -(ratio(lp, x).clamp(0.0, 4.0).detach() * lp * x["advantages"]).sum()


def dro(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return -(lp * x["advantages"] - 0.5 * 0.05 * (lp - x["logprobs"]) ** 2).sum()


def gspo(lp: torch.Tensor, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    selected = x["sequence_ratio_mask"] != 0
    mean = (lp - x["logprobs"])[selected].mean().detach()
    return clipped(torch.exp(mean + lp - lp.detach()), x, 0.2, 5.0)


RL_INPUTS = {
    "target_tokens": TARGETS,
    "logprobs": SAMPLER_LOGPROBS,
    "advantages": ADVANTAGES,
}
PER_TOKEN = {
    "clip_low_threshold": [0.8, 0.0, 0.5, 0.1, 0.9, 0.7],
    "clip_high_threshold": [1.2, 1.0, 90.0, 30.0, 1.0, 1.5],
}
CASES: dict[str, tuple[str, TorchLoss, dict[str, Any], dict[str, float] | None]] = {
    "importance_sampling": ("importance_sampling", importance_sampling, {}, None),
    "ppo": ("ppo", ppo, {}, None),
    "ppo with settings": (
        "ppo",
        wide_ppo,
        {},
        {"clip_low_threshold": 0.1, "clip_high_threshold": 30.0},
    ),
    "ppo with thresholds per token": ("ppo", per_token_ppo, PER_TOKEN, None),
    "cispo": ("cispo", cispo, {}, None),
    "dro": ("dro", dro, {}, None),
    "gspo": (
        "gspo",
        gspo,
        {"sequence_ratio_mask": MASK},
        {"clip_low_threshold": 0.2, "clip_high_threshold": 5.0},
    ),
}


@pytest.fixture(scope="module")
def service(any_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(any_server) as client:
        yield client


def tensors(item: types.Datum) -> dict[str, torch.Tensor]:
    return {name: value.to_torch() for name, value in item.loss_fn_inputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_has_the_value_and_gradient_of_its_formula(
    service: tinker.ServiceClient, name: str
) -> None:
    loss_fn, formula, more_inputs, config = CASES[name]
    data = [
        datum(TOKENS, **RL_INPUTS, **more_inputs),
        datum(TOKENS[::-1], **RL_INPUTS, **more_inputs),
    ]
    server_side, client_side = trainer_of(service), trainer_of(service)
    output = server_side.forward_backward(data, loss_fn, config).result()  # type: ignore[arg-type]
    expected = sum(
        formula(torch.from_numpy(logprobs), tensors(item)).item()
        for logprobs, item in zip(logprobs_of(output), data, strict=True)
    )
    assert loss_of(output) == pytest.approx(expected, rel=CLOSE)

    def in_torch(
        items: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [formula(lp, tensors(x)) for lp, x in zip(logprobs, items, strict=True)]
        return torch.stack(terms).sum(), {"terms:sum": float(len(terms))}

    custom = client_side.forward_backward_custom(data, in_torch).result()
    assert custom.metrics["loss:sum"] == pytest.approx(expected, rel=CLOSE)
    assert custom.metrics["terms:sum"] == 2
    steps = [trainer.optim_step(RATE) for trainer in (server_side, client_side)]
    norms = [step.result().metrics["grad_norm"] for step in steps]  # type: ignore[index]
    assert norms[0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    after = [
        trainer.forward(data, "importance_sampling").result()
        for trainer in (server_side, client_side)
    ]
    for one, other in zip(logprobs_of(after[0]), logprobs_of(after[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_cross_entropy_is_a_plain_weighted_sum(service: tinker.ServiceClient) -> None:
    weights = [0.0, 1.0, -0.5, 2.0, 0.0, 0.25]
    trainer = trainer_of(service)
    data = [datum(TOKENS, target_tokens=TARGETS, weights=weights)]
    output = trainer.forward_backward(data, "cross_entropy").result()
    (logprobs,) = logprobs_of(output)
    assert logprobs.shape == (6,)
    assert np.isfinite(logprobs).all(), "also where the weight is zero"
    assert loss_of(output) == pytest.approx(-float(np.dot(logprobs, weights)), rel=CLOSE)


def test_forward_computes_the_same_and_changes_nothing(service: tinker.ServiceClient) -> None:
    data = [next_token(TOKENS)]
    plain, disturbed = trainer_of(service), trainer_of(service)
    losses = []
    for trainer in (plain, disturbed):
        trainer.forward_backward(data, "cross_entropy")
        if trainer is disturbed:
            for _ in range(3):
                trainer.forward([next_token([5, 6, 7])], "cross_entropy")
        trainer.optim_step(RATE)
        losses.append(loss_of(trainer.forward(data, "cross_entropy").result()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_soft_targets_are_two_dimensional(service: tinker.ServiceClient, layout: str) -> None:
    rows, width = len(TOKENS), 8
    targets, weights = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.float32)
    generator = np.random.default_rng(5)
    for row in range(1, rows):
        targets[row, :2] = generator.integers(3, 500, 2)
        weights[row, :2] = generator.random(2)
    inputs: dict[str, Any] = {"target_tokens": targets, "weights": weights}
    if layout == "sparse":
        inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    item = datum(TOKENS, **inputs)
    is_sparse = item.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    assert is_sparse == (layout == "sparse")
    trainer = trainer_of(service)
    output = trainer.forward_backward([item], "cross_entropy").result()
    (logprobs,) = logprobs_of(output)
    assert logprobs.shape == (rows, width)
    assert loss_of(output) == pytest.approx(-float((logprobs * weights).sum()), rel=CLOSE)
    for row in range(1, rows):
        single = datum(TOKENS, target_tokens=targets[:, 0].tolist(), weights=[1.0] * rows)
        (narrow,) = logprobs_of(trainer.forward([single], "cross_entropy").result())
        assert narrow[row] == pytest.approx(logprobs[row, 0], abs=CLOSE)


def test_outputs_come_in_the_order_of_the_data(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    data = [next_token([token, token + 1, token + 2][: 2 + token % 2]) for token in range(3, 40)]
    together = logprobs_of(trainer.forward(data, "cross_entropy").result())
    for item, logprobs in zip(data, together, strict=True):
        (alone,) = logprobs_of(trainer.forward([item], "cross_entropy").result())
        np.testing.assert_allclose(alone, logprobs, atol=CLOSE)


def test_inputs_that_the_loss_does_not_read_are_ignored(service: tinker.ServiceClient) -> None:
    extra = datum(TOKENS, **RL_INPUTS, mask=np.ones(6, np.float32), weights=[1.0] * 6)
    plain = datum(TOKENS, **RL_INPUTS)
    trainer = trainer_of(service)
    losses = [loss_of(trainer.forward([x], "ppo").result()) for x in (plain, extra)]
    assert losses[0] == losses[1]


def test_a_tensor_without_a_shape_is_one_dimensional(service: tinker.ServiceClient) -> None:
    inputs = {
        "target_tokens": types.TensorData(data=TARGETS, dtype="int64"),
        "weights": types.TensorData(data=[1.0] * 6, dtype="float32"),
    }
    trainer = trainer_of(service)
    plain = datum(TOKENS, target_tokens=TARGETS, weights=[1.0] * 6)
    losses = [
        loss_of(trainer.forward([x], "cross_entropy").result())
        for x in (plain, datum(TOKENS, **inputs))
    ]
    assert losses[0] == losses[1]


def test_several_text_chunks_are_one_input(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    model_input = types.ModelInput.from_ints(TOKENS[:2])
    for token in TOKENS[2:]:
        model_input = model_input.append_int(token)
    plain = datum(TOKENS, target_tokens=TARGETS, weights=[1.0] * 6)
    in_chunks = types.Datum(model_input=model_input, loss_fn_inputs=plain.loss_fn_inputs)
    losses = [loss_of(trainer.forward([x], "cross_entropy").result()) for x in (plain, in_chunks)]
    assert losses[0] == losses[1]


def test_stable_reinforce_is_refused_with_what_to_use_instead(
    service: tinker.ServiceClient,
) -> None:
    trainer = trainer_of(service)
    with pytest.raises(tinker.RequestFailedError, match=r"not published.*importance_sampling"):
        trainer.forward_backward([datum(TOKENS, **RL_INPUTS)], "stable_reinforce").result()


def test_a_traced_custom_loss_runs_on_the_client(service: tinker.ServiceClient) -> None:
    def negative_likelihood(
        logprobs: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/likelihood:sum": -loss}

    handle = service.create_custom_loss(
        negative_likelihood, input_ranks={"logprobs": 1, "weights": 1}
    ).result()
    trainer = trainer_of(service)
    data = [next_token(TOKENS)]
    expected = loss_of(trainer.forward(data, "cross_entropy").result())
    output = trainer.forward_backward_custom(data, handle).result()
    assert loss_of(output) == pytest.approx(expected, rel=CLOSE)
    assert output.metrics["custom/likelihood:sum"] == pytest.approx(-expected, rel=CLOSE)


def test_a_custom_loss_that_raises_poisons_only_its_own_client(
    service: tinker.ServiceClient,
) -> None:
    def broken(data: list[types.Datum], logprobs: list[torch.Tensor]) -> Any:
        raise ZeroDivisionError("mine")

    poisoned, healthy = trainer_of(service), trainer_of(service)
    with pytest.raises(ZeroDivisionError):
        poisoned.forward_backward_custom([next_token(TOKENS)], broken).result()
    with pytest.raises(RuntimeError, match="poisoned"):
        poisoned.forward([next_token(TOKENS)], "cross_entropy").result()
    assert train(healthy, [next_token(TOKENS)], 2)[1] > 0
