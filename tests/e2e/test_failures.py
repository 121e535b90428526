"""A failed operation fails alone, its step says why, and the model goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tinker

from tests.e2e.clients import (
    RATE,
    datum,
    loss_of,
    next_token,
    prompt,
    service_client,
    train,
    trainer_of,
)
from tests.servers import FAKE_MODEL, Server

GOOD = [next_token([1, 9, 30, 4, 11])]
BAD = [datum([1, 2, 3], target_tokens=[2, 3, 100_000], weights=[1.0] * 3)]


@pytest.fixture(scope="module")
def service(any_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(any_server) as client:
        yield client


def test_after_a_failed_forward_backward_the_step_fails_too_and_says_why(
    service: tinker.ServiceClient,
) -> None:
    trainer = trainer_of(service)
    before = loss_of(trainer.forward(GOOD, "cross_entropy").result())
    good = trainer.forward_backward(GOOD, "cross_entropy")
    bad = trainer.forward_backward(BAD, "cross_entropy")
    also_good = trainer.forward_backward(GOOD, "cross_entropy")
    step = trainer.optim_step(RATE)
    assert loss_of(good.result()) == loss_of(also_good.result()) == before
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\].*100000.*outside"):
        bad.result()
    with pytest.raises(tinker.RequestFailedError, match=r"no step was taken.*100000"):
        step.result()
    assert loss_of(trainer.forward(GOOD, "cross_entropy").result()) == before


def test_then_the_model_is_as_if_nothing_had_happened(service: tinker.ServiceClient) -> None:
    spoiled, clean = trainer_of(service), trainer_of(service)
    spoiled.forward_backward(GOOD, "cross_entropy")
    failed = [spoiled.forward_backward(BAD, "cross_entropy"), spoiled.optim_step(RATE)]
    for future in failed:
        with pytest.raises(tinker.RequestFailedError):
            future.result()  # type: ignore[attr-defined]
    assert train(spoiled, GOOD, 3) == train(clean, GOOD, 3)


def test_a_failed_forward_spoils_nothing(service: tinker.ServiceClient) -> None:
    disturbed, clean = trainer_of(service), trainer_of(service)
    disturbed.forward_backward(GOOD, "cross_entropy")
    with pytest.raises(tinker.RequestFailedError):
        disturbed.forward(BAD, "cross_entropy").result()
    clean.forward_backward(GOOD, "cross_entropy")
    norms = [
        trainer.optim_step(RATE).result().metrics["grad_norm"]  # type: ignore[index]
        for trainer in (disturbed, clean)
    ]
    assert norms[0] == norms[1]


def test_a_failure_touches_no_other_model(service: tinker.ServiceClient) -> None:
    one, other, undisturbed = (trainer_of(service) for _ in range(3))
    losses = []
    for _ in range(3):
        bad = one.forward_backward(BAD, "cross_entropy")
        good = other.forward_backward(GOOD, "cross_entropy")
        spoiled = one.optim_step(RATE)
        other.optim_step(RATE).result()
        losses.append(loss_of(good.result()))
        for future in (bad, spoiled):
            with pytest.raises(tinker.RequestFailedError):
                future.result()
    assert losses == train(undisturbed, GOOD, 3)


def test_a_loss_that_overflows_is_refused(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    inputs = {"target_tokens": [2, 3], "logprobs": [-3e38, -3e38], "advantages": [1.0, 1.0]}
    with pytest.raises(tinker.RequestFailedError, match="finite"):
        trainer.forward_backward([datum([1, 2], **inputs)], "importance_sampling").result()
    with pytest.raises(tinker.RequestFailedError, match="no step was taken"):
        trainer.optim_step(RATE).result()
    train(trainer, GOOD)


def test_a_step_without_gradients_is_deterministic(service: tinker.ServiceClient) -> None:
    trainers = [trainer_of(service) for _ in range(2)]
    losses = []
    for trainer in trainers:
        train(trainer, GOOD, 2)
        metrics = trainer.optim_step(RATE).result().metrics
        assert metrics is not None
        assert metrics["grad_norm"] == 0
        losses.append(loss_of(trainer.forward(GOOD, "cross_entropy").result()))
    assert losses[0] == losses[1]


def test_a_failed_sample_leaves_the_sampler_usable(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
    with pytest.raises(tinker.RequestFailedError, match="top_p"):
        sampler.sample(prompt(1), 1, tinker.SamplingParams(max_tokens=3, top_p=0.0)).result()
    reply = sampler.sample(prompt(1), 1, tinker.SamplingParams(max_tokens=3, stop=[])).result()
    assert len(reply.sequences[0].tokens) == 3


def test_a_failed_save_does_not_stop_training(service: tinker.ServiceClient) -> None:
    trainer, clean = trainer_of(service), trainer_of(service)
    trainer.forward_backward(GOOD, "cross_entropy")
    with pytest.raises(tinker.TinkerError):
        trainer.save_state("no/such/name").result()
    trainer.optim_step(RATE).result()
    assert loss_of(trainer.forward(GOOD, "cross_entropy").result()) == pytest.approx(
        train(clean, GOOD, 2)[1], rel=1e-9
    )
