"""Time of a training step (forward, backward, AdamW): this engine against transformers + PEFT.

    python benchmarks/engine_training.py <model directory> [--shapes 8x128 32x256] [--repeats 5]

Both train rank-32 LoRA on all linears and the head, in bfloat16 with fp32 adapter weights (PEFT's
default; ``--narrow`` gives PEFT bfloat16 ones) on the same data; runs alternate, and the median of
each is printed. Equal lengths are the best case of padding:
PEFT's batches contain none. The engine starts its processes with the allocator settings that
``--tuned`` sets here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from training.backends.base import AdamParams, Datum, LoraSpec, TrainOp, TrainUnit
from training.config import EngineConfig
from training.engine.model import ModelConfig, Transformer
from training.engine.trainer import Trainer

RANK = 32
PEFT_TOKENS = 4096
"""A larger batch is accumulated: 8192 tokens at once took PEFT over 20 GB."""
LEARNING_RATE = 1e-4
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps freed memory instead of giving each large block back to the kernel."""

Step = Callable[[], float]
"""Makes one step and returns its loss."""


class Times(NamedTuple):
    """Seconds of one step. On a busy machine compare ``cpu`` with OMP_NUM_THREADS=1."""

    wall: float
    cpu: float


def make_data(batch: int, length: int, vocab_size: int) -> list[Datum]:
    rng = np.random.default_rng(0)
    data = []
    for _ in range(batch):
        tokens = rng.integers(0, vocab_size, length + 1)
        weights = np.ones(length, np.float32)
        data.append(Datum(tokens[:-1].astype(np.int32), tokens[1:], {"weights": weights}))
    return data


def engine_step(directory: Path, data: list[Datum], micro_batch_tokens: int) -> Step:
    model = Transformer.from_directory(directory, torch.device("cpu"), torch.bfloat16)
    config = EngineConfig(micro_batch_tokens=micro_batch_tokens)
    trainer = Trainer(model, config, directory.name)
    trainer.load_slot(0, LoraSpec(RANK, seed=0))
    unit = TrainUnit([TrainOp(0, "cross_entropy", {}, data)])

    def step() -> float:
        run = trainer.forward_backward(unit)
        while True:
            try:
                next(run)
            except StopIteration as stop:
                loss: float = stop.value[0].metrics["loss:sum"]
                break
        trainer.optim_step({0: AdamParams(LEARNING_RATE)})
        return loss

    return step


def peft_step(directory: Path, data: list[Datum], narrow: bool) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    if base.config.tie_word_embeddings:
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=[*targets, "lm_head"])
    model = get_peft_model(base, config, autocast_adapter_dtype=not narrow)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    tokens = torch.from_numpy(np.stack([datum.tokens for datum in data])).long()
    targets_BL = torch.from_numpy(np.stack([datum.targets for datum in data]))

    num_rows = max(1, PEFT_TOKENS // tokens.shape[1])

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(tokens), num_rows):
            rows = slice(start, start + num_rows)
            logits = model(tokens[rows]).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets_BL[rows].flatten(), reduction="sum"
            )
            torch.autograd.backward(loss)
            total += loss.item()
        optimizer.step()
        return total

    return step


def timed(step: Step) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def compare(
    directory: Path, shape: str, repeats: int, micro_batch_tokens: int, narrow: bool
) -> None:
    batch, length = (int(part) for part in shape.split("x"))
    data = make_data(batch, length, ModelConfig.from_directory(directory).vocab_size)
    steps = {
        "engine": engine_step(directory, data, micro_batch_tokens),
        "peft": peft_step(directory, data, narrow),
    }
    for name, step in steps.items():
        print(f"{shape} {name}: first loss {step():.2f}", flush=True)
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step))
    wall, cpu = (
        {name: statistics.median(each[kind] for each in values) for name, values in times.items()}
        for kind in (0, 1)
    )
    for name in steps:
        rate = batch * length / wall[name]
        print(f"{shape} {name}: {wall[name]:.3f} s, {rate:.0f} tokens/s, {cpu[name]:.3f} s of CPU")
    print(
        f"{shape} speed-up: {wall['peft'] / wall['engine']:.2f}x, "
        f"by CPU time {cpu['peft'] / cpu['engine']:.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["8x128", "8x512", "32x256"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--narrow", action="store_true", help="bfloat16 adapter weights for PEFT")
    parser.add_argument("--tuned", action="store_true", help="with the engine's allocator settings")
    arguments = parser.parse_args()
    if arguments.tuned and any(
        os.environ.get(key) != TUNED_ALLOCATOR[key] for key in TUNED_ALLOCATOR
    ):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED_ALLOCATOR)
    for shape in arguments.shapes:
        compare(
            arguments.directory,
            shape,
            arguments.repeats,
            arguments.micro_batch_tokens,
            arguments.narrow,
        )


if __name__ == "__main__":
    main()
