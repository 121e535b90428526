"""Ways to a sampler, many clients of one, and turns of training and sampling."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import SamplingClient, types

from tests.e2e.clients import (
    CLOSE,
    PROMPT,
    SEEDED,
    forward_logprobs,
    next_token,
    numbers,
    prompt,
    rest_client,
    service_client,
    tokens_of,
    train,
    trainer_of,
)
from tests.servers import FAKE_MODEL, Server, assert_client_ended, running_server

DATA = [next_token([1, 9, 30, 4, 11])]


@pytest.fixture(scope="module")
def service(any_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(any_server) as client:
        yield client


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> SamplingClient:
    return service.create_sampling_client(base_model=FAKE_MODEL).result()


# --------------------------------------------------------------------------- ways to a sampler


def test_every_path_to_the_trained_weights_gives_the_same(any_server: Server) -> None:
    with service_client(any_server) as service:
        trainer = trainer_of(service)
        train(trainer, DATA, 4)
        named = trainer.save_weights_for_sampler("named").result().path
        assert named == f"tinker://{trainer.model_id}/sampler_weights/named"
        state = trainer.save_state("state").result().path
        samplers = [
            trainer.save_weights_and_get_sampling_client().result(),
            trainer.save_weights_and_get_sampling_client(kind="inflight").result(),
            service.create_sampling_client(model_path=named).result(),
            service.create_sampling_client(model_path=state).result(),
            service.create_sampling_client(model_path=named, base_model=FAKE_MODEL).result(),
            trainer.create_sampling_client(named).result(),
        ]
        replies = [tokens_of(sampler, SEEDED) for sampler in samplers]
        assert all(reply == replies[0] for reply in replies)
        base = service.create_sampling_client(base_model=FAKE_MODEL).result()
        known = forward_logprobs(trainer, PROMPT.to_ints())
        np.testing.assert_allclose(
            numbers(samplers[0].compute_logprobs(PROMPT).result()[1:]), known, atol=CLOSE
        )
        assert (
            base.compute_logprobs(PROMPT).result() != samplers[0].compute_logprobs(PROMPT).result()
        )
        for sampler in samplers:
            assert sampler.get_base_model() == FAKE_MODEL
        info = rest_client(any_server).get_sampler(samplers[2]._sampling_session_id).result()
        assert info.model_path == named


def test_a_snapshot_stays_and_inflight_weights_move_on(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    train(trainer, DATA, 2)
    snapshot = trainer.save_weights_and_get_sampling_client().result()
    inflight = trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    early = snapshot.compute_logprobs(PROMPT).result()
    assert inflight.compute_logprobs(PROMPT).result() == early
    train(trainer, DATA, 4)
    later = trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    assert snapshot.compute_logprobs(PROMPT).result() == early
    moved = later.compute_logprobs(PROMPT).result()
    assert moved != early
    assert inflight.compute_logprobs(PROMPT).result() == moved


def test_sampler_weights_outlive_their_session(any_server: Server) -> None:
    with service_client(any_server) as first:
        trainer = trainer_of(first)
        train(trainer, DATA, 3)
        path = trainer.save_weights_for_sampler("kept").result().path
        client = first.create_sampling_client(model_path=path).result()
        expected = tokens_of(client, SEEDED)
    with service_client(any_server) as second:
        client = second.create_sampling_client(model_path=path).result()
        assert tokens_of(client, SEEDED) == expected


def test_a_missing_path_is_named(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.TinkerError, match="nothing-here"):
        service.create_sampling_client(
            model_path="tinker://x:train:0/sampler_weights/nothing-here"
        ).result()


# --------------------------------------------------------------------------- many clients


def test_many_samples_at_once(any_server: Server) -> None:
    with service_client(any_server) as service:
        trainer = trainer_of(service)
        train(trainer, DATA, 3)
        tuned = trainer.save_weights_and_get_sampling_client().result()
        base = service.create_sampling_client(base_model=FAKE_MODEL).result()
        expected = {
            (client is tuned, seed): tokens_of(client, SEEDED.model_copy(update={"seed": seed}))
            for client in (tuned, base)
            for seed in range(4)
        }
        waiting = [
            (
                (client is tuned, seed),
                client.sample(PROMPT, 1, SEEDED.model_copy(update={"seed": seed})),
            )
            for index in range(64)
            for client in ((tuned, base)[index % 2],)
            for seed in ((index // 2) % 4,)
        ]
        # Training goes on meanwhile, and neither disturbs the other.
        losses = train(trainer, DATA, 3)
        assert losses[2] < losses[0]
        for key, future in waiting:
            assert future.result().sequences[0].tokens == expected[key]


def test_sampling_with_the_batch_poller_and_joined_clones(tmp_path: Path) -> None:
    flags = {"sample_use_retrieve_futures": True, "sample_join_sampling_session": True}
    with running_server(tmp_path, {"client": flags}) as server, service_client(server) as service:
        sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
        clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
        waiting = [
            client.sample(PROMPT, 1, SEEDED) for client in (sampler, *clones) for _ in range(20)
        ]
        replies = {tuple(future.result().sequences[0].tokens) for future in waiting}
        assert len(replies) == 1
        with pytest.raises(tinker.TinkerError, match="max_tokens"):
            sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=-1)).result()
        assert tokens_of(sampler, SEEDED) == list(replies.pop())


CHILD = """
import sys
from tinker import SamplingClient, types
client = SamplingClient.from_sampler_handle(sys.argv[1])
params = types.SamplingParams(max_tokens=12, seed=7, stop=[])
prompt = types.ModelInput.from_ints([1, 9, 30, 4, 11])
print(*client.sample(prompt, 1, params).result().sequences[0].tokens)
"""


def test_a_sampler_handle_works_in_another_process(
    any_server: Server, sampler: SamplingClient
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, sampler.get_sampler_handle()],
        env=any_server.client_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert_client_ended(child)
    assert [int(token) for token in child.stdout.split()] == tokens_of(sampler, SEEDED)


def test_a_pickled_client_samples_the_same(sampler: SamplingClient) -> None:
    clone = pickle.loads(pickle.dumps(sampler))
    assert tokens_of(clone, SEEDED) == tokens_of(sampler, SEEDED)


def test_a_long_prompt_and_many_tokens(sampler: SamplingClient) -> None:
    long = prompt(*[3 + i % 500 for i in range(3000)])
    params = types.SamplingParams(max_tokens=1000, stop=[])
    reply = sampler.sample(long, 1, params, include_prompt_logprobs=True).result()
    assert len(reply.sequences[0].tokens) == 1000
    assert reply.prompt_logprobs is not None
    assert len(reply.prompt_logprobs) == 3000
    assert not any(math.isnan(x) for x in reply.prompt_logprobs if x is not None)


def test_policy_gradients_from_ones_own_samples(service: tinker.ServiceClient) -> None:
    """Whole turns of reinforcement learning: sample, score, train; what is rewarded rises."""
    trainer = trainer_of(service)
    shares = []
    for turn in range(8):
        sampler = trainer.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=1, seed=turn, stop=[])
        reply = sampler.sample(PROMPT, 200, params).result()
        rewards = np.array([s.tokens[0] < 256 for s in reply.sequences], dtype=np.float32)
        shares.append(float(rewards.mean()))
        data = []
        for sequence, reward in zip(reply.sequences, rewards, strict=True):
            assert sequence.logprobs is not None
            inputs: dict[str, Any] = {
                "target_tokens": [*PROMPT.to_ints()[1:], *sequence.tokens],
                "logprobs": [0.0] * 4 + sequence.logprobs,
                "advantages": [0.0] * 4 + [float(reward) - shares[-1]],
            }
            data.append(types.Datum(model_input=PROMPT, loss_fn_inputs=inputs))
        trainer.forward_backward(data, "importance_sampling")
        trainer.optim_step(types.AdamParams(learning_rate=3e-2)).result()
    assert shares[-1] > shares[0] + 0.2
