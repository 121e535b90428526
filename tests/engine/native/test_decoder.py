"""The native decoder against torch's, and its promise: bits depend on nobody else."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from training.backends.base import Float32Array, Int32Array, LoraSpec
from training.engine.adapter import AdapterLayout, GradientSink, Segment, fresh_weights
from training.engine.decoder import BLOCK_TOKENS, Chunk, Decoder
from training.engine.model import Transformer
from training.engine.native.decoder import NativeDecoder

MODELS = ("llama", "llama-biases", "llama3-rope", "mistral-window", "qwen2-window", "qwen3-tied")
SPECS = (
    LoraSpec(4, seed=1),
    LoraSpec(40, seed=2, train_mlp=False, train_unembed=False),
    LoraSpec(32, alpha=16.0, seed=3, train_attn=False, train_unembed=False),
)


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def native(kernels: ctypes.CDLL, path: Path) -> NativeDecoder:
    return NativeDecoder.from_directory(path)


@dataclasses.dataclass
class Outcome:
    """Of one tenant in a pass."""

    hidden: torch.Tensor
    logprobs: Float32Array
    gradient: torch.Tensor


def layout(decoder: Decoder, spec: LoraSpec) -> tuple[AdapterLayout, torch.Tensor]:
    made = AdapterLayout.of(decoder.config, spec)
    weights = fresh_weights(made)
    generator = torch.Generator().manual_seed(spec.seed)
    for _, b, _ in made.views(weights).values():
        b.normal_(0, 0.05, generator=generator)
    return made, weights


def sequences(seed: int, lengths: Sequence[int]) -> list[Int32Array]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 90, length).astype(np.int32) for length in lengths]


Tenant = tuple[LoraSpec, list[Int32Array]]


def train(
    decoder: Decoder, tenants: Sequence[Tenant], *, checkpointing: bool = False, keep: bool = True
) -> list[Outcome]:
    """One pass of all tenants, forward and back; every third token has no loss."""
    segments, sinks, start = [], [], 0
    for spec, each in tenants:
        made, weights = layout(decoder, spec)
        adapter = decoder.new_adapter(made, weights, trainable=True)
        sinks.append(GradientSink(made, torch.full((made.num_params,), float("nan"))))
        stop = start + sum(map(len, each))
        segments.append(Segment(adapter, start, stop, sinks[-1]))
        start = stop
    tokens = [tokens for _, each in tenants for tokens in each]
    passed = decoder.training_pass(tokens, segments, True, checkpointing)
    hidden = passed.hidden_TH
    dhidden = torch.zeros_like(hidden)
    outcomes = []
    for segment, (_, each) in zip(segments, tenants, strict=True):
        rows = slice(segment.start, segment.stop)
        targets = np.roll(np.concatenate(each), -1)[:, None]
        own = segment._replace(start=0, stop=len(targets))
        head = decoder.head_pass(hidden[rows], targets, own, keep)
        dlogprobs = np.where(np.arange(len(targets)) % 3 == 0, 0, -1.0)[:, None]
        outcomes.append((hidden[rows].clone(), np.array(head.logprobs_RK)))
        head.backward(dlogprobs.astype(np.float32), dhidden[rows])
    passed.backward(dhidden)
    return [
        Outcome(*outcome, sink.finish().clone())
        for outcome, sink in zip(outcomes, sinks, strict=True)
    ]


def distance(ours: torch.Tensor | Float32Array, theirs: torch.Tensor | Float32Array) -> float:
    a, b = torch.as_tensor(ours).float(), torch.as_tensor(theirs).float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"rank{spec.rank}")
def test_training_agrees_with_float32(path: Path, native: NativeDecoder, spec: LoraSpec) -> None:
    """As near to fp32 as torch's own bfloat16 (the tolerance is twice its distance)."""
    tenants = [(spec, sequences(0, [33, 70, 5]))]
    cpu = torch.device("cpu")
    (exact,) = train(Transformer.from_directory(path, cpu, torch.float32), tenants)
    (rounded,) = train(Transformer.from_directory(path, cpu, torch.bfloat16), tenants)
    (ours,) = train(native, tenants)
    for name in ("hidden", "logprobs", "gradient"):
        ours_far = distance(getattr(ours, name), getattr(exact, name))
        theirs_far = distance(getattr(rounded, name), getattr(exact, name))
        assert 0 < ours_far < 2 * theirs_far, name


