"""PostgreSQL and S3 below a real server, as the SDK sees them: not at all, whatever restarts."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.e2e.clients import next_token, prompt, rest_client, service_client, train, trainer_of
from tests.postgres import PostgresServer, fresh_database, running_postgres
from tests.servers import Server, running_server
from tests.storage.object_store import BUCKET, ObjectStore

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""The SDK forgets connections whose server was killed; ``collected`` makes them go here."""

DATA = [next_token([1, 9, 30, 4, 11])]
PARAMS = types.SamplingParams(max_tokens=12, seed=7, stop=[])


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def expected(fake_server: Server) -> list[float]:
    """The losses of an undisturbed run."""
    with service_client(fake_server) as service:
        return train(trainer_of(service), DATA, 9)


@pytest.fixture(scope="module")
def database_server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def config(database_server: PostgresServer) -> Iterator[dict[str, Any]]:
    with fresh_database(database_server.url("postgres")) as url:
        yield {"storage": {"database_url": url}}


def restart(server: Server) -> None:
    server.kill()
    server.spawn()
    server.wait_until_ready()


def test_training_goes_on_over_postgresql(
    tmp_path: Path, config: dict[str, Any], expected: list[float]
) -> None:
    with running_server(tmp_path, config) as server, service_client(server) as service:
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 3)
        state = trainer.save_state("kept").result().path
        sampler = trainer.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(prompt(1, 2), 2, PARAMS).result()

        restart(server)

        losses += train(trainer, DATA, 6)
        assert losses == expected
        again = sampler.sample(prompt(1, 2), 2, PARAMS).result()
        assert [s.tokens for s in again.sequences] == [s.tokens for s in sampled.sequences]
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, DATA, 6) == expected[3:]
        runs = rest_client(server).list_training_runs().result()
        assert len(runs.training_runs) == 2
        listed = rest_client(server).list_user_checkpoints().result()
        assert [checkpoint.tinker_path for checkpoint in listed.checkpoints] == [state]
        assert not (tmp_path / "metadata" / "futures.db").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_training_waits_for_a_postgresql_that_restarts(
    tmp_path: Path,
    config: dict[str, Any],
    expected: list[float],
    database_server: PostgresServer,
    how: signal.Signals,
) -> None:
    with running_server(tmp_path, config) as server, service_client(server) as service:
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 2)
        training = threading.Thread(target=lambda: losses.extend(train(trainer, DATA, 7)))
        database_server.stop(how)
        try:
            training.start()
            time.sleep(1.0)
        finally:
            database_server.start()
        training.join()
        assert losses == expected
        assert server.process.poll() is None


def test_checkpoints_live_in_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[float]
) -> None:
    store = ObjectStore(tmp_path)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    config = {"storage": {"checkpoint_dir": f"s3://{BUCKET}/checkpoints"}}
    try:
        store.start()
        with running_server(tmp_path, config) as server, service_client(server) as service:
            trainer = trainer_of(service)
            train(trainer, DATA, 3)
            state = trainer.save_state("kept").result().path
            weights = trainer.save_weights_for_sampler("kept").result().path
            server.kill()
            shutil.rmtree(tmp_path / "metadata" / "checkpoint-cache")  # as on another machine
            server.spawn()
            server.wait_until_ready()
            sampler = service.create_sampling_client(model_path=weights).result()
            tokens = sampler.sample(prompt(1, 2), 1, PARAMS).result().sequences[0].tokens
            resumed = service.create_training_client_from_state_with_optimizer(state).result()
            assert train(resumed, DATA, 6) == expected[3:]

            store.stop()
            with pytest.raises(tinker.TinkerError, match="cannot store checkpoint"):
                resumed.save_state("lost").result()
            again = sampler.sample(prompt(1, 2), 1, PARAMS).result()
            assert again.sequences[0].tokens == tokens
            assert not (tmp_path / "checkpoints").exists()
            log = server.log_file.read_text()
            assert store.environment["AWS_SECRET_ACCESS_KEY"] not in log
    finally:
        store.stop()
