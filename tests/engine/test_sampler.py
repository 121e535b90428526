"""The sampler against transformers, and against itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import SHAPE
from tests.engine.devices import DEVICES
from tests.engine.sampler_cases import (
    ask,
    make_model_directory,
    make_sampler,
    random_prompt,
    sample_all,
    sample_one,
)
from training.backends.base import Int32Array, SampleResult, StopReason
from training.core.errors import UserError

TOLERANCE = 1e-4
COMPANY_TOLERANCE = 5e-5
"""In float32: products of torch round differently for another number of rows."""
CONTEXT_LENGTH: int = SHAPE["max_position_embeddings"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def reference_logprobs(
    model: Any, prompt: Int32Array, tokens: Int32Array, temperature: float = 1.0
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of ``tokens`` after ``prompt``, in one forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    chosen: np.ndarray[Any, np.dtype[np.float32]] = logprobs.gather(1, ids[0, len(prompt) :, None])[
        :, 0
    ].numpy()
    return chosen


def assert_same(
    one: SampleResult, other: SampleResult, tolerance: float = COMPANY_TOLERANCE
) -> None:
    assert len(one.sequences) == len(other.sequences)
    for left, right in zip(one.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=tolerance, rtol=0)
        assert left.stop_reason == right.stop_reason


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window", "qwen2-window", "qwen3"])
def test_greedy_equals_transformers(name: str, device: torch.device, tmp_path: Path) -> None:
    make_model_directory(tmp_path, name)
    sampler = make_sampler(tmp_path, prefill_chunk_tokens=16, device=device)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [random_prompt(length, seed=length) for length in (1, 5, 16, 17, 40)]
    requests = [
        ask(prompt, f"r{index}", temperature=0.0, max_tokens=24)
        for index, prompt in enumerate(prompts)
    ]
    for prompt, result in zip(prompts, sample_all(sampler, requests), strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        (sequence,) = result.sequences
        np.testing.assert_array_equal(sequence.tokens, expected.numpy())
        assert sequence.stop_reason == StopReason.LENGTH
        np.testing.assert_allclose(
            sequence.logprobs,
            reference_logprobs(reference, prompt, sequence.tokens),
            atol=TOLERANCE,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_are_those_of_a_full_forward_pass(
    directory: Path, reference: Any, temperature: float
) -> None:
    prompt = random_prompt(30)
    request = ask(
        prompt, max_tokens=60, num_samples=3, temperature=temperature, top_k=20, top_p=0.9
    )
    result = sample_one(make_sampler(directory), request)
    for sequence in result.sequences:
        assert len(sequence.tokens) == 60
        expected = reference_logprobs(reference, prompt, sequence.tokens, temperature)
        np.testing.assert_allclose(sequence.logprobs, expected, atol=TOLERANCE)


def test_seed_and_index_decide_alone(directory: Path) -> None:
    prompt = random_prompt(12)
    first = sample_one(make_sampler(directory), ask(prompt, num_samples=3, seed=7))
    again = sample_one(make_sampler(directory), ask(prompt, num_samples=3, seed=7))
    fewer = sample_one(make_sampler(directory), ask(prompt, num_samples=2, seed=7))
    other = sample_one(make_sampler(directory), ask(prompt, num_samples=3, seed=8))
    negative = sample_one(make_sampler(directory), ask(prompt, num_samples=3, seed=-(2**63)))
    assert_same(first, again, tolerance=0)
    for left, right in zip(first.sequences[:2], fewer.sequences, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
    drawn = [first.sequences, other.sequences, negative.sequences]
    texts = {tuple(sequence.tokens) for sequences in drawn for sequence in sequences}
    assert len(texts) == 9


def test_many_at_once_equal_each_alone(directory: Path) -> None:
    requests = [
        ask(
            random_prompt(3 + 11 * index, seed=index),
            f"r{index}",
            seed=index,
            max_tokens=10 + 7 * (index % 5),
            num_samples=1 + index % 3,
            temperature=(1.0, 0.0, 0.7)[index % 3],
            top_k=(-1, 5, -1)[index % 3],
            top_p=(1.0, 1.0, 0.8)[index % 3],
        )
        for index in range(14)
    ]
    together = sample_all(make_sampler(directory), requests)
    for request, result in zip(requests, together, strict=True):
        assert_same(result, sample_one(make_sampler(directory), request))


def test_requests_join_between_steps(directory: Path) -> None:
    sampler = make_sampler(directory)
    requests = [ask(random_prompt(9, seed=i), f"r{i}", max_tokens=12, seed=i) for i in range(6)]
    ended: dict[str, Any] = {}
    for request in requests:
        sampler.submit(request)
        for _ in range(3):
            ended |= dict(sampler.step())
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
    for request in requests:
        assert_same(ended[request.request_id], sample_one(make_sampler(directory), request))


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunked_prefill_equals_whole(directory: Path, chunk: int) -> None:
    requests = [
        ask(random_prompt(90, seed=i), f"r{i}", prompt_logprobs=True, seed=i) for i in range(3)
    ]
    whole = sample_all(make_sampler(directory, prefill_chunk_tokens=1000), requests)
    chunked = sample_all(make_sampler(directory, prefill_chunk_tokens=chunk), requests)
    for left, right in zip(whole, chunked, strict=True):
        assert_same(left, right)
        assert left.prompt_logprobs is not None
        assert right.prompt_logprobs is not None
        np.testing.assert_allclose(
            left.prompt_logprobs, right.prompt_logprobs, atol=COMPANY_TOLERANCE
        )


def test_common_beginnings_are_reused(directory: Path) -> None:
    sampler = make_sampler(directory)
    prompt = random_prompt(50)
    first = sample_one(sampler, ask(prompt, num_samples=4, max_tokens=20))
    assert first.prompt_cache_hit_tokens == 0
    longer = np.concatenate([prompt, first.sequences[2].tokens, random_prompt(5, seed=9)])
    second = sample_one(sampler, ask(longer, "s", max_tokens=20))
    assert second.prompt_cache_hit_tokens == 50 + 20 - 1  # the last token sampled was never read
    fresh = sample_one(make_sampler(directory), ask(longer, "s", max_tokens=20))
    assert fresh.prompt_cache_hit_tokens == 0
    assert_same(second, fresh)
    scored = sample_one(sampler, ask(longer, "t", prompt_logprobs=True, prompt_logprobs_last_n=10))
    assert scored.prompt_cache_hit_tokens == len(longer) - 1 - 10
    assert scored.prompt_logprobs is not None
    expected = sample_one(make_sampler(directory), ask(longer, prompt_logprobs=True))
    assert expected.prompt_logprobs is not None
    np.testing.assert_allclose(
        scored.prompt_logprobs[-10:], expected.prompt_logprobs[-10:], atol=COMPANY_TOLERANCE
    )


def test_a_small_cache_delays_but_finishes_all(directory: Path) -> None:
    sampler = make_sampler(directory, kv_cache_tokens=256, prefill_chunk_tokens=32)
    requests = [
        ask(random_prompt(20 + 9 * i, seed=i), f"r{i}", max_tokens=25, num_samples=3, seed=i)
        for i in range(8)
    ]
    results = sample_all(sampler, requests)
    for request, result in zip(requests, results, strict=True):
        assert_same(result, sample_one(make_sampler(directory), request))


def test_the_running_limit_delays_but_finishes_all(directory: Path) -> None:
    sampler = make_sampler(directory, max_running_sequences=2)
    requests = [ask(random_prompt(5, seed=i), f"r{i}", num_samples=5) for i in range(3)]
    for request in requests:
        sampler.submit(request)
    while sampler.has_work:
        sampler.step()
        assert sampler.num_running <= 2


def test_what_never_fits_is_refused_at_once(directory: Path) -> None:
    sampler = make_sampler(directory, kv_cache_tokens=128)
    with pytest.raises(UserError, match="kv_cache_tokens"):
        sampler.submit(ask(random_prompt(100), max_tokens=30))
    assert (
        len(sample_one(sampler, ask(random_prompt(100), max_tokens=29)).sequences[0].tokens) == 29
    )


def test_the_context_limit_ends_with_length(directory: Path) -> None:
    sampler = make_sampler(directory)
    limit = sampler.max_sequence_tokens
    assert limit == CONTEXT_LENGTH
    (sequence,) = sample_one(sampler, ask(random_prompt(limit - 12), max_tokens=100)).sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (12, StopReason.LENGTH)
    (sequence,) = sample_one(sampler, ask(random_prompt(limit), max_tokens=1)).sequences
    assert len(sequence.tokens) == 1
    with pytest.raises(UserError, match="context"):
        sampler.submit(ask(random_prompt(limit + 1), max_tokens=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": np.zeros(0, np.int32)},
        {"prompt": np.array([300], np.int32)},
        {"prompt": np.array([-1], np.int32)},
        {"num_samples": 0},
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-9},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop_strings": ("",)},
        {"topk_sample_logprobs": 21},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 0},
        {"target_prompt_tokens": np.zeros((3, 1), np.int64)},
        {"target_prompt_tokens": np.full((4, 1), 300, np.int64)},
        {"snapshot_id": "unknown"},
    ],
)
def test_bad_requests_are_refused(directory: Path, settings: dict[str, Any]) -> None:
    sampler = make_sampler(directory)
    prompt = settings.pop("prompt", random_prompt(5))
    with pytest.raises(UserError):
        sampler.submit(ask(prompt, **settings))
    assert not sampler.has_work


def test_cancel_ends_one_request_alone(directory: Path) -> None:
    sampler = make_sampler(directory, max_running_sequences=3)
    for name in "abcd":
        sampler.submit(ask(random_prompt(40, seed=ord(name)), name, num_samples=2))
    ended = dict(sampler.step())
    sampler.cancel("a")
    sampler.cancel("d")
    sampler.cancel("unknown")
    sampler.check_integrity()
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
    assert isinstance(ended["a"], UserError)
    assert isinstance(ended["d"], UserError)
    alone = sample_one(
        make_sampler(directory), ask(random_prompt(40, seed=ord("b")), num_samples=2)
    )
    assert isinstance(ended["b"], SampleResult)
    assert_same(ended["b"], alone)


def test_top_of_sampled_positions(directory: Path, reference: Any) -> None:
    prompt = random_prompt(10)
    request = ask(prompt, topk_sample_logprobs=4, temperature=0.6, max_tokens=7)
    (sequence,) = sample_one(make_sampler(directory), request).sequences
    ids = torch.from_numpy(np.concatenate([prompt, sequence.tokens]).astype(np.int64))[None]
    with torch.no_grad():
        expected = torch.log_softmax(reference(ids).logits[0, 9:-1] / 0.6, -1).topk(4)
    assert sequence.topk is not None
    np.testing.assert_array_equal(sequence.topk.token_ids, expected.indices.numpy())
    np.testing.assert_allclose(sequence.topk.logprobs, expected.values.numpy(), atol=TOLERANCE)


def test_each_piece_of_work_is_told_of_before_it_begins(directory: Path) -> None:
    """A request that is let in, then those whose rows are computed: none of a request that waits,
    and a prompt that gets no rows is none of the step's."""
    sampler = make_sampler(directory, max_running_sequences=3, prefill_chunk_tokens=20)
    for name, num_tokens in (("first", 60), ("second", 50), ("third", 4), ("waits", 4)):
        sampler.submit(ask(random_prompt(num_tokens, len(name)), name, max_tokens=9))
    told: list[set[str]] = []
    sampler.step(told.append)
    assert told == [{"first"}, {"second"}, {"third"}, {"first", "second", "third"}]
    told.clear()
    sampler.step(told.append)
    assert told == [{"first", "second", "third"}]
    sampler.cancel("second")
    told.clear()
    sampler.step(told.append)
    assert told == [{"waits"}, {"first", "third", "waits"}]


def test_a_prompt_without_rows_is_not_part_of_a_step(directory: Path) -> None:
    sampler = make_sampler(directory, prefill_chunk_tokens=20)
    for name, num_tokens in (("oldest", 60), ("short", 12), ("long", 50)):
        sampler.submit(ask(random_prompt(num_tokens, num_tokens), name))
    told: list[set[str]] = []
    sampler.step(told.append)
    assert told[-1] == {"oldest", "short"}
