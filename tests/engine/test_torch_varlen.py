"""Attention by one call, with the plain kernel in the place of the GPU's: what surrounds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from tests.engine.sampler_cases import (
    ask,
    make_model_directory,
    random_prompt,
    sample_all,
    sampler_on,
)
from tests.engine.training_cases import (
    ALL,
    CPU,
    MLP,
    finish,
    gradient,
    make_trainer,
    relative_error,
    sft_op,
    unit,
)
from training.engine.attention import fused_attention
from training.engine.model import Transformer
from training.engine.torch_paths import FastPaths
from training.engine.torch_varlen import Jagged, plain_varlen

PLAIN = FastPaths(varlen=plain_varlen)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_the_plain_kernel_is_attention_of_each_sequence(window: int | None) -> None:
    lengths = (5, 1, 12)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(18, count, 16, generator=generator) for count in (4, 2, 2))
    found = plain_varlen(q, k, v, Jagged(lengths, lengths, CPU), window)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        expected = fused_attention(q[None, rows], k[None, rows], v[None, rows], window)[0]
        torch.testing.assert_close(found[rows], expected)
        start += length


@pytest.mark.parametrize("window", [None, 3])
def test_queries_are_the_last_positions_of_their_keys(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, count, 16, generator=generator) for count in (4, 2, 2))
    whole = plain_varlen(q, k, v, Jagged([9, 11], [9, 11], CPU), window)
    rows = torch.tensor([7, 8, 19])
    found = plain_varlen(q[rows], k, v, Jagged([2, 1], [9, 11], CPU), window)
    torch.testing.assert_close(found, whole[rows])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window"])
def test_training_gets_the_same_gradients(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name, tmp_path)
    ops = [sft_op(slot, (20, 7, 20, 33), slot) for slot in range(2)]
    found, expected = (make_trainer(checkpoint, ALL, MLP, join_operations=True) for _ in range(2))
    assert isinstance(found.model, Transformer)
    found.model.paths = PLAIN
    outputs = [finish(each.forward_backward(unit(*ops))) for each in (found, expected)]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(
            np.concatenate(ours.logprobs), np.concatenate(theirs.logprobs), rtol=0, atol=2e-5
        )
    for slot in range(2):
        assert relative_error(gradient(found, slot), gradient(expected, slot)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_sampling_gets_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Prompts in chunks beside decoding sequences, and prompts that begin alike."""
    make_model_directory(tmp_path, name)
    first = random_prompt(70)
    prompts = [first, random_prompt(3, 1), np.concatenate([first[:64], random_prompt(9, 2)])]
    requests = [ask(prompt, f"r{index}", num_samples=2) for index, prompt in enumerate(prompts)]
    plain = Transformer.from_directory(tmp_path, CPU, torch.float32)
    fast = Transformer(plain.config, plain.weights, PLAIN)
    found, expected = (
        sample_all(sampler_on(model, tmp_path, prefill_chunk_tokens=16), requests)
        for model in (fast, plain)
    )
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours.sequences, theirs.sequences, strict=True):
            np.testing.assert_array_equal(mine.tokens, other.tokens)
            np.testing.assert_allclose(mine.logprobs, other.logprobs, rtol=0, atol=3e-5)
