"""Microseconds that the sampler itself takes for one decode step, beside a model that computes
nothing.

    python -m benchmarks.sampler_overhead TOKENIZER_JSON [--profile]

The model gives constant hidden states and logits of a vocabulary of 256, so what is measured is
scheduling, block tables, drawing and bookkeeping.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from training.backends.base import Int32Array, SampleRequest
from training.config import EngineConfig
from training.engine.adapter import Adapter, AdapterLayout, Segment
from training.engine.decoder import Chunk, HeadPass, KvCache, TrainingPass
from training.engine.optimizer import AdamArithmetic, TorchAdam
from training.engine.projections import AdaptedGroup, Part
from training.engine.sampler import Sampler
from training.engine.sampling import Vocabulary
from training.engine.torch_vocabulary import TorchVocabulary

CONCURRENCY = (1, 8, 32, 64)
VOCAB_SIZE = 256


class Shape:
    model_type = "none"
    hidden_size = 8
    vocab_size = VOCAB_SIZE
    context_length = 1 << 16
    eos_token_ids = ()
    adapted_groups: Sequence[AdaptedGroup] = ()
    unadaptable: Mapping[Part, str] = {}


class NoCache:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def copy_block(self, source: int, destination: int) -> None: ...

    def clear(self, block: int) -> None: ...


class NoDecoder:
    config = Shape()
    device = torch.device("cpu")
    dtype = torch.float32
    is_batch_invariant = True
    vocabulary: Vocabulary = TorchVocabulary()
    adam: AdamArithmetic = TorchAdam()

    def __init__(self) -> None:
        self._hidden = torch.zeros(4096, Shape.hidden_size)
        self._logits = torch.randn(4096, VOCAB_SIZE)

    def activation_bytes(self, num_tokens: int) -> int:
        raise NotImplementedError

    def release_memory(self) -> None:
        raise NotImplementedError

    def new_adapter(self, layout: AdapterLayout, weights: torch.Tensor, trainable: bool) -> Adapter:
        raise NotImplementedError

    def training_pass(
        self,
        sequences: Sequence[Int32Array],
        segments: Sequence[Segment],
        with_gradient: bool,
        checkpointing: bool,
    ) -> TrainingPass:
        raise NotImplementedError

    def head_pass(
        self, hidden_RH: torch.Tensor, targets_RK: Int32Array, segment: Segment, keep: bool
    ) -> HeadPass:
        raise NotImplementedError

    def new_cache(self, num_blocks: int) -> KvCache:
        return NoCache(num_blocks)

    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        return self._hidden[: len(tokens_T)]

    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        return self._logits[: len(hidden_RH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("sequences   us per step")
    for num in CONCURRENCY:
        print(f"{num:9}{step_s(options.tokenizer, num, options.steps) * 1e6:14.0f}", flush=True)
    if options.profile:
        with cProfile.Profile() as profile:
            step_s(options.tokenizer, 32, options.steps)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def step_s(tokenizer: Path, num: int, steps: int) -> float:
    """Median time of a step of ``num`` decoding sequences of as many requests."""
    sampler = Sampler(NoDecoder(), EngineConfig(kv_cache_tokens=1 << 18), tokenizer)
    for index in range(num):
        prompt = np.random.default_rng(index).integers(0, VOCAB_SIZE, 64, dtype=np.int32)
        sampler.submit(SampleRequest(str(index), None, prompt, 1, steps + 100, seed=index))
    for _ in range(50):
        sampler.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        sampler.step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    main()
