"""How long samples take while a model trains on the same engine, and what that costs the training.

    python -m benchmarks.shared_engine MODEL_DIRECTORY [--micro-batch-tokens 512 1024 2048]

One tenant trains without pause on batches of 8 x 256 tokens; another samples, one request after
the other (64 + 32 tokens). The loop is the engine's own, in this process. "pause": how long a
sample in progress stood still because training had its turn.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.workload import RANK, Shape, token_rows, training_rows
from training.backends import ipc
from training.backends.base import Datum, LoraSpec, SampleRequest, TrainOp, TrainUnit
from training.config import EMBEDDED_MODEL, EngineConfig
from training.engine.loop import EngineLoop, Inbox
from training.engine.process import load

SHAPE = Shape(8, 256)
PROMPT_TOKENS, NEW_TOKENS = 64, 32


class Outcome(NamedTuple):
    latencies_s: list[float]
    trained_tokens_s: float
    longest_pause_s: float


class Bench:
    def __init__(self, path: Path, micro_batch_tokens: int) -> None:
        config = EngineConfig(micro_batch_tokens=micro_batch_tokens, num_threads=None)
        self.engine = load(ipc.Configure(EMBEDDED_MODEL, path, None, config))
        self.engine.trainer.load_slot(0, LoraSpec(RANK, seed=0))
        data = [
            Datum(
                row[:-1].astype(np.int32),
                row[1:].copy(),
                {"weights": np.ones(len(row) - 1, np.float32)},
            )
            for row in training_rows(SHAPE)
        ]
        self.unit = TrainUnit([TrainOp(0, "cross_entropy", {}, data)])

    def run(self, seconds: float, trains: bool, samples: bool) -> Outcome:
        inbox: Inbox = queue.SimpleQueue()
        latencies_s: list[float] = []
        num_units = 0
        asked_at = 0.0

        def ask_training() -> None:
            inbox.put(ipc.Call(0, ipc.ForwardBackward(self.unit)))

        def ask_sample() -> None:
            nonlocal asked_at
            asked_at = time.perf_counter()
            prompt = token_rows(1, PROMPT_TOKENS, len(latencies_s))[0].astype(np.int32)
            request = SampleRequest(str(len(latencies_s)), None, prompt, 1, NEW_TOKENS, seed=0)
            inbox.put(ipc.Call(1, ipc.Sample(request)))

        def reply(answer: ipc.Reply | ipc.Written) -> None:
            nonlocal num_units
            assert isinstance(answer, ipc.Reply)
            if answer.error is not None:
                raise answer.error
            if answer.call_id == 0:
                num_units += 1
                ask_training()
            else:
                latencies_s.append(time.perf_counter() - asked_at)
                ask_sample()

        loop = EngineLoop(
            self.engine.trainer, self.engine.sampler, inbox, reply, sampling_share=0.5
        )
        asks: list[tuple[bool, Callable[[], None]]] = [
            (trains, ask_training),
            (samples, ask_sample),
        ]
        for wanted, ask in asks:
            if wanted:
                ask()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            loop.turn(wait=False)
        trained_tokens_s = num_units * SHAPE.num_tokens / (time.perf_counter() - start)
        # Nothing of this run may be left in the engine for the next one.
        self.engine.sampler.cancel(str(len(latencies_s)))
        self.engine.sampler.step()
        self.engine.sampler.drop_prefixes()
        self.engine.trainer.discard_grads(0)
        return Outcome(latencies_s, trained_tokens_s, loop.pauses.longest_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--micro-batch-tokens", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("micro-batch   who              sample median   longest   pause   trained tokens/s")
    for tokens in options.micro_batch_tokens:
        bench = Bench(options.model, tokens)
        bench.run(2.0, trains=True, samples=True)
        for name, trains, samples in (
            ("sampling alone", False, True),
            ("training alone", True, False),
            ("both", True, True),
        ):
            latencies_s, rate, pause_s = bench.run(options.seconds, trains, samples)
            shown = latencies_s or [0.0]
            print(
                f"{tokens:11}   {name:14}{statistics.median(shown):14.2f} s{max(shown):8.2f} s"
                f"{pause_s:6.2f} s{rate:17.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
