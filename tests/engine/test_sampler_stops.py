"""Where a sampled sequence ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.engine.sampler_cases import (
    ask,
    byte_tokenizer,
    make_model_directory,
    make_sampler,
    random_prompt,
    sample_one,
)
from training.backends.base import StopReason

PROMPT = random_prompt(10)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def free_run(directory: Path) -> list[int]:
    """200 tokens without any stop; the model's end token (2) among them is nothing special."""
    (sequence,) = sample_one(make_sampler(directory), ask(PROMPT, max_tokens=200)).sequences
    assert sequence.stop_reason == StopReason.LENGTH
    assert len(sequence.tokens) == 200
    tokens: list[int] = sequence.tokens.tolist()
    return tokens


def test_a_stop_token_ends_and_stays(directory: Path, free_run: list[int]) -> None:
    stops = (free_run[30], free_run[60])
    place = min(free_run.index(stop) for stop in stops)
    request = ask(PROMPT, max_tokens=200, stop_token_ids=stops)
    (sequence,) = sample_one(make_sampler(directory), request).sequences
    assert sequence.tokens.tolist() == free_run[: place + 1]
    assert len(sequence.logprobs) == place + 1
    assert sequence.stop_reason == StopReason.STOP


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_a_stop_string_ends_with_the_token_that_completes_it(
    directory: Path, free_run: list[int], num_tokens: int
) -> None:
    tokenizer = byte_tokenizer()
    texts = [
        tokenizer.decode(free_run[: place + 1], skip_special_tokens=False) for place in range(200)
    ]
    for place in range(20, 180, 7):
        stop = tokenizer.decode(free_run[place : place + num_tokens], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        expected = next(index for index, text in enumerate(texts) if stop in text)
        request = ask(PROMPT, max_tokens=200, stop_strings=("never seen", stop))
        (sequence,) = sample_one(make_sampler(directory), request).sequences
        assert sequence.tokens.tolist() == free_run[: expected + 1]
        assert sequence.stop_reason == StopReason.STOP


def test_a_stop_at_the_last_allowed_token_is_a_stop(directory: Path, free_run: list[int]) -> None:
    place = free_run.index(free_run[40])
    request = ask(PROMPT, max_tokens=place + 1, stop_token_ids=(free_run[40],))
    (sequence,) = sample_one(make_sampler(directory), request).sequences
    assert len(sequence.tokens) == place + 1
    assert sequence.stop_reason == StopReason.STOP


def test_samples_stop_on_their_own(directory: Path) -> None:
    request = ask(PROMPT, max_tokens=60, num_samples=8, stop_token_ids=tuple(range(3, 15)))
    sequences = sample_one(make_sampler(directory), request).sequences
    lengths = [len(sequence.tokens) for sequence in sequences]
    assert len(set(lengths)) > 2
    for sequence in sequences:
        stopped = np.isin(sequence.tokens, range(3, 15))
        assert not stopped[:-1].any()
        assert stopped[-1] == (sequence.stop_reason == StopReason.STOP)