def same(a: Outcome, b: Outcome) -> bool:
    return (
        torch.equal(a.hidden, b.hidden)
        and np.array_equal(a.logprobs, b.logprobs)
        and torch.equal(a.gradient, b.gradient)
    )


def test_bits_do_not_depend_on_neighbours_threads_or_memory(native: NativeDecoder) -> None:
    tenants = [
        (spec, sequences(number, lengths))
        for number, (spec, lengths) in enumerate(
            zip(SPECS, ([33, 70, 5], [1, 1, 64], [129]), strict=True)
        )
    ]
    alone = [train(native, [tenant])[0] for tenant in tenants]
    assert not any(torch.isnan(outcome.gradient).any() for outcome in alone)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        together = train(native, [tenants[number] for number in order])
        assert all(same(each, alone[number]) for number, each in zip(order, together, strict=True))
    num_threads = native.kernels.tc_num_threads()
    for count in (1, 3):
        native.set_num_threads(count)
        assert same(train(native, tenants)[1], alone[1])
    native.set_num_threads(num_threads)
    assert same(train(native, tenants, checkpointing=True)[2], alone[2])


def test_probabilities_that_are_not_kept_are_computed_again(native: NativeDecoder) -> None:
    tenant = (SPECS[0], sequences(7, [40]))
    (kept,), (again,) = train(native, [tenant]), train(native, [tenant], keep=False)
    assert np.array_equal(kept.logprobs, again.logprobs)
    assert distance(again.gradient, kept.gradient) < 0.02


def sample_logprobs(
    native: NativeDecoder, spec: LoraSpec, tokens: Int32Array, sizes: Sequence[int]
) -> Float32Array:
    """Logprobs [T - 1] of each next token, the prompt taken in chunks of ``sizes`` through a cache
    whose blocks lie anywhere, with a stranger beside it."""
    made, weights = layout(native, spec)
    adapter = native.new_adapter(made, weights, trainable=False)
    num_blocks = -(-len(tokens) // BLOCK_TOKENS)
    cache = native.new_cache(2 * num_blocks + 1)
    blocks = np.random.default_rng(0).permutation(2 * num_blocks)[:num_blocks].astype(np.int32)
    stranger = np.array([2 * num_blocks], np.int32)
    parts, start = [], 0
    for size in sizes:
        rows = np.concatenate((tokens[start : start + size], np.array([3], np.int32)))
        chunks = [Chunk(blocks, start, size), Chunk(stranger, 0, 1)]
        segments = [Segment(adapter, 0, size), Segment(None, size, size + 1)]
        hidden = native.sampling_pass(cache, rows, chunks, segments)
        logits = native.logits(hidden, segments)[:size]
        targets = np.append(tokens, 0)[start + 1 : start + size + 1].astype(np.int64)
        parts.append(native.vocabulary.logprobs(logits, targets[:, None])[:, 0])
        start += size
    return np.concatenate(parts)[:-1]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"rank{spec.rank}")
def test_the_sampler_gives_the_trainers_logprobs_to_the_bit(
    native: NativeDecoder, spec: LoraSpec
) -> None:
    (tokens,) = sequences(11, [75])
    (trained,) = train(native, [(spec, [tokens])])
    for sizes in ([75], [1] * 75, [32, 1, 31, 11], [40, 35]):
        assert np.array_equal(
            sample_logprobs(native, spec, tokens, sizes), trained.logprobs[:-1, 0]
        )


def test_an_adapter_that_is_not_finite_is_refused(native: NativeDecoder) -> None:
    made, weights = layout(native, SPECS[0])
    adapter = native.new_adapter(made, weights, trainable=True)
    adapter.check()
    weights[5] = float("inf")
    adapter.update(weights)
    with pytest.raises(Exception, match="not finite"):
        adapter.check()
    with pytest.raises(Exception, match="not finite"):
        native.new_adapter(made, weights, trainable=False)
