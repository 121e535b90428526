"""Sampling through the SDK: every parameter, every kind of score, every way to a sampler."""

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
import torch
from tinker import SamplingClient, types

from tests.e2e.clients import (
    CLOSE,
    logprobs_of,
    next_token,
    numbers,
    prompt,
    rest_client,
    service_client,
    train,
    trainer_of,
)
from tests.servers import FAKE_MODEL, Server, running_server

PROMPT = prompt(1, 9, 30, 4, 11)
EOS = 2
DATA = [next_token([1, 9, 30, 4, 11])]
EVERYTHING = types.SamplingParams(max_tokens=12, seed=7, stop=[])


@pytest.fixture(scope="module")
def service(any_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(any_server) as client:
        yield client


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> SamplingClient:
    return service.create_sampling_client(base_model=FAKE_MODEL).result()


@pytest.fixture(scope="module")
def scorer(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A fresh adapter changes nothing, so its forward tells the base model's logprobs."""
    return trainer_of(service)


def tokens_of(sampler: SamplingClient, params: types.SamplingParams, num: int = 1) -> list[int]:
    reply = sampler.sample(PROMPT, num, params).result()
    return [token for sequence in reply.sequences for token in sequence.tokens]


def forward_logprobs(trainer: tinker.TrainingClient, tokens: list[int]) -> np.ndarray:
    """Of tokens[1:]."""
    (logprobs,) = logprobs_of(trainer.forward([next_token(tokens)], "cross_entropy").result())
    return logprobs


# --------------------------------------------------------------------------- parameters


def test_a_seed_repeats_and_another_does_not(sampler: SamplingClient) -> None:
    first = tokens_of(sampler, EVERYTHING, num=3)
    assert tokens_of(sampler, EVERYTHING, num=3) == first
    other = EVERYTHING.model_copy(update={"seed": 8})
    assert tokens_of(sampler, other, num=3) != first
    unseeded = EVERYTHING.model_copy(update={"seed": None})
    assert tokens_of(sampler, unseeded, num=3) != tokens_of(sampler, unseeded, num=3)


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**64 - 1])
def test_any_64_bit_seed_is_taken(sampler: SamplingClient, seed: int) -> None:
    params = EVERYTHING.model_copy(update={"seed": seed})
    assert tokens_of(sampler, params) == tokens_of(sampler, params)


def test_samples_of_one_request_differ_and_are_numbered(sampler: SamplingClient) -> None:
    reply = sampler.sample(PROMPT, 8, EVERYTHING).result()
    assert len(reply.sequences) == 8
    assert len({tuple(sequence.tokens) for sequence in reply.sequences}) > 1
    assert len({sequence.sequence_id for sequence in reply.sequences}) == 8
    for sequence in reply.sequences:
        assert sequence.logprobs is not None
        assert len(sequence.logprobs) == len(sequence.tokens) == 12
        assert sequence.stop_reason == "length"


def test_greedy_takes_the_likeliest_token(
    sampler: SamplingClient, scorer: tinker.TrainingClient
) -> None:
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    reply = sampler.sample(PROMPT, 2, params, topk_sample_logprobs=3).result()
    one, other = reply.sequences
    assert one.tokens == other.tokens
    assert one.topk_logprobs is not None
    for token, row in zip(one.tokens, one.topk_logprobs, strict=True):
        assert row is not None
        assert len(row) == 3
        assert row[0][0] == token
        assert row[0][1] >= row[1][1] >= row[2][1]
    known = forward_logprobs(scorer, [*PROMPT.to_ints(), *one.tokens])[-4:]
    np.testing.assert_allclose(numbers(one.logprobs), known, atol=CLOSE)


def test_logprobs_are_those_of_the_tempered_distribution(sampler: SamplingClient) -> None:
    """log p at temperature t differs between tokens by 1/t of what it differs at 1."""
    top = sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=1, temperature=1.0), topk_sample_logprobs=20
    ).result()
    rows = top.sequences[0].topk_logprobs
    assert rows is not None
    assert rows[0] is not None
    at_one = dict(rows[0])
    seen: dict[int, float] = {}
    params = types.SamplingParams(max_tokens=1, temperature=0.5, stop=[], seed=3)
    for sequence in sampler.sample(PROMPT, 200, params).result().sequences:
        assert sequence.logprobs is not None
        if sequence.tokens[0] in at_one:
            seen[sequence.tokens[0]] = sequence.logprobs[0]
    assert len(seen) >= 2
    (a, lp_a), (b, lp_b) = sorted(seen.items())[:2]
    assert lp_a - lp_b == pytest.approx(2 * (at_one[a] - at_one[b]), abs=1e-4)


