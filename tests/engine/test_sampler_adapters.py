"""Many adapters in one batch, their life, and requests that fail alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine.sampler_cases import (
    CPU,
    ask,
    make_adapter,
    make_model_directory,
    make_sampler,
    outcomes,
    random_prompt,
    sample_all,
    sample_one,
)
from tests.engine.test_sampler import COMPANY_TOLERANCE, TOLERANCE, assert_same, reference_logprobs
from training.backends.base import LoraSpec, SampleResult
from training.core.errors import UserError
from training.engine.adapter import AdapterLayout
from training.engine.adapter_files import WEIGHTS_FILE
from training.engine.decoder import BLOCK_TOKENS
from training.engine.model import Transformer
from training.engine.sampler import Sampler
from training.engine.torch_sampling import TorchKvCache

SPECS: Mapping[str, LoraSpec] = {
    "all": LoraSpec(rank=4, seed=1),
    "attn": LoraSpec(rank=8, seed=2, train_mlp=False, train_unembed=False),
    "mlp": LoraSpec(rank=3, seed=3, train_attn=False, train_unembed=False),
    "head": LoraSpec(rank=2, seed=4, train_attn=False, train_mlp=False),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model_directory(tmp_path_factory.mktemp("model"))
    model = Transformer.from_directory(path, CPU, torch.float32)
    for name, spec in SPECS.items():
        make_adapter(model, path / name, spec)
    return path


def adapted_sampler(directory: Path, **settings: Any) -> Sampler:
    sampler = make_sampler(directory, **settings)
    for name in SPECS:
        sampler.publish(name, directory / name)
    return sampler


def damage(directory: Path, value: float) -> Path:
    tensors = load_file(directory / WEIGHTS_FILE)
    for tensor in tensors.values():
        tensor.fill_(value)
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", SPECS)
def test_equals_peft(directory: Path, name: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(directory)
    reference = PeftModel.from_pretrained(base, str(directory / name))
    prompt = random_prompt(20)
    request = ask(prompt, snapshot_id=name, max_tokens=20, num_samples=2, prompt_logprobs=True)
    result = sample_one(adapted_sampler(directory), request)
    for sequence in result.sequences:
        expected = reference_logprobs(reference, prompt, sequence.tokens)
        np.testing.assert_allclose(sequence.logprobs, expected, atol=TOLERANCE)
    assert result.prompt_logprobs is not None
    expected = reference_logprobs(reference, prompt[:1], prompt[1:])
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected, atol=TOLERANCE)


def test_a_mixed_batch_equals_each_alone(directory: Path) -> None:
    snapshots = [None, *SPECS]
    requests = [
        ask(
            random_prompt(5 + 6 * index, seed=index),
            f"r{index}",
            snapshot_id=snapshots[index % len(snapshots)],
            seed=index,
            num_samples=1 + index % 2,
            prompt_logprobs=index % 3 == 0,
        )
        for index in range(15)
    ]
    together = sample_all(adapted_sampler(directory), requests)
    for request, result in zip(requests, together, strict=True):
        alone = sample_one(adapted_sampler(directory), request)
        assert_same(result, alone)
        if alone.prompt_logprobs is not None:
            assert result.prompt_logprobs is not None
            np.testing.assert_allclose(
                result.prompt_logprobs, alone.prompt_logprobs, atol=COMPANY_TOLERANCE
            )


def test_prefixes_are_not_shared_between_weights(directory: Path) -> None:
    sampler = adapted_sampler(directory)
    prompt = random_prompt(40)
    for snapshot in (None, *SPECS):
        request = ask(prompt, snapshot_id=snapshot)
        result = sample_one(sampler, request)
        assert result.prompt_cache_hit_tokens == 0
        assert_same(result, sample_one(adapted_sampler(directory), request))
    again = sample_one(sampler, ask(prompt, snapshot_id="mlp"))
    assert again.prompt_cache_hit_tokens == 39


def test_republishing_affects_later_requests_only(directory: Path, tmp_path: Path) -> None:
    prompt = random_prompt(30)
    moving = tmp_path / "moving"
    shutil.copytree(directory / "attn", moving)
    sampler = make_sampler(directory, max_running_sequences=1)
    sampler.publish("moving", moving)
    sampler.submit(ask(prompt, "running", snapshot_id="moving"))
    sampler.submit(ask(prompt, "waiting", snapshot_id="moving"))
    sampler.step()
    sampler.publish("moving", directory / "all")
    shutil.rmtree(moving)
    ended = outcomes(sampler, [ask(prompt, "later", snapshot_id="moving")])
    for name, expected in (("running", "attn"), ("waiting", "attn"), ("later", "all")):
        alone = sample_one(adapted_sampler(directory), ask(prompt, snapshot_id=expected))
        result = ended[name][1]
        assert isinstance(result, SampleResult)
        assert result.prompt_cache_hit_tokens == 0
        assert_same(result, alone)


def test_retired_snapshots_serve_what_was_submitted(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory / "mlp", tmp_path / "mlp")
    sampler = make_sampler(directory)
    sampler.publish("s", tmp_path / "mlp")
    request = ask(random_prompt(30), snapshot_id="s")
    sampler.submit(request)
    sampler.retire("s")
    sampler.retire("unknown")
    shutil.rmtree(tmp_path / "mlp")
    with pytest.raises(UserError, match="published"):
        sampler.submit(ask(random_prompt(30), "other", snapshot_id="s"))
    result = outcomes(sampler, [])["r"][1]
    assert isinstance(result, SampleResult)
    assert_same(
        result, sample_one(adapted_sampler(directory), ask(request.prompt, snapshot_id="mlp"))
    )
    assert sampler._blocks.available * BLOCK_TOKENS == sampler._blocks.num_tokens


def test_a_submitted_snapshot_whose_files_went_before_it_was_retired(
    directory: Path, tmp_path: Path
) -> None:
    sampler = make_sampler(directory)
    sampler.publish("s", tmp_path / "nowhere")
    sampler.submit(ask(random_prompt(5), snapshot_id="s"))
    sampler.retire("s")
    assert isinstance(outcomes(sampler, [])["r"][1], UserError)


def test_few_adapters_stay_in_memory(directory: Path) -> None:
    all_bytes = sum(
        4 * AdapterLayout.of(adapted_sampler(directory)._decoder.config, spec).num_params
        for spec in SPECS.values()
    )
    sampler = adapted_sampler(directory, sampling_adapter_bytes=all_bytes - 1)
    names = list(SPECS) * 2
    requests = [ask(random_prompt(8), f"r{i}", snapshot_id=name) for i, name in enumerate(names)]
    results = sample_all(sampler, requests)
    assert sampler._adapters.num_cached == len(SPECS) - 1
    for name, result in zip(names, results, strict=True):
        request = ask(random_prompt(8), snapshot_id=name)
        assert_same(result, sample_one(adapted_sampler(directory), request))


def broken_weights(directory: Path) -> None:
    path = directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("break_files", [broken_weights, shutil.rmtree])
def test_damaged_files_fail_their_requests_alone(
    directory: Path, tmp_path: Path, break_files: Any
) -> None:
    shutil.copytree(directory / "all", tmp_path / "damaged")
    break_files(tmp_path / "damaged")
    sampler = adapted_sampler(directory)
    sampler.publish("damaged", tmp_path / "damaged")
    names = ["mlp", "damaged", None, "damaged"]
    requests = [
        ask(random_prompt(9), f"r{i}", snapshot_id=name, num_samples=3)
        for i, name in enumerate(names)
    ]
    ended = outcomes(sampler, requests)
    for request, name in zip(requests, names, strict=True):
        result = ended[request.request_id][1]
        if name == "damaged":
            assert isinstance(result, UserError)
            continue
        assert isinstance(result, SampleResult)
        expected = ask(request.prompt, snapshot_id=name, num_samples=3)
        assert_same(result, sample_one(adapted_sampler(directory), expected))


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 0, "prompt_logprobs": True}])
def test_weights_of_nan_leave_no_trace(
    directory: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Cells of the cache that held NaN are used by others later."""
    shutil.copytree(directory / "all", tmp_path / "nan")
    sampler = adapted_sampler(directory, kv_cache_tokens=256, prefill_chunk_tokens=16)
    sampler.publish("nan", damage(tmp_path / "nan", float("nan")))
    ended = outcomes(sampler, [ask(random_prompt(60), "nan", snapshot_id="nan", **settings)])
    assert isinstance(ended["nan"][1], UserError)
    ended = outcomes(sampler, [ask(random_prompt(20, seed=2), "good", num_samples=4)])
    good = ended["good"][1]
    assert isinstance(good, SampleResult)
    alone = ask(random_prompt(20, seed=2), "good", num_samples=4)
    assert_same(good, sample_one(make_sampler(directory), alone))
    assert isinstance(sampler._cache, TorchKvCache)
    assert not bool(torch.isnan(sampler._cache.k).any())
    assert not bool(torch.isnan(sampler._cache.v).any())
