"""Tokens per second of the sampler beside ``transformers.generate``, in one run.

    python -m benchmarks.engine_sampling MODEL_DIRECTORY [--threads 2]

Each request has a prompt of its own and samples to ``--new-tokens`` without stopping. "adapters"
gives every request the base model, one common adapter, or an adapter of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from training.backends.base import LoraSpec, SampleRequest
from training.config import EngineConfig
from training.engine.adapter import AdapterLayout, fresh_weights
from training.engine.adapter_files import write_adapter
from training.engine.model import Transformer
from training.engine.sampler import Sampler

CONCURRENCY = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="*", default=CONCURRENCY)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = SamplerBench(options, Path(scratch))
        reference = None if options.no_transformers else load_reference(options)
        print("requests    base model   one adapter  own adapters  transformers  (tokens/s)")
        for num in options.concurrency:
            cells = [bench.tokens_per_s(num, kind) for kind in ("base", "one", "own")]
            cells.append(
                0.0 if reference is None else generate_tokens_per_s(reference, num, options)
            )
            print(f"{num:8}" + "".join(f"{cell:14.0f}" for cell in cells), flush=True)
        if options.profile:
            bench.profile(max(options.concurrency))


def prompts(num: int, num_tokens: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(num).integers(0, vocab_size, (num, num_tokens), dtype=np.int32)


class SamplerBench:
    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        dtype = getattr(torch, options.dtype)
        self.model = Transformer.from_directory(options.model, torch.device(options.device), dtype)
        config = EngineConfig(prefill_chunk_tokens=256)
        self.sampler = Sampler(self.model, config, options.model / "tokenizer.json")
        layout = AdapterLayout.of(self.model.config, LoraSpec(rank=options.rank, seed=0))
        for index in range(max(options.concurrency)):
            directory = scratch / str(index)
            write_adapter(directory, layout, fresh_weights(layout), "benchmark")
            self.sampler.publish(str(index), directory)

    def tokens_per_s(self, num: int, kind: str) -> float:
        """Best of the repeats; the first run, which loads adapters, is not counted."""
        self.run(num, kind, new_tokens=2)
        return max(
            self.run(num, kind, self.options.new_tokens) for _ in range(self.options.repeats)
        )

    def run(self, num: int, kind: str, new_tokens: int) -> float:
        rows = prompts(num, self.options.prompt_tokens, self.model.config.vocab_size)
        snapshots: Mapping[str, Sequence[str | None]] = {
            "base": [None] * num,
            "one": ["0"] * num,
            "own": list(map(str, range(num))),
        }
        start = time.perf_counter()
        for index, (row, snapshot) in enumerate(zip(rows, snapshots[kind], strict=True)):
            self.sampler.submit(
                SampleRequest(f"{index}", snapshot, row, 1, new_tokens, seed=index + new_tokens)
            )
        num_tokens = 0
        while self.sampler.has_work:
            for _, result in self.sampler.step():
                if isinstance(result, Exception):
                    raise result
                num_tokens += sum(len(each.tokens) for each in result.sequences)
        # Nothing of this run may help the next one.
        self.sampler.drop_prefixes()
        return num_tokens / (time.perf_counter() - start)

    def profile(self, num: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            self.run(num, "base", 16)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def load_reference(options: argparse.Namespace) -> Any:
    dtype = getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)


def generate_tokens_per_s(model: Any, num: int, options: argparse.Namespace) -> float:
    ids = torch.from_numpy(prompts(num, options.prompt_tokens, model.config.vocab_size)).long()
    ids = ids.to(options.device)
    best = 0.0
    for _ in range(options.repeats):
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            pad_token_id=0,
        )
        best = max(best, num * options.new_tokens / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
