"""All fast paths of torch together against none: training, sampling, and the two beside each other.

On CUDA these are the real ones; on the CPU plain kernels stand in for those that only a GPU has.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from tests.engine.devices import CPU, DEVICES, NEEDS_CUDA, fast_paths, load_model
from tests.engine.sampler_cases import (
    ask,
    make_adapter,
    make_model_directory,
    random_prompt,
    sample_all,
    sampler_on,
)
from tests.engine.training_cases import (
    finish,
    gradient,
    make_trainer,
    relative_error,
    sft_op,
    unit,
)
from training.backends.base import LoraSpec, SampleResult
from training.engine.model import Transformer
from training.engine.torch_paths import FastPaths
from training.engine.torch_probe import GROUPED_MAJORS, probed_paths

TENANTS = (LoraSpec(8, 1), LoraSpec(8, 2), LoraSpec(16, 3, train_mlp=False))
"""The first two can share grouped products; with the third of other rank the loop does it."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-window", "qwen3-tied"])
@pytest.mark.parametrize("num_tenants", [2, 3])
def test_bfloat16_training_is_as_near_to_float32_as_without_them(
    num_tenants: int, name: str, device: torch.device, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(name, tmp_path)
    specs = TENANTS[:num_tenants]
    ops = [sft_op(slot, (20, 7, 20, 33), slot) for slot in range(num_tenants)]
    fast, plain = (
        make_trainer(checkpoint, *specs, dtype=torch.bfloat16, join_operations=True, device=device)
        for _ in range(2)
    )
    assert isinstance(fast.model, Transformer)
    assert isinstance(plain.model, Transformer)
    fast.model.paths, plain.model.paths = fast_paths(fast.model), FastPaths()
    exact = make_trainer(checkpoint, *specs, join_operations=True)
    logprobs = [
        [np.concatenate(each.logprobs) for each in finish(trainer.forward_backward(unit(*ops)))]
        for trainer in (fast, plain, exact)
    ]
    for ours, theirs, right in zip(*logprobs, strict=True):
        assert np.linalg.norm(ours - right) < 1.5 * np.linalg.norm(theirs - right)
    for slot in range(num_tenants):
        right_gradient = gradient(exact, slot)
        ours_off = relative_error(gradient(fast, slot).cpu(), right_gradient)
        assert ours_off < 1.5 * relative_error(gradient(plain, slot).cpu(), right_gradient)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_float32_sampling_draws_the_same_tokens(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    """Prompts of many lengths, of the base model and of two adapters, at once and alone."""
    make_model_directory(tmp_path, name)
    results: list[list[SampleResult]] = []
    plain = Transformer.from_directory(tmp_path, CPU, torch.float32)
    adapters = [make_adapter(plain, tmp_path / str(n), LoraSpec(8, n)) for n in (1, 2)]
    fast = load_model(tmp_path, device, torch.float32)
    fast.paths = fast_paths(fast)
    for model in (fast, plain):
        sampler = sampler_on(model, tmp_path, prefill_chunk_tokens=16)
        for number, adapter in enumerate(adapters):
            sampler.publish(f"snapshot {number}", adapter)
        snapshots = (None, "snapshot 0", "snapshot 0", "snapshot 1")
        requests = [
            ask(random_prompt(3 + 29 * n, n), f"r{n}", snapshot_id=snapshot, num_samples=2)
            for n, snapshot in enumerate(snapshots)
        ]
        together = sample_all(sampler, requests)
        alone = [sample_all(sampler, [request])[0] for request in requests]
        results.append([*together, *alone])
    for ours, theirs in zip(*results, strict=True):
        for mine, other in zip(ours.sequences, theirs.sequences, strict=True):
            np.testing.assert_array_equal(mine.tokens, other.tokens)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, rtol=0, atol=1e-4)


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_gpu_takes_every_path_that_its_kind_has(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    model = Transformer.from_directory(make_checkpoint("wide", tmp_path), device, dtype)
    major, _ = torch.cuda.get_device_capability()
    with caplog.at_level(logging.WARNING):
        paths = probed_paths(model)
    assert not caplog.records
    assert paths.capture is not None
    assert paths.in_order
    assert (paths.varlen is not None) == (dtype == torch.bfloat16)
    assert paths.grouped == (dtype == torch.bfloat16 and major in GROUPED_MAJORS)