def test_top_k_and_top_p_bound_what_is_drawn(sampler: SamplingClient) -> None:
    reply = sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=1), topk_sample_logprobs=20
    ).result()
    rows = reply.sequences[0].topk_logprobs
    assert rows is not None
    assert rows[0] is not None
    ranked = [token for token, _ in rows[0]]
    base = types.SamplingParams(max_tokens=1, stop=[], seed=1)
    for update, allowed in (
        ({"top_k": 1}, ranked[:1]),
        ({"top_k": 3}, ranked[:3]),
        ({"top_p": 1e-6}, ranked[:1]),
    ):
        drawn = set(tokens_of(sampler, base.model_copy(update=update), num=50))
        assert drawn <= set(allowed)
    assert len(set(tokens_of(sampler, base, num=50))) > 3


def test_the_end_token_stops_unless_told_otherwise(sampler: SamplingClient) -> None:
    """The fake's texts: token i reads as character i."""
    params = types.SamplingParams(max_tokens=400, seed=1)
    ended = [
        s for s in sampler.sample(PROMPT, 16, params).result().sequences if s.stop_reason == "stop"
    ]
    assert ended, "of 6,400 tokens of 512 kinds some are the end token"
    assert all(s.tokens[-1] == EOS and EOS not in s.tokens[:-1] for s in ended)
    endless = params.model_copy(update={"stop": []})
    for sequence in sampler.sample(PROMPT, 4, endless).result().sequences:
        assert (sequence.stop_reason, len(sequence.tokens)) == ("length", 400)


def test_stop_tokens_and_stop_strings(sampler: SamplingClient) -> None:
    free = tokens_of(sampler, types.SamplingParams(max_tokens=60, seed=5, stop=[]))
    token = free[20]
    first = free.index(token)
    for stop in ([token], chr(token), [chr(token)], ["\u0000never", chr(token)]):
        params = types.SamplingParams(max_tokens=60, seed=5, stop=stop)
        (sequence,) = sampler.sample(PROMPT, 1, params).result().sequences
        assert sequence.tokens == free[: first + 1]
        assert sequence.stop_reason == "stop"
    pair = chr(free[10]) + chr(free[11])
    params = types.SamplingParams(max_tokens=60, seed=5, stop=pair)
    (sequence,) = sampler.sample(PROMPT, 1, params).result().sequences
    text = "".join(chr(item) for item in sequence.tokens)
    assert text.endswith(pair)
    assert text.count(pair) == 1


def test_without_max_tokens_the_context_is_the_limit(tmp_path: Path) -> None:
    model = {"name": FAKE_MODEL, "backend": "fake", "context_length": 40}
    with (
        running_server(tmp_path, {"supported_models": [model]}) as server,
        service_client(server) as service,
    ):
        sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
        (sequence,) = sampler.sample(PROMPT, 1, types.SamplingParams(stop=[])).result().sequences
        assert len(sequence.tokens) == 35
        with pytest.raises(tinker.TinkerError, match="context"):
            sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=36)).result()


# --------------------------------------------------------------------------- scores


def test_sampled_logprobs_are_the_trainers(
    sampler: SamplingClient, scorer: tinker.TrainingClient
) -> None:
    for sequence in sampler.sample(PROMPT, 4, EVERYTHING).result().sequences:
        known = forward_logprobs(scorer, [*PROMPT.to_ints(), *sequence.tokens])
        np.testing.assert_allclose(numbers(sequence.logprobs), known[-12:], atol=CLOSE)


def test_prompt_logprobs(sampler: SamplingClient, scorer: tinker.TrainingClient) -> None:
    known = forward_logprobs(scorer, PROMPT.to_ints())
    computed = sampler.compute_logprobs(PROMPT).result()
    assert computed[0] is None
    np.testing.assert_allclose(numbers(computed[1:]), known, atol=CLOSE)
    params = types.SamplingParams(max_tokens=1)
    reply = sampler.sample(PROMPT, 1, params, include_prompt_logprobs=True).result()
    assert reply.prompt_logprobs == computed
    plain = sampler.sample(PROMPT, 1, params).result()
    assert plain.prompt_logprobs is None
    assert plain.topk_prompt_logprobs is None


