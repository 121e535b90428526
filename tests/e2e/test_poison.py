"""A request that ends every engine that runs it: it fails, and nobody else notices."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.backends.conftest import has_kernels
from tests.backends.tiny import write_tiny_llama
from tests.e2e.clients import RATE, loss_of, next_token, prompt, service_client, trainer_of
from tests.servers import FAKE_MODEL, Server, running_server

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""The SDK leaves connections open; ``collected`` closes them here."""

DATA = [next_token([1, 9, 30, 4, 11])]
NUM_ROUNDS = 2
POISON = prompt(5, 6, 7)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@contextlib.contextmanager
def tiny_server(directory: Path) -> Iterator[Server]:
    """Of an engine whose samples have the same bits in any company, or else get none: one at a
    time, and one row at a time."""
    directory.mkdir()
    model = write_tiny_llama(
        directory / "tiny-llama", vocab_size=512, context_length=4096, text_of=chr
    )
    exact = (
        {"dtype": "bfloat16"} if has_kernels() else {"dtype": "float32", "max_running_sequences": 1}
    )
    config = {
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"num_threads": 1, "kv_cache_tokens": 16384, **exact},
    }
    with running_server(directory, config) as server:
        yield server


def entries(server: Server, event: str) -> list[dict[str, str]]:
    lines = server.log_file.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in found if entry["event"] == event]


class Innocents:
    """A run that trains and samples without looking left or right; ``results`` are all it gets."""

    def __init__(self, service: tinker.ServiceClient) -> None:
        self.trainer = trainer_of(service)
        self.sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
        self.passes: list[tinker.APIFuture[types.ForwardBackwardOutput]] = []
        self.samples: list[tinker.APIFuture[types.SampleResponse]] = []

    def go_on(self) -> None:
        for seed in range(6):
            params = types.SamplingParams(max_tokens=400, seed=seed, stop=[])
            self.samples.append(self.sampler.sample(prompt(10 + seed), 1, params))
        for _ in range(3):
            self.passes.append(self.trainer.forward_backward(DATA, "cross_entropy"))
            self.trainer.optim_step(RATE)

    def results(self) -> list[object]:
        losses = [loss_of(each.result()) for each in self.passes]
        sequences = [each.result().sequences[0] for each in self.samples]
        return [losses, *((each.tokens, each.logprobs) for each in sequences)]


def poisoned(server: Server, service: tinker.ServiceClient) -> tuple[tinker.SamplingClient, Path]:
    """Weights that can be asked for, and one of their files: who reads it stands still."""
    directory = server.directory / "checkpoints"
    before = set(directory.glob("*/adapter_config.json"))
    weights = trainer_of(service).save_weights_for_sampler("poison").result().path
    sampler = service.create_sampling_client(model_path=weights).result()
    (file,) = set(directory.glob("*/adapter_config.json")) - before
    file.unlink()
    os.mkfifo(file)
    return sampler, file


def end_engine_that_reads(file: Path, server: Server, innocents: Innocents) -> None:
    while True:
        try:
            pipe = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads it
            time.sleep(0.005)
    innocents.go_on()
    time.sleep(0.3)  # they wait in the engine, most of them
    pid = int(entries(server, "engine.started")[-1]["pid"])
    os.kill(pid, signal.SIGABRT)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.005)
    os.close(pipe)


def test_a_request_that_ends_two_engines_fails_and_nobody_else_notices(tmp_path: Path) -> None:
    with tiny_server(tmp_path / "undisturbed") as server, service_client(server) as service:
        innocents = Innocents(service)
        for _ in range(1 + NUM_ROUNDS):
            innocents.go_on()
        expected = innocents.results()
    with tiny_server(tmp_path / "disturbed") as server, service_client(server) as service:
        innocents = Innocents(service)
        sampler, file = poisoned(server, service)
        innocents.go_on()
        poison = sampler.sample(POISON, 1, types.SamplingParams(max_tokens=4))
        for _ in range(NUM_ROUNDS):
            end_engine_that_reads(file, server, innocents)
        with pytest.raises(tinker.RequestFailedError, match="each of the 2 engines that ran it"):
            poison.result()
        assert innocents.results() == expected
        ended = entries(server, "sample.engine_died")
        assert [entry["cause"] for entry in ended] == ["crashed"] * 2
        assert len({entry["request_id"] for entry in ended}) == 1
        assert len(entries(server, "engine.started")) == 1 + NUM_ROUNDS
        assert not entries(server, "operation.poison")
