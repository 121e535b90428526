"""What the conformance tests need of a backend beside its interface: texts, tolerances, data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.backends.base import (
    Backend,
    Datum,
    Float32Array,
    LoraSpec,
    SampledSequence,
    SampleRequest,
    TrainOp,
    TrainUnit,
)

_request_numbers = itertools.count()


@dataclass(frozen=True)
class Harness:
    """A started backend and how exactly it must keep its promises.

    ``company``: largest difference of a logprob that other data in the same operation may make.
    ``neighbours``: of a sampled logprob that other requests may make; none in bfloat16, where the
    sampler keeps to sizes whose products are the same.
    ``sampler``: of a sampled token's logprob to the trainer's. ``gradient``: relative, of weights
    after a step, when the same data came in other portions.
    """

    name: str
    backend: Backend
    text: Callable[[Sequence[int]], str]
    model_path: Path | None
    company: float
    neighbours: float
    sampler: float
    gradient: float

    @property
    def vocab_size(self) -> int:
        return self.backend.capabilities().vocab_size


def spec(rank: int = 4, seed: int = 1) -> LoraSpec:
    return LoraSpec(rank, seed)


def datum(vocab_size: int, num_tokens: int, seed: int, weight: float = 1.0) -> Datum:
    """Random tokens with cross entropy weights."""
    rng = np.random.default_rng([seed, num_tokens])
    tokens = rng.integers(0, vocab_size, num_tokens + 1)
    return Datum(
        tokens[:-1].astype(np.int32),
        tokens[1:].astype(np.int64),
        {"weights": np.full(num_tokens, weight, np.float32)},
    )


def reinforced(vocab_size: int, num_tokens: int, seed: int) -> Datum:
    """Random tokens with the inputs of every policy loss."""
    plain = datum(vocab_size, num_tokens, seed)
    rng = np.random.default_rng([seed, num_tokens, 1])
    mask = np.ones(num_tokens, np.float32)
    mask[: num_tokens // 2] = 0.0
    inputs = {
        "logprobs": rng.uniform(-6.0, -3.0, num_tokens).astype(np.float32),
        "advantages": rng.standard_normal(num_tokens).astype(np.float32),
        "sequence_ratio_mask": mask,
    }
    return Datum(plain.tokens, plain.targets, inputs)


def op(slot: int, *data: Datum, loss: str = "cross_entropy", **config: float) -> TrainOp:
    return TrainOp(slot, loss, config, data)


def unit(*ops: TrainOp) -> TrainUnit:
    return TrainUnit(ops)


def request(
    prompt: Sequence[int],
    *,
    snapshot_id: str | None = None,
    num_samples: int = 1,
    max_tokens: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    stop_token_ids: tuple[int, ...] = (),
    stop_strings: tuple[str, ...] = (),
    prompt_logprobs: bool = False,
    prompt_logprobs_last_n: int | None = None,
    topk_prompt_logprobs: int = 0,
    topk_sample_logprobs: int = 0,
    target_prompt_tokens: Sequence[Sequence[int]] | None = None,
    prompt_alt_tokens_k: int = 0,
    request_id: str | None = None,
) -> SampleRequest:
    return SampleRequest(
        request_id=request_id or f"request-{next(_request_numbers)}",
        snapshot_id=snapshot_id,
        prompt=np.array(prompt, np.int32),
        num_samples=num_samples,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_token_ids,
        stop_strings=stop_strings,
        prompt_logprobs=prompt_logprobs,
        prompt_logprobs_last_n=prompt_logprobs_last_n,
        topk_prompt_logprobs=topk_prompt_logprobs,
        topk_sample_logprobs=topk_sample_logprobs,
        target_prompt_tokens=None
        if target_prompt_tokens is None
        else np.array(target_prompt_tokens, np.int64),
        prompt_alt_tokens_k=prompt_alt_tokens_k,
    )


def as_datum(prompt: Sequence[int], sampled: Sequence[int]) -> Datum:
    """The sequence as the trainer sees it; its last ``len(sampled)`` targets are the sample."""
    tokens = np.array([*prompt, *sampled])
    return Datum(
        tokens[:-1].astype(np.int32),
        tokens[1:].astype(np.int64),
        {"weights": np.ones(len(tokens) - 1, np.float32)},
    )


def joined(outputs: Sequence[Float32Array]) -> Float32Array:
    return np.concatenate([each.ravel() for each in outputs])


def same_sample(harness: Harness, one: SampledSequence, other: SampledSequence) -> None:
    """Whoever else was in the batch, whatever was in the cache."""
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=harness.neighbours)
    assert one.stop_reason is other.stop_reason


def numpy_loss(
    name: str,
    logprobs: Float32Array,
    inputs: Mapping[str, Float32Array],
    config: Mapping[str, float],
) -> float:
    """The published formulas, written down once more."""
    lp = logprobs.astype(np.float64)
    if name == "cross_entropy":
        return float(-(lp * inputs["weights"]).sum())
    q, advantages = inputs["logprobs"].astype(np.float64), inputs["advantages"].astype(np.float64)
    ratio = np.exp(lp - q)
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 0.0)
    if name == "importance_sampling":
        return float(-(ratio * advantages).sum())
    if name == "ppo":
        clipped = np.clip(ratio, low, high)
        return float(-np.minimum(ratio * advantages, clipped * advantages).sum())
    if name == "cispo":
        return float(-(np.clip(ratio, low, high) * lp * advantages).sum())
    if name == "dro":
        return float(-(lp * advantages - 0.5 * config["beta"] * (lp - q) ** 2).sum())
    assert name == "gspo"
    sampled = inputs["sequence_ratio_mask"] != 0
    ratio = np.full(len(lp), np.exp((lp - q)[sampled].mean()))
    clipped = np.clip(ratio, low, high)
    return float(-np.minimum(ratio * advantages, clipped * advantages).sum())
