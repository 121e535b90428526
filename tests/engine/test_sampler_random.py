"""The sampler under random company: whatever else is submitted, cancelled or pushed out of a small
cache, a request gives what it gives alone. On our own kernels to the last bit; torch's products
round differently for another number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
    random_prompt,
    sample_one,
    sampler_on,
)
from tests.engine.test_sampler import assert_same
from training.backends.base import Float32Array, LoraSpec, SampleResult
from training.core.errors import UserError
from training.engine.decoder import BLOCK_TOKENS, Decoder
from training.engine.model import Transformer
from training.engine.native.build import BuildError
from training.engine.native.decoder import NativeDecoder
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
        tenant=("", "one", "two")[index * 7 // 5 % 3],
    )
    for index in range(24)
]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "step", "cancel"]), st.integers(0, 23)),
    min_size=4,
    max_size=60,
)


@dataclass
class Case:
    decoder: Decoder
    directory: Path
    tolerance: float

    def sampler(self, **limits: Any) -> Sampler:
        sampler = sampler_on(self.decoder, self.directory, **limits)
        for name in "ab":
            sampler.publish(name, self.directory / name)
        return sampler

    @cached_property
    def alone(self) -> dict[str, SampleResult]:
        return {request.request_id: sample_one(self.sampler(), request) for request in REQUESTS}

    def check(self, name: str, result: SampleResult) -> None:
        alone = self.alone[name]
        assert_same(result, alone, self.tolerance)
        for mine, other in zip(result.sequences, alone.sequences, strict=True):
            assert (mine.topk is None) == (other.topk is None)
            if mine.topk is not None and other.topk is not None:
                assert_close(mine.topk.logprobs, other.topk.logprobs, self.tolerance)
        if alone.prompt_logprobs is not None:
            assert result.prompt_logprobs is not None
            assert_close(result.prompt_logprobs, alone.prompt_logprobs, self.tolerance)


def assert_close(left: Float32Array, right: Float32Array, tolerance: float) -> None:
    np.testing.assert_allclose(left, right, atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=["torch", "native"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = make_model_directory(tmp_path_factory.mktemp("model"))
    model = Transformer.from_directory(directory, CPU, torch.float32)
    make_adapter(model, directory / "a", LoraSpec(rank=4, seed=1))
    attention_only = LoraSpec(rank=40, seed=2, train_mlp=False, train_unembed=False)
    make_adapter(model, directory / "b", attention_only)
    if request.param == "torch":
        return Case(model, directory, tolerance=1e-4)
    try:
        native = NativeDecoder.from_directory(directory)
    except BuildError as error:
        pytest.skip(f"no native kernels: {error}")
    assert native.is_batch_invariant
    return Case(native, directory, tolerance=0)


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
    case: Case,
    actions: list[tuple[str, int]],
    num_blocks: int,
    max_running: int,
    chunk: int,
) -> None:
    sampler = case.sampler(
        kv_cache_tokens=num_blocks * BLOCK_TOKENS,
        max_running_sequences=max_running,
        prefill_chunk_tokens=chunk,
    )
    ended: dict[str, SampleResult | Exception] = {}
    submitted: set[str] = set()
    cancelled: set[str] = set()
    for action, number in actions:
        request = REQUESTS[number]
        if action == "submit" and request.request_id not in submitted:
            sampler.submit(request)
            submitted.add(request.request_id)
        elif action == "cancel":
            sampler.cancel(request.request_id)
            cancelled |= {request.request_id} & (submitted - set(ended))
        else:
            for _ in range(number % 5):
                ended |= dict(sampler.step())
                sampler.check_integrity()
        sampler.check_integrity()
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
        assert sampler.num_running <= max_running
    assert set(ended) == submitted
    for name, result in ended.items():
        if name in cancelled:
            assert isinstance(result, UserError)
        else:
            assert isinstance(result, SampleResult)
            case.check(name, result)
    assert sampler.num_waiting == sampler.num_running == 0
    assert sampler._blocks.available == num_blocks


def test_a_cache_too_small_for_all_makes_sequences_give_way(case: Case) -> None:
    """The test above proves something about giving way only if it happens."""
    sampler = case.sampler(kv_cache_tokens=10 * BLOCK_TOKENS, max_running_sequences=12)
    growing = [request for request in REQUESTS if request.max_tokens >= 50]
    for request in growing:
        sampler.submit(request)
    ended: dict[str, SampleResult | Exception] = {}
    while sampler.has_work:
        ended |= dict(sampler.step())
        sampler.check_integrity()
    assert sampler.num_given_way > 5
    for request in growing:
        result = ended[request.request_id]
        assert isinstance(result, SampleResult)
        case.check(request.request_id, result)
