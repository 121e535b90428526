"""The engine alone, in this process: no server, no HTTP, no other process.

    python -m benchmarks.engine MODEL_DIRECTORY [--shapes 8x128] [--requests 1 8 32] [--profile]

What the server's figures are compared with by those who work on the engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, RANK, Shape, token_rows, training_rows
from training.backends import ipc
from training.backends.base import AdamParams, Datum, LoraSpec, SampleRequest, TrainOp, TrainUnit
from training.backends.child import child_environment
from training.config import EMBEDDED_MODEL, EngineConfig
from training.engine.process import Engine, load

SETTLED = "BENCHMARK_ENVIRONMENT_IS_SET"


def training_step(engine: Engine, shape: Shape, slot: int = 0) -> Callable[[], object]:
    data = [
        Datum(
            row[:-1].astype(np.int32),
            row[1:].copy(),
            {"weights": np.ones(len(row) - 1, np.float32)},
        )
        for row in training_rows(shape)
    ]
    unit = TrainUnit([TrainOp(slot, "cross_entropy", {}, data)])

    def step() -> None:
        for _ in engine.trainer.forward_backward(unit):
            pass
        engine.trainer.optim_step({slot: AdamParams(1e-4)})

    return step


def sampling(engine: Engine, requests: int, snapshots: list[str]) -> Callable[[], object]:
    """``snapshots`` empty: of the base model; else each request has the next one."""
    seed = 0

    def sample() -> None:
        nonlocal seed
        seed += 1
        rows = token_rows(requests, PROMPT_TOKENS, 1000 * requests + seed).astype(np.int32)
        for index, row in enumerate(rows):
            snapshot = snapshots[index % len(snapshots)] if snapshots else None
            engine.sampler.submit(SampleRequest(f"{index}", snapshot, row, 1, NEW_TOKENS, seed))
        num_tokens = 0
        while engine.sampler.has_work:
            for _, result in engine.sampler.step():
                if isinstance(result, Exception):
                    raise result
                num_tokens += sum(len(each.tokens) for each in result.sequences)
        assert num_tokens == requests * NEW_TOKENS

    return sample


def report(name: str, num_tokens: int, work: Callable[[], object], rounds: int) -> None:
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"{name}: {1000 * median:.1f} ms, {num_tokens / median:,.0f} tokens/s", flush=True)


def profiled(work: Callable[[], object]) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def run(options: argparse.Namespace, config: EngineConfig, scratch: Path) -> None:
    engine = load(ipc.Configure(EMBEDDED_MODEL, options.model, None, config))
    engine.trainer.load_slot(0, LoraSpec(RANK, seed=0), None, True)
    for text in options.shapes:
        shape = Shape.parse(text)
        step = training_step(engine, shape)
        report(f"training step {shape}", shape.num_tokens, step, options.rounds)
        if options.profile:
            profiled(step)
    snapshots = [str(number) for number in range(max(options.requests, default=0))]
    for number, snapshot in enumerate(snapshots):
        engine.trainer.load_slot(1, LoraSpec(RANK, seed=number), None, True)
        training_step(engine, Shape(1, 16), 1)()
        engine.trainer.capture_adapter(1).write(scratch / snapshot)
        engine.trainer.unload_slot(1)
        engine.sampler.publish(snapshot, scratch / snapshot)
    for requests in options.requests:
        num_tokens = requests * NEW_TOKENS
        for name, adapters in (("base model", []), ("own adapters", snapshots)):
            work = sampling(engine, requests, adapters)
            report(f"{requests} requests, {name}", num_tokens, work, options.rounds)
            if options.profile:
                profiled(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["1x1", "8x128", "8x512", "32x256"])
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    config = EngineConfig(num_threads=options.threads, dtype=options.dtype)
    if SETTLED not in os.environ:  # the allocator reads its settings when a process starts
        environment = child_environment(config, os.environ) | {SETTLED: "1"}
        command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    with tempfile.TemporaryDirectory() as scratch:
        run(options, config, Path(scratch))


if __name__ == "__main__":
    main()
