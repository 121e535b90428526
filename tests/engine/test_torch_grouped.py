"""Grouped LoRA products in bfloat16 against the loop over segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from tests.engine.training_cases import (
    ALL,
    CPU,
    finish,
    gradient,
    make_trainer,
    relative_error,
    sft_op,
    unit,
)
from training.backends.base import LoraSpec
from training.engine.adapter import AdapterLayout, Segment
from training.engine.model import Transformer
from training.engine.torch_grouped import MOST_BYTES, AdapterStacks
from training.engine.torch_paths import FastPaths
from training.engine.torch_probe import grouped_error, random_adapter

GROUPED = FastPaths(grouped=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-biases", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Transformer:
    return Transformer.from_directory(checkpoint, CPU, torch.bfloat16)


def test_products_and_gradients_are_those_of_the_loop(model: Transformer) -> None:
    """Segments of 7, 12 (without an adapter) and 41 rows; every group of a layer, and the head.
    The sums round to bfloat16 in other places."""
    assert grouped_error(model) < 1e-2


def test_a_training_pass_of_two_tenants(checkpoint: Path) -> None:
    """As near to float32 as the loop is."""
    specs = [LoraSpec(8, 1, train_mlp=False), LoraSpec(8, 2, train_mlp=False)]
    ops = [sft_op(slot, (20, 7, 33), slot) for slot in range(2)]
    found, expected, exact = (
        make_trainer(checkpoint, *specs, dtype=dtype, join_operations=True)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    assert isinstance(found.model, Transformer)
    found.model.paths = GROUPED
    logprobs = [
        [np.concatenate(each.logprobs) for each in finish(trainer.forward_backward(unit(*ops)))]
        for trainer in (found, expected, exact)
    ]
    assert found.model._stacks._kept, "the fast path was not taken"
    for ours, theirs, right in zip(*logprobs, strict=True):
        assert np.linalg.norm(ours - right) < 1.5 * np.linalg.norm(theirs - right)
    for slot in range(2):
        right_gradient = gradient(exact, slot)
        ours_off = relative_error(gradient(found, slot), right_gradient)
        assert ours_off < 1.5 * relative_error(gradient(expected, slot), right_gradient)


def stack_of(stacks: AdapterStacks, segments: Sequence[Segment]) -> torch.Tensor:
    stack = stacks.of(segments)
    assert stack is not None
    return stack._flat_SP


def test_weights_are_copied_once_until_they_change(model: Transformer) -> None:
    one, two = (random_adapter(model, 8, seed) for seed in (1, 2))
    segments = [Segment(one, 0, 3), Segment(two, 3, 4)]
    stacks = AdapterStacks()
    first = stack_of(stacks, segments)
    assert stack_of(stacks, [Segment(one, 0, 9), Segment(two, 9, 11)]) is first
    stack_of(stacks, [Segment(two, 0, 1), Segment(one, 1, 2)])
    assert stack_of(stacks, segments) is first  # two sets are kept
    two.update(torch.full((two.layout.num_params,), 0.5))
    changed = stack_of(stacks, segments)
    assert torch.equal(changed[0], one.flat)
    assert torch.equal(changed[1], two.flat)


def test_a_dead_adapter_is_nobodys(model: Transformer) -> None:
    """Another one may lie at the same address."""
    one, two = (random_adapter(model, 8, seed) for seed in (1, 2))
    stacks = AdapterStacks()
    first = stack_of(stacks, [Segment(one, 0, 3), Segment(two, 3, 4)])
    del two
    other = random_adapter(model, 8, 3)
    assert stack_of(stacks, [Segment(one, 0, 3), Segment(other, 3, 4)]) is not first


def test_what_the_loop_must_do(model: Transformer, checkpoint: Path) -> None:
    one, two, odd, other = (
        random_adapter(model, rank, seed) for rank, seed in ((8, 1), (8, 2), (4, 3), (16, 4))
    )
    stacks = AdapterStacks()
    assert stacks.of([]) is None
    assert stacks.of([Segment(one, 0, 3), Segment(None, 3, 4)]) is None
    assert stacks.of([Segment(one, 0, 3), Segment(other, 3, 4)]) is None
    assert stacks.of([Segment(odd, 0, 3), Segment(odd, 3, 4)]) is None
    many = MOST_BYTES // one.flat.nbytes + 1
    assert stacks.of([Segment(one, row, row + 1) for row in range(many)]) is None
    spec = replace(ALL, rank=8, alpha=1.0)
    layout = AdapterLayout.of(model.config, spec)
    scaled = model.new_adapter(layout, torch.zeros(layout.num_params), trainable=False)
    assert stacks.of([Segment(one, 0, 3), Segment(scaled, 3, 4)]) is None
    assert stacks.of([Segment(one, 0, 3), Segment(two, 3, 4)]) is not None
