"""Servers and engines that are killed: what was acknowledged stays, what is lost is said."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.backends.tiny import write_tiny_llama
from tests.e2e.clients import loss_of, next_token, prompt, service_client, train, trainer_of
from tests.e2e.raw import Raw, request
from tests.servers import FAKE_MODEL, Server, running_server

DATA = [next_token([1, 9, 30, 4, 11])]
PARAMS = types.SamplingParams(max_tokens=12, seed=7, stop=[])
WAIT_S = 120.0


def restart(server: Server) -> None:
    """As after a power cut: no goodbye, the same data, the same port."""
    server.kill()
    server.spawn()
    server.wait_until_ready()


def test_checkpoints_and_results_survive_a_kill(tmp_path: Path) -> None:
    with (
        running_server(tmp_path) as server,
        Raw(server) as raw,
        service_client(server) as service,
    ):
        trainer = trainer_of(service)
        train(trainer, DATA, 3)
        state = trainer.save_state("kept").result().path
        weights = trainer.save_weights_for_sampler("kept").result().path
        sampler = service.create_sampling_client(model_path=weights).result()
        sampled = sampler.sample(prompt(1, 2), 1, PARAMS).result().sequences[0].tokens
        expected = train(trainer, DATA, 3)
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 1))
        result = raw.retrieve(promise).content
        unfinished = raw.forward_backward(request(model, 3))  # waits for number 2

        restart(server)

        assert raw.retrieve(promise).content == result
        answer = raw.retrieve(unfinished).json()
        assert "restarted" in answer["error"]
        assert answer["category"] == "server"
        with pytest.raises(tinker.TinkerError, match="lost"):
            trainer.forward_backward(DATA, "cross_entropy").result()
        again = sampler.sample(prompt(1, 2), 1, PARAMS).result()
        assert again.sequences[0].tokens == sampled, "samplers go on by themselves"
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, DATA, 3) == expected


def test_a_client_that_was_waiting_hears_of_the_restart(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, Raw(server) as raw:
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 2))
        server.kill()
        server.spawn()
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                answer = raw.retrieve(promise)
                break
            except httpx.TransportError:  # refused connections, until it is up again
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert "restarted" in answer.json()["error"]


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


def work_until_it_fails(trainer: tinker.TrainingClient) -> None:
    """Operations that a dying engine still answers are fine."""
    while True:
        trainer.forward(DATA, "cross_entropy").result()


def test_a_killed_engine_comes_back_and_the_loss_is_said(tmp_path: Path) -> None:
    model = write_tiny_llama(
        tmp_path / "tiny-llama", vocab_size=512, context_length=4096, text_of=chr
    )
    config = {
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"dtype": "float32", "num_threads": 1, "kv_cache_tokens": 4096},
    }
    with running_server(tmp_path, config) as server, service_client(server) as service:
        trainer = trainer_of(service)
        train(trainer, DATA, 2)
        state = trainer.save_state("kept").result().path
        sampler = trainer.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(prompt(1, 2), 1, PARAMS).result().sequences[0].tokens
        expected = train(trainer, DATA, 2)

        os.kill(engine_pids(server)[-1], signal.SIGKILL)

        with pytest.raises(tinker.TinkerError, match=r"(?i)engine|lost"):
            work_until_it_fails(trainer)
        again = sampler.sample(prompt(1, 2), 1, PARAMS).result()
        assert again.sequences[0].tokens == sampled
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, DATA, 2) == expected
        assert len(set(engine_pids(server))) == 2
        fresh = trainer_of(service)
        assert loss_of(fresh.forward(DATA, "cross_entropy").result()) > 0
