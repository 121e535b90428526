"""Servers and engines that are killed: what was acknowledged stays, what is lost is said."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tinker import types

from tests.backends.tiny import write_tiny_llama
from tests.e2e.clients import loss_of, next_token, prompt, service_client, train, trainer_of
from tests.e2e.raw import Raw, request
from tests.servers import FAKE_MODEL, Server, running_server

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""The SDK forgets connections whose server was killed; ``collected`` makes them go here."""

DATA = [next_token([1, 9, 30, 4, 11])]
PARAMS = types.SamplingParams(max_tokens=12, seed=7, stop=[])
WAIT_S = 120.0


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def restart(server: Server) -> None:
    """As after a power cut: no goodbye, the same data, the same port."""
    server.kill()
    server.spawn()
    server.wait_until_ready()


def undisturbed(tmp_path: Path, num_steps: int, config: Mapping[str, Any]) -> list[float]:
    directory = tmp_path / "undisturbed"
    directory.mkdir()
    with running_server(directory, config) as server, service_client(server) as service:
        return train(trainer_of(service), DATA, num_steps)


def test_everything_goes_on_after_a_kill(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, 9, {})
    with (
        running_server(tmp_path) as server,
        Raw(server) as raw,
        service_client(server) as service,
    ):
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 3)
        state = trainer.save_state("kept").result().path
        weights = trainer.save_weights_for_sampler("kept").result().path
        sampler = service.create_sampling_client(model_path=weights).result()
        sampled = sampler.sample(prompt(1, 2), 1, PARAMS).result().sequences[0].tokens
        losses += train(trainer, DATA, 3)
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 1))
        result = raw.retrieve(promise).content
        unfinished = raw.forward_backward(request(model, 3))  # waits for number 2

        restart(server)

        assert raw.retrieve(promise).content == result
        losses += train(trainer, DATA, 3)
        assert losses == expected
        raw.forward_backward(request(model, 2))
        assert raw.retrieve(unfinished).status_code == 200
        again = sampler.sample(prompt(1, 2), 1, PARAMS).result()
        assert again.sequences[0].tokens == sampled
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, DATA, 3) == expected[3:6]


def test_a_client_that_was_waiting_gets_its_result_after_the_restart(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, Raw(server) as raw:
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 2))
        server.kill()
        server.spawn()
        server.wait_until_ready()
        raw.forward_backward(request(model, 1))
        answer = raw.retrieve(promise)
        assert answer.headers["content-type"] == "application/x-protobuf"


def test_a_stopped_server_ends_by_itself(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, service_client(server) as service:
        train(trainer_of(service), DATA)
        service.close("success").result()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=WAIT_S) == 0


def engine_pids(server: Server) -> list[int]:
    lines = server.log_file.read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [int(entry["pid"]) for entry in entries if entry["event"] == "engine.started"]


def test_training_and_sampling_go_on_after_an_engine_is_killed(tmp_path: Path) -> None:
    model = write_tiny_llama(
        tmp_path / "tiny-llama", vocab_size=512, context_length=4096, text_of=chr
    )
    config = {
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"dtype": "float32", "num_threads": 1, "kv_cache_tokens": 4096},
    }
    expected = undisturbed(tmp_path, 6, config)
    with running_server(tmp_path, config) as server, service_client(server) as service:
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 2)
        state = trainer.save_state("kept").result().path
        sampler = trainer.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(prompt(1, 2), 1, PARAMS).result().sequences[0].tokens
        losses += train(trainer, DATA, 2)

        os.kill(engine_pids(server)[-1], signal.SIGKILL)

        losses += train(trainer, DATA, 2)
        assert losses == expected
        again = sampler.sample(prompt(1, 2), 1, PARAMS).result()
        assert again.sequences[0].tokens == sampled
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, DATA, 2) == expected[2:4]
        assert len(set(engine_pids(server))) == 2
        fresh = trainer_of(service)
        assert loss_of(fresh.forward(DATA, "cross_entropy").result()) > 0


def test_an_adapter_that_the_disk_has_damaged_comes_back_from_its_snapshot(tmp_path: Path) -> None:
    model = write_tiny_llama(
        tmp_path / "tiny-llama", vocab_size=512, context_length=4096, text_of=chr
    )
    config = {
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"dtype": "float32", "num_threads": 1, "idle_spill_s": 0.2},
    }
    expected = undisturbed(tmp_path, 4, config)
    with running_server(tmp_path, config) as server, service_client(server) as service:
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 2)
        spilled = spill_file(tmp_path / "metadata" / "spill")
        content = bytearray(spilled.read_bytes())
        content[len(content) // 2] ^= 1
        spilled.write_bytes(content)
        losses += train(trainer, DATA, 2)
        assert losses == expected
        assert len(set(engine_pids(server))) == 1, "no engine had to end for that"


def spill_file(directory: Path) -> Path:
    """The one adapter that an idle engine has put on disk, once it is whole."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := list(directory.rglob("*.spill")):
            time.sleep(0.5)  # it may still be written
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing was put on disk")
