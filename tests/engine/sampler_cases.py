"""Small drivers that the sampler's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tests.engine.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.devices import CPU as CPU
from tests.engine.devices import load_model
from training.backends.base import Int32Array, LoraSpec, SampleRequest, SampleResult
from training.config import EngineConfig
from training.engine.adapter import AdapterLayout, fresh_weights
from training.engine.adapter_files import write_adapter
from training.engine.decoder import Decoder
from training.engine.sampler import Outcome, Sampler


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: one token per byte, in the order of their printable stand-ins;
    the rest of the vocabulary are special tokens ``<|i|>``."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{index}|>" for index in range(len(alphabet), VOCAB_SIZE)])
    return tokenizer


def make_model_directory(directory: Path, name: str = "llama") -> Path:
    make_checkpoint(name, directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def make_sampler(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **settings: Any,
) -> Sampler:
    return sampler_on(load_model(directory, device, dtype), directory, **settings)


def sampler_on(decoder: Decoder, directory: Path, **settings: Any) -> Sampler:
    settings = {"kv_cache_tokens": 8192, "prefill_chunk_tokens": 64} | settings
    return Sampler(decoder, EngineConfig(**settings), directory / "tokenizer.json")


def make_adapter(model: Decoder, directory: Path, spec: LoraSpec, scale: float = 0.1) -> Path:
    """An adapter whose B is random, in PEFT's layout."""
    layout = AdapterLayout.of(model.config, spec)
    flat = fresh_weights(layout)
    generator = torch.Generator().manual_seed(spec.seed + 100)
    for _, b, _ in layout.views(flat).values():
        b.uniform_(-scale, scale, generator=generator)
    write_adapter(directory, layout, flat, "tests/tiny")
    return directory


def random_prompt(length: int, seed: int = 0) -> Int32Array:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length, dtype=np.int32)


def ask(prompt: Int32Array, request_id: str = "r", **settings: Any) -> SampleRequest:
    request = SampleRequest(request_id, None, prompt, num_samples=1, max_tokens=16, seed=0)
    return replace(request, **settings)


def outcomes(sampler: Sampler, requests: Sequence[SampleRequest]) -> dict[str, Outcome]:
    """Submits all at once and steps until every one has ended, checking the cache each time."""
    for request in requests:
        sampler.submit(request)
    ended: dict[str, Outcome] = {}
    while sampler.has_work:
        ended |= {outcome[0]: outcome for outcome in sampler.step()}
        sampler.check_integrity()
    return ended


def sample_all(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[SampleResult]:
    """Results in the order of the requests; raises what a request raised."""
    ended = outcomes(sampler, requests)
    results = []
    for request in requests:
        result = ended[request.request_id][1]
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def sample_one(sampler: Sampler, request: SampleRequest) -> SampleResult:
    return sample_all(sampler, [request])[0]
