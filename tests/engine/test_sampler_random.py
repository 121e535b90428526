"""The sampler under random company: whatever else is submitted, cancelled or pushed out of a small
cache, a request gives what it gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.sampler_cases import (
    CPU,
    ask,
    make_adapter,
    make_model_directory,
    make_sampler,
    random_prompt,
    sample_one,
)
from tests.engine.test_sampler import assert_same
from training.backends.base import LoraSpec, SampleRequest, SampleResult
from training.core.errors import UserError
from training.engine.model import Transformer
from training.engine.sampler import Sampler

LONG = random_prompt(140)
REQUESTS = [
    ask(
        np.concatenate([LONG[: 45 * (index % 4)], random_prompt(3 + index, seed=index)]),
        f"r{index}",
        snapshot_id=(None, "a", None, "b")[index % 4],
        seed=index,
        num_samples=(1, 3, 6)[index % 3],
        max_tokens=(0, 5, 20, 50, 70)[index % 5],
        temperature=(1.0, 0.0, 0.7)[index % 3],
        top_p=(1.0, 0.9)[index % 2],
        topk_sample_logprobs=(0, 0, 3)[index % 3],
        prompt_logprobs=index % 4 == 1,
        prompt_logprobs_last_n=None if index % 8 == 1 else 20,
    )
    for index in range(24)
]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "step", "cancel"]), st.integers(0, 23)),
    min_size=4,
    max_size=60,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model_directory(tmp_path_factory.mktemp("model"))
    model = Transformer.from_directory(path, CPU, torch.float32)
    for seed, name in enumerate("ab"):
        make_adapter(model, path / name, LoraSpec(rank=4, seed=seed))
    return path


def open_sampler(directory: Path, **limits: int) -> Sampler:
    sampler = make_sampler(directory, **limits)
    for name in "ab":
        sampler.publish(name, directory / name)
    return sampler


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[str, SampleResult]:
    return {
        request.request_id: sample_one(open_sampler(directory), request) for request in REQUESTS
    }


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    actions=ACTIONS,
    num_blocks=st.integers(8, 24),
    max_running=st.integers(1, 12),
    chunk=st.integers(1, 80),
)
def test_company_changes_nothing(
    directory: Path,
    alone: dict[str, SampleResult],
    actions: list[tuple[str, int]],
    num_blocks: int,
    max_running: int,
    chunk: int,
) -> None:
    sampler = open_sampler(
        directory,
        kv_cache_tokens=num_blocks * 32,
        max_running_sequences=max_running,
        prefill_chunk_tokens=chunk,
    )
    ended: dict[str, SampleResult | Exception] = {}
    submitted: dict[str, SampleRequest] = {}
    cancelled: set[str] = set()
    for action, number in actions:
        request = REQUESTS[number]
        if action == "submit" and request.request_id not in submitted:
            sampler.submit(request)
            submitted[request.request_id] = request
        elif action == "cancel":
            sampler.cancel(request.request_id)
            cancelled |= {request.request_id} & (set(submitted) - set(ended))
        else:
            for _ in range(number % 5):
                ended |= dict(sampler.step())
                sampler.check_integrity()
        sampler.check_integrity()
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
        assert sampler.num_running <= max_running
    assert set(ended) == set(submitted)
    for name, result in ended.items():
        if name in cancelled:
            assert isinstance(result, UserError)
            continue
        assert isinstance(result, SampleResult)
        assert_same(result, alone[name], tolerance=1e-4)
        if alone[name].prompt_logprobs is not None:
            assert result.prompt_logprobs is not None
            np.testing.assert_allclose(
                result.prompt_logprobs, alone[name].prompt_logprobs, atol=1e-4
            )
    assert sampler.num_waiting == sampler.num_running == 0
    assert sampler._blocks.available == num_blocks


def test_a_cache_too_small_for_all_makes_sequences_give_way(
    directory: Path, alone: dict[str, SampleResult]
) -> None:
    """The test above proves something about giving way only if it happens."""
    sampler = open_sampler(directory, kv_cache_tokens=10 * 32, max_running_sequences=12)
    growing = [request for request in REQUESTS if request.max_tokens >= 50]
    for request in growing:
        sampler.submit(request)
    ended = {}
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
    assert sampler.num_given_way > 5
    for request in growing:
        result = ended[request.request_id]
        assert isinstance(result, SampleResult)
        assert_same(result, alone[request.request_id], tolerance=1e-4)
