"""Which of the SDK's optional ways pay on this server: batch polling, compressed bodies.

    python -m benchmarks.client_flags [--repeats 5]

Servers of the fake model that differ in one flag of ``client/config``; the same work through the
SDK on each in turn, medians. Loopback: on a slow network a compressed body is worth more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from rich.console import Console
from rich.table import Table
from tinker import types

from tests.servers import FAKE_MODEL, Server, running_server

NUM_SAMPLES = 400
NUM_DATUMS, NUM_TOKENS = 64, 1024

FLAGS: Mapping[str, Mapping[str, Any]] = {
    "one poll a sample": {},
    "batch polling": {"sample_use_retrieve_futures": True},
    "plain bodies": {},
    "zstd bodies": {"proto_compress_fwdbwd": True},
}


def sampling(service: tinker.ServiceClient) -> Callable[[], None]:
    sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
    params = types.SamplingParams(max_tokens=8)

    def work() -> None:
        prompt = types.ModelInput.from_ints([1, 2, 3])
        futures = [sampler.sample(prompt, 1, params) for _ in range(NUM_SAMPLES)]
        for future in futures:
            future.result()

    return work


def training(service: tinker.ServiceClient) -> Callable[[], None]:
    trainer = service.create_lora_training_client(FAKE_MODEL, rank=4).result()
    rng = np.random.default_rng(0)
    data = []
    for _ in range(NUM_DATUMS):
        tokens = rng.integers(0, 500, NUM_TOKENS + 1)
        inputs: dict[str, Any] = {
            "target_tokens": tokens[1:],
            "weights": np.ones(NUM_TOKENS, np.float32),
        }
        tokens_in = types.ModelInput.from_ints(tokens[:-1].tolist())
        data.append(types.Datum(model_input=tokens_in, loss_fn_inputs=inputs))

    def work() -> None:
        trainer.forward(data, "cross_entropy").result()

    return work


WORK: Mapping[str, Callable[[tinker.ServiceClient], Callable[[], None]]] = {
    "one poll a sample": sampling,
    "batch polling": sampling,
    "plain bodies": training,
    "zstd bodies": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in FLAGS}
    with ExitStack() as stack:
        works = {}
        for name, flags in FLAGS.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server: Server = stack.enter_context(running_server(folder, {"client": flags}))
            client = tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key)
            works[name] = WORK[name](stack.enter_context(client))
        for repeat in range(repeats + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"{NUM_SAMPLES} samples; forward of {NUM_DATUMS} x {NUM_TOKENS} tokens")
    for column in ("way", "median s", "all"):
        table.add_column(column)
    for name, times in seconds.items():
        median = f"{statistics.median(times):.3f}"
        table.add_row(name, median, " ".join(f"{each:.2f}" for each in sorted(times)))
    Console().print(table)


if __name__ == "__main__":
    main()
