"""What is computed at prompt positions, against one full forward pass of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import VOCAB_SIZE
from tests.engine.sampler_cases import (
    ask,
    make_model_directory,
    make_sampler,
    random_prompt,
    sample_all,
    sample_one,
)
from tests.engine.test_sampler import COMPANY_TOLERANCE
from tests.engine.test_sampling import chi_square
from training.backends.base import StopReason
from training.core.errors import UserError

TOLERANCE = 1e-4
PROMPT = random_prompt(150)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def logits_PV(directory: Path) -> torch.Tensor:
    """Row i predicts prompt token i + 1."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(PROMPT.astype(np.int64))[None]).logits[0]
    return logits


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("last_n", [None, 1, 70, 149, 1000])
def test_prompt_logprobs(
    directory: Path, logits_PV: torch.Tensor, max_tokens: int, last_n: int | None
) -> None:
    request = ask(
        PROMPT,
        max_tokens=max_tokens,
        num_samples=2,
        temperature=0.5,
        prompt_logprobs=True,
        prompt_logprobs_last_n=last_n,
        topk_prompt_logprobs=3,
    )
    result = sample_one(make_sampler(directory), request)
    first = max(1, len(PROMPT) - (last_n or len(PROMPT)))
    logprobs = torch.log_softmax(logits_PV, -1)[first - 1 : -1]
    own = logprobs.gather(1, torch.from_numpy(PROMPT[first:].astype(np.int64))[:, None])[:, 0]
    best = logprobs.topk(3)
    assert result.prompt_logprobs is not None
    assert result.topk_prompt is not None
    assert result.prompt_logprobs.dtype == np.float32
    assert result.prompt_logprobs.shape == PROMPT.shape
    assert np.isnan(result.prompt_logprobs[:first]).all()
    np.testing.assert_allclose(result.prompt_logprobs[first:], own, atol=TOLERANCE)
    assert np.isnan(result.topk_prompt.logprobs[:first]).all()
    assert not result.topk_prompt.token_ids[:first].any()
    np.testing.assert_array_equal(result.topk_prompt.token_ids[first:], best.indices)
    np.testing.assert_allclose(result.topk_prompt.logprobs[first:], best.values, atol=TOLERANCE)
    assert [len(sequence.tokens) for sequence in result.sequences] == [max_tokens] * 2


def test_targets(directory: Path, logits_PV: torch.Tensor) -> None:
    targets = np.random.default_rng(1).integers(-1, VOCAB_SIZE, (len(PROMPT) - 1, 4))
    targets[:20] = -1
    targets[40:60] = -1
    result = sample_one(make_sampler(directory), ask(PROMPT, target_prompt_tokens=targets))
    logprobs = torch.log_softmax(logits_PV, -1)[:-1]
    expected = logprobs.gather(1, torch.from_numpy(np.maximum(targets, 0))).numpy()
    assert result.target_prompt_logprobs is not None
    assert result.target_prompt_logprobs.dtype == np.float32
    np.testing.assert_allclose(
        result.target_prompt_logprobs, np.where(targets < 0, 0, expected), atol=TOLERANCE
    )


def test_targets_that_ask_nothing(directory: Path) -> None:
    targets = np.full((len(PROMPT) - 1, 2), -1)
    request = ask(PROMPT, target_prompt_tokens=targets, max_tokens=0)
    result = sample_one(make_sampler(directory), request)
    assert result.target_prompt_logprobs is not None
    assert not result.target_prompt_logprobs.any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_alternatives_follow_the_scaled_distribution(
    directory: Path, logits_PV: torch.Tensor, temperature: float
) -> None:
    k, num_seeds = 20, 40
    requests = [
        ask(PROMPT, f"r{i}", seed=i, temperature=temperature, max_tokens=0, prompt_alt_tokens_k=k)
        for i in range(num_seeds)
    ]
    sampler = make_sampler(directory)
    results = sample_all(sampler, requests)
    logprobs = torch.log_softmax(logits_PV / temperature, -1)[:-1]
    drawn = []
    for result in results:
        assert result.prompt_alt is not None
        ids = result.prompt_alt.token_ids
        assert ids.shape == (len(PROMPT) - 1, k)
        expected = logprobs.gather(1, torch.from_numpy(ids.astype(np.int64)))
        np.testing.assert_allclose(result.prompt_alt.logprobs, expected, atol=TOLERANCE)
        drawn.append(ids)
    for row in (0, 77, len(PROMPT) - 2):
        counts = np.bincount(np.concatenate([ids[row] for ids in drawn]), minlength=VOCAB_SIZE)
        assert abs(chi_square(counts, logprobs[row].double().exp().numpy())) < 4


