"""The embedded model on the real engine, through the SDK: bf16 weights, real text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.backends.conftest import has_kernels
from tests.e2e.clients import logprobs_of, loss_of, next_token, numbers, service_client, trainer_of
from tests.servers import Server
from training.config import EMBEDDED_MODEL

TEXT = "The capital of France is Paris, and the capital of Italy is Rome."
BF16 = 0.25
"""Sampler and trainer meet the same bf16 weights in products of different shapes."""


@pytest.fixture(scope="module")
def service(real_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(real_server) as client:
        yield client


@pytest.fixture(scope="module")
def trainer(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return trainer_of(service, EMBEDDED_MODEL, rank=8)


@pytest.fixture(scope="module")
def tokenizer(trainer: tinker.TrainingClient) -> Any:
    return trainer.get_tokenizer()


@pytest.fixture(scope="module")
def base(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=EMBEDDED_MODEL).result()


def ints(tokens: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens)


def test_the_tokenizer_round_trips(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_base_model_knows_the_capital_of_france(
    base: tinker.SamplingClient, tokenizer: Any
) -> None:
    prompt = ints(tokenizer.encode("The capital of France is"))
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    reply = base.sample(prompt, 1, params).result()
    assert "Paris" in tokenizer.decode(reply.sequences[0].tokens)


def test_a_real_text_is_likelier_than_its_reverse(
    trainer: tinker.TrainingClient, tokenizer: Any
) -> None:
    tokens = tokenizer.encode(TEXT)
    losses = [
        loss_of(trainer.forward([next_token(item)], "cross_entropy").result()) / (len(tokens) - 1)
        for item in (tokens, tokens[::-1])
    ]
    assert losses[0] < 3 < losses[1]


def test_sampler_and_trainer_agree_before_and_after_training(
    service: tinker.ServiceClient, tokenizer: Any
) -> None:
    trainer = trainer_of(service, EMBEDDED_MODEL, rank=8)
    tokens = tokenizer.encode(TEXT)
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    worst = []
    for _ in range(2):
        sampler = trainer.save_weights_and_get_sampling_client().result()
        (sequence,) = sampler.sample(ints(tokens), 1, params).result().sequences
        whole = [*tokens, *sequence.tokens]
        (known,) = logprobs_of(trainer.forward([next_token(whole)], "cross_entropy").result())
        sampled = np.abs(numbers(sequence.logprobs) - known[-len(sequence.tokens) :])
        scored = numbers(sampler.compute_logprobs(ints(whole)).result()[1:])
        worst += [float(sampled.max()), float(np.abs(scored - known).max())]
        for _ in range(2):
            trainer.forward_backward([next_token(tokens)], "cross_entropy")
            trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    print("largest differences of sampler and trainer logprobs:", worst)
    assert max(worst) < BF16


def test_training_teaches_a_text_and_not_the_neighbour(
    service: tinker.ServiceClient, tokenizer: Any
) -> None:
    taught, neighbour = (trainer_of(service, EMBEDDED_MODEL, rank=8) for _ in range(2))
    data = [next_token(tokenizer.encode("My cat is called Ferdinand von Schnurr."))]
    untouched = loss_of(neighbour.forward(data, "cross_entropy").result())
    losses = []
    for _ in range(6):
        future = taught.forward_backward(data, "cross_entropy")
        taught.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(loss_of(future.result()))
    assert losses[0] == pytest.approx(untouched, rel=0.02)
    assert losses[-1] < 0.5 * losses[0]
    assert loss_of(neighbour.forward(data, "cross_entropy").result()) == untouched


@pytest.mark.skipif(not has_kernels(), reason="torch's bits depend on what it computes together")
def test_a_seed_repeats_on_the_engine(base: tinker.SamplingClient, tokenizer: Any) -> None:
    params = types.SamplingParams(max_tokens=10, seed=11)
    prompt = ints(tokenizer.encode("Once upon a time"))
    alone = base.sample(prompt, 2, params).result()
    crowd = [base.sample(prompt, 2, params) for _ in range(6)]
    for future in crowd:
        tokens = [sequence.tokens for sequence in future.result().sequences]
        assert tokens == [sequence.tokens for sequence in alone.sequences]


def test_a_stop_string_of_real_text(base: tinker.SamplingClient, tokenizer: Any) -> None:
    params = types.SamplingParams(max_tokens=30, temperature=0.0, stop=", 5")
    prompt = ints(tokenizer.encode("Count: 1, 2, 3, 4, 5, 6, 7, 8. Again: 1, 2, 3,"))
    (sequence,) = base.sample(prompt, 1, params).result().sequences
    text = tokenizer.decode(sequence.tokens)
    assert sequence.stop_reason == "stop"
    assert text.endswith(", 5")
    assert text.count(", 5") == 1


def test_a_long_sequence_trains(trainer: tinker.TrainingClient, tokenizer: Any) -> None:
    tokens = (tokenizer.encode(TEXT) * 100)[:1200]
    output = trainer.forward_backward([next_token(tokens)], "cross_entropy").result()
    (logprobs,) = logprobs_of(output)
    assert logprobs.shape == (1199,)
    assert np.isfinite(logprobs).all()
    assert logprobs[600:].mean() > logprobs[:15].mean(), "what repeats becomes likely"
    metrics = trainer.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
    assert metrics is not None
    assert metrics["grad_norm"] > 0
