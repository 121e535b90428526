"""Recorded decode steps, with a capture that records nothing: padding, buffers, choice, failure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.devices import CPU, eager
from tests.engine.sampler_cases import (
    ask,
    make_adapter,
    make_model_directory,
    random_prompt,
    sample_all,
    sampler_on,
)
from training.backends.base import LoraSpec, SampleResult
from training.engine import torch_graphs
from training.engine.adapter import Segment
from training.engine.decoder import BLOCK_TOKENS, Chunk
from training.engine.model import Transformer
from training.engine.torch_graphs import DecodeGraphs, Shape, Step, packed_inputs, padded_shape
from training.engine.torch_paths import FastPaths
from training.engine.torch_probe import graphs_error, random_adapter


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"), "mistral-window")


@pytest.fixture(scope="module")
def model(directory: Path) -> Transformer:
    return Transformer.from_directory(directory, CPU, torch.float32)


def chunk(start: int, *blocks: int, num_rows: int = 1) -> Chunk:
    return Chunk(np.array(blocks, np.int32), start, num_rows)


def test_rows_and_blocks_are_padded_to_a_few_sizes() -> None:
    ends = (0, BLOCK_TOKENS - 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS)
    shapes = [padded_shape([chunk(start, 0, 1, 2, 3)] * 3) for start in ends]
    assert shapes == [Shape(4, 1), Shape(4, 1), Shape(4, 2), Shape(4, 4)]
    assert padded_shape([chunk(0, 0)] * 64) == Shape(64, 1)
    assert padded_shape([chunk(0, 0)] * 65) is None
    assert padded_shape([chunk(0, 0), chunk(0, 1, num_rows=2)]) is None
    assert padded_shape([chunk(16 * BLOCK_TOKENS, *range(17))] * 33) is None  # 64 rows, 32 blocks


def test_padding_repeats_what_is_the_rows_own() -> None:
    chunks = [chunk(5, 7), chunk(BLOCK_TOKENS + 2, 4, 9)]
    inputs = packed_inputs(np.array([11, 12], np.int32), chunks, Shape(4, 2))
    last = [12, BLOCK_TOKENS + 2, 9 * BLOCK_TOKENS + 2, 4, 9]
    assert inputs.tolist() == [[11, 5, 7 * BLOCK_TOKENS + 5, 7, 7], last, last, last]


def test_steps_are_those_of_plain_passes(model: Transformer) -> None:
    assert graphs_error(model, eager) < 1e-5


def run(graphs: DecodeGraphs, chunks: Sequence[Chunk], *segments: Segment) -> torch.Tensor | None:
    return graphs.run(np.arange(len(chunks), dtype=np.int32), chunks, segments)


def test_one_graph_serves_all_steps_of_a_shape(model: Transformer) -> None:
    graphs = DecodeGraphs(model, model.new_cache(8), eager)
    for count, start in ((3, 0), (4, 1), (3, 2)):
        hidden = run(graphs, [chunk(start, n) for n in range(count)], Segment(None, 0, count))
        assert hidden is not None
        assert len(hidden) == count
    assert graphs.num_graphs == 1
    one, two = (random_adapter(model, 8, seed) for seed in (1, 2))
    for adapter in (one, two):
        assert run(graphs, [chunk(0, 0)] * 3, Segment(adapter, 0, 3)) is not None
    assert graphs.num_graphs == 2


def test_a_changed_adapter_is_seen(model: Transformer) -> None:
    graphs = DecodeGraphs(model, model.new_cache(8), eager)
    adapter = random_adapter(model, 8, 1)
    segment = Segment(adapter, 0, 1)
    before = run(graphs, [chunk(0, 0)], segment)
    adapter.update(torch.zeros(adapter.layout.num_params))
    after = run(graphs, [chunk(0, 0)], segment)
    base = run(graphs, [chunk(0, 0)], Segment(None, 0, 1))
    assert before is not None
    assert after is not None
    assert base is not None
    assert not torch.equal(before, base)
    torch.testing.assert_close(after, base)


def test_steps_of_several_adapters_are_left_to_others(model: Transformer) -> None:
    graphs = DecodeGraphs(model, model.new_cache(8), eager)
    adapter = random_adapter(model, 8, 1)
    chunks = [chunk(0, 0), chunk(0, 1)]
    assert run(graphs, chunks, Segment(adapter, 0, 1), Segment(None, 1, 2)) is None
    assert graphs.num_graphs == 0


def test_those_used_longest_ago_are_let_go(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_graphs, "MOST_GRAPHS", 2)
    graphs = DecodeGraphs(model, model.new_cache(8), eager)
    for rank in (8, 16):
        assert run(graphs, [chunk(0, 0)], Segment(random_adapter(model, rank, 1), 0, 1)) is not None
    for count in (1, 2, 4):
        chunks = [chunk(0, n) for n in range(count)]
        assert run(graphs, chunks, Segment(None, 0, count)) is not None
    assert graphs.num_graphs == 2
    assert not graphs._residents


def test_without_memory_for_a_graph_nothing_more_is_recorded(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    def full(step: Step) -> Step:
        raise torch.OutOfMemoryError("no memory")

    graphs = DecodeGraphs(model, model.new_cache(8), full)
    with caplog.at_level(logging.WARNING):
        assert run(graphs, [chunk(0, 0)], Segment(None, 0, 1)) is None
        assert run(graphs, [chunk(0, 0)], Segment(None, 0, 1)) is None
    assert len(caplog.records) == 1
    assert "no longer recorded" in caplog.text


def test_a_sampler_draws_the_same_tokens(directory: Path, model: Transformer) -> None:
    """Of the base model, of one adapter, and of both in one step; sequences of other lengths."""
    recorded: list[Step] = []

    def capture(step: Step) -> Step:
        recorded.append(step)
        return eager(step)

    fast = Transformer(model.config, model.weights, FastPaths(capture=capture))
    adapter = make_adapter(model, directory / "adapter", LoraSpec(4, 1))
    results: list[list[SampleResult]] = []
    for each in (fast, model):
        sampler = sampler_on(each, directory)
        sampler.publish("mine", adapter)
        results.append([])
        for snapshots in ([None] * 3, ["mine"] * 2, ["mine", None]):
            requests = [
                ask(random_prompt(3 + 29 * n, n), f"r{n}", snapshot_id=snapshot)
                for n, snapshot in enumerate(snapshots)
            ]
            results[-1] += sample_all(sampler, requests)
    assert recorded
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours.sequences[0].tokens, theirs.sequences[0].tokens)
        np.testing.assert_allclose(
            ours.sequences[0].logprobs, theirs.sequences[0].logprobs, rtol=0, atol=3e-5
        )