def test_only_the_last_prompt_logprobs(sampler: SamplingClient) -> None:
    whole = sampler.compute_logprobs(PROMPT).result()
    last = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
    assert last[:3] == [None] * 3
    assert last[3:] == pytest.approx(whole[3:], abs=CLOSE)


def test_topk_prompt_logprobs(sampler: SamplingClient) -> None:
    reply = sampler.sample(
        PROMPT,
        1,
        types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=4,
    ).result()
    rows = reply.topk_prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    assert [len(row or ()) for row in rows[1:]] == [4] * 4
    for token, logprob, row in zip(
        PROMPT.to_ints()[1:], (reply.prompt_logprobs or [])[1:], rows[1:], strict=True
    ):
        assert logprob is not None
        assert row is not None
        assert row[0][1] >= logprob - 1e-6
        if token in dict(row):
            assert dict(row)[token] == pytest.approx(logprob, abs=CLOSE)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_chosen_tokens_are_scored_in_the_layout_asked_for(
    sampler: SamplingClient, layout: str
) -> None:
    tokens = PROMPT.to_ints()
    ids = torch.full((4, 9), -1, dtype=torch.int64)
    ids[2, 0], ids[2, 1], ids[3, 0] = tokens[3], 77, tokens[4]
    target = (
        types.TensorData.from_torch(ids)
        if layout == "dense"
        else types.TensorData.from_torch_sparse(ids, pad_value=-1)
    )
    reply = sampler.sample(
        PROMPT,
        1,
        types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        target_prompt_logprobs=target,
    ).result()
    scored = reply.target_prompt_logprobs
    assert scored is not None
    assert (scored.sparse_crow_indices is not None) == (layout == "sparse")
    table = scored.to_torch()
    assert list(table.shape) == [4, 9]
    known = reply.prompt_logprobs or []
    assert table[2, 0].item() == pytest.approx(known[3], abs=CLOSE)
    assert table[3, 0].item() == pytest.approx(known[4], abs=CLOSE)
    assert table[2, 1].item() < 0
    assert int(torch.count_nonzero(table)) == 3


def test_alternatives_to_the_prompt(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1, seed=4)
    reply = sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=6).result()
    alternatives = reply.prompt_alt_tokens
    assert alternatives is not None
    tokens, logprobs = alternatives.tokens.to_numpy(), alternatives.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (4, 6)
    assert ((tokens >= 0) & (tokens < 512)).all()
    assert (logprobs < 0).all()
    assert len(np.unique(tokens)) > 4


def test_a_repeated_prompt_may_count_cached_tokens(sampler: SamplingClient) -> None:
    reply = sampler.sample(PROMPT, 2, EVERYTHING).result()
    assert 0 <= reply.prompt_cache_hit_tokens <= PROMPT.length


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
        replies = [tokens_of(sampler, EVERYTHING) for sampler in samplers]
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
        expected = tokens_of(client, EVERYTHING)
    with service_client(any_server) as second:
        client = second.create_sampling_client(model_path=path).result()
        assert tokens_of(client, EVERYTHING) == expected


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
            (client is tuned, seed): tokens_of(client, EVERYTHING.model_copy(update={"seed": seed}))
            for client in (tuned, base)
            for seed in range(4)
        }
        waiting = [
            (
                (client is tuned, seed),
                client.sample(PROMPT, 1, EVERYTHING.model_copy(update={"seed": seed})),
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
            client.sample(PROMPT, 1, EVERYTHING) for client in (sampler, *clones) for _ in range(20)
        ]
        replies = {tuple(future.result().sequences[0].tokens) for future in waiting}
        assert len(replies) == 1
        with pytest.raises(tinker.TinkerError, match="max_tokens"):
            sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=-1)).result()
        assert tokens_of(sampler, EVERYTHING) == list(replies.pop())


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
    assert child.returncode == 0, child.stderr
    assert [int(token) for token in child.stdout.split()] == tokens_of(sampler, EVERYTHING)


def test_a_pickled_client_samples_the_same(sampler: SamplingClient) -> None:
    clone = pickle.loads(pickle.dumps(sampler))
    assert tokens_of(clone, EVERYTHING) == tokens_of(sampler, EVERYTHING)


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