def test_alternatives_depend_on_the_seed_alone(directory: Path) -> None:
    def draw(seed: int, **settings: Any) -> bytes:
        sampler = make_sampler(directory, **settings)
        request = ask(PROMPT, seed=seed, prompt_alt_tokens_k=3, max_tokens=0)
        result = sample_one(sampler, request)
        assert result.prompt_alt is not None
        return result.prompt_alt.token_ids.tobytes()

    assert draw(1) == draw(1, prefill_chunk_tokens=13)
    assert draw(1) != draw(2)


def test_alternatives_at_temperature_zero_are_greedy(
    directory: Path, logits_PV: torch.Tensor
) -> None:
    request = ask(PROMPT, temperature=0.0, prompt_alt_tokens_k=2)
    result = sample_one(make_sampler(directory), request)
    best = torch.log_softmax(logits_PV, -1)[:-1].max(-1)
    assert result.prompt_alt is not None
    for column in range(2):
        np.testing.assert_array_equal(result.prompt_alt.token_ids[:, column], best.indices)
        np.testing.assert_allclose(
            result.prompt_alt.logprobs[:, column], best.values, atol=TOLERANCE
        )


def test_alternatives_do_not_move_the_samples(directory: Path) -> None:
    with_draws = sample_one(make_sampler(directory), ask(PROMPT, prompt_alt_tokens_k=3))
    without = sample_one(make_sampler(directory), ask(PROMPT))
    np.testing.assert_array_equal(with_draws.sequences[0].tokens, without.sequences[0].tokens)


def test_a_prompt_of_one_token(directory: Path) -> None:
    request = ask(
        PROMPT[:1],
        max_tokens=0,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_alt_tokens_k=2,
        target_prompt_tokens=np.zeros((0, 2), np.int64),
    )
    result = sample_one(make_sampler(directory), request)
    assert result.prompt_logprobs is not None
    assert result.topk_prompt is not None
    assert result.prompt_alt is not None
    assert result.target_prompt_logprobs is not None
    assert np.isnan(result.prompt_logprobs).tolist() == [True]
    assert result.topk_prompt.logprobs.shape == (1, 2)
    assert result.prompt_alt.logprobs.shape == (0, 2)
    assert result.target_prompt_logprobs.shape == (0, 2)
    assert result.sequences[0].stop_reason == StopReason.LENGTH


def test_scores_beside_other_requests(directory: Path) -> None:
    requests = [
        ask(PROMPT[: 20 + 13 * i], f"r{i}", prompt_logprobs=i % 2 == 0, seed=i) for i in range(8)
    ]
    together = sample_all(make_sampler(directory), requests)
    for request, result in zip(requests, together, strict=True):
        alone = sample_one(make_sampler(directory), request)
        assert (result.prompt_logprobs is None) == (not request.prompt_logprobs)
        if result.prompt_logprobs is not None:
            assert alone.prompt_logprobs is not None
            np.testing.assert_allclose(
                result.prompt_logprobs, alone.prompt_logprobs, atol=COMPANY_TOLERANCE
            )


def test_a_request_id_in_use_is_refused(directory: Path) -> None:
    sampler = make_sampler(directory)
    sampler.submit(ask(PROMPT))
    with pytest.raises(UserError, match="already"):
        sampler.submit(ask(PROMPT))
