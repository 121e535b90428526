"""The SDK's own command line against the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.e2e.clients import next_token, service_client, train, trainer_of
from tests.servers import FAKE_MODEL, Server, assert_client_ended


class Saved(NamedTuple):
    run_id: str
    state: str
    weights: str


def tinker(server: Server, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tinker.cli", *arguments],
        env=server.client_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert_client_ended(done)
    return done.stdout


def as_json(server: Server, *arguments: str) -> Any:
    return json.loads(tinker(server, "--format", "json", *arguments))


@pytest.fixture(scope="module")
def saved(fake_server: Server) -> Iterator[Saved]:
    with service_client(fake_server) as service:
        trainer = trainer_of(service)
        train(trainer, [next_token([1, 2, 3])])
        yield Saved(
            trainer.model_id,
            trainer.save_state("cli-state").result().path,
            trainer.save_weights_for_sampler("cli-weights").result().path,
        )


def test_runs(fake_server: Server, saved: Saved) -> None:
    runs = as_json(fake_server, "run", "list")["runs"]
    assert saved.run_id in {run["training_run_id"] for run in runs}
    assert saved.run_id in tinker(fake_server, "run", "info", saved.run_id)


def test_checkpoints(fake_server: Server, saved: Saved) -> None:
    everything = json.dumps(as_json(fake_server, "checkpoint", "list"))
    assert saved.state in everything
    assert saved.weights in everything
    of_run = json.dumps(as_json(fake_server, "checkpoint", "list", "--run-id", saved.run_id))
    assert saved.state in of_run
    assert "cli-state" in tinker(fake_server, "checkpoint", "info", saved.state)
    assert "cli-state" in tinker(fake_server, "checkpoint", "list")


def test_a_checkpoint_is_given_a_time_to_live_and_deleted(
    fake_server: Server, saved: Saved
) -> None:
    tinker(fake_server, "checkpoint", "set-ttl", saved.weights, "--ttl", "7200")
    tinker(fake_server, "checkpoint", "delete", "-y", saved.weights)
    listed = json.dumps(as_json(fake_server, "checkpoint", "list", "--run-id", saved.run_id))
    assert saved.weights not in listed
    assert saved.state in listed


def test_models(fake_server: Server) -> None:
    assert FAKE_MODEL in tinker(fake_server, "model", "list")
