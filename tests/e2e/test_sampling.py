"""Sampling through the SDK: every parameter, every kind of score, every way to a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import SamplingClient, types

from tests.e2e.clients import (
    CLOSE,
    PROMPT,
    SEEDED,
    forward_logprobs,
    numbers,
    service_client,
    tokens_of,
    trainer_of,
)
from tests.servers import FAKE_MODEL, Server, running_server

EOS = 2


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


# --------------------------------------------------------------------------- parameters


def test_a_seed_repeats_and_another_does_not(sampler: SamplingClient) -> None:
    first = tokens_of(sampler, SEEDED, num=3)
    assert tokens_of(sampler, SEEDED, num=3) == first
    other = SEEDED.model_copy(update={"seed": 8})
    assert tokens_of(sampler, other, num=3) != first
    unseeded = SEEDED.model_copy(update={"seed": None})
    assert tokens_of(sampler, unseeded, num=3) != tokens_of(sampler, unseeded, num=3)


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**64 - 1])
def test_any_64_bit_seed_is_taken(sampler: SamplingClient, seed: int) -> None:
    params = SEEDED.model_copy(update={"seed": seed})
    assert tokens_of(sampler, params) == tokens_of(sampler, params)


def test_samples_of_one_request_differ_and_are_numbered(sampler: SamplingClient) -> None:
    reply = sampler.sample(PROMPT, 8, SEEDED).result()
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
    for sequence in sampler.sample(PROMPT, 4, SEEDED).result().sequences:
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
    reply = sampler.sample(PROMPT, 2, SEEDED).result()
    assert 0 <= reply.prompt_cache_hit_tokens <= PROMPT.length
