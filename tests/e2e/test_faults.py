"""A real server whose disk is full, read-only or taken: clients wait, people are told."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.clients import next_token, service_client, train, trainer_of
from tests.e2e.raw import PROTOBUF, Raw, request
from tests.servers import Server, running_server, server_in

DATA = [next_token([1, 9, 30, 4, 11])]
WAIT_S = 120.0

# Root passes permission bits, unless it has given up the capabilities to.
AS_ANYBODY = """
import ctypes, os, sys
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            sys.exit("cannot give up a capability: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def full_disk(server: Server) -> Iterator[None]:
    """No file of the server may grow or be written, its log included. Needs no privilege."""
    pid, no_limit = server.process.pid, resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, no_limit))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (no_limit, no_limit))


def test_training_waits_for_a_disk_that_is_full(tmp_path: Path, fake_server: Server) -> None:
    with service_client(fake_server) as service:
        expected = train(trainer_of(service), DATA, 6)
    with running_server(tmp_path) as server, service_client(server) as service, Raw(server) as raw:
        trainer = trainer_of(service)
        losses = train(trainer, DATA, 2)
        model = raw.new_model()
        training = threading.Thread(target=lambda: losses.extend(train(trainer, DATA, 4)))
        with full_disk(server):
            training.start()
            body = request(model, 1).SerializeToString()
            answer = raw.http.post(
                "/forward_backward", content=body, headers={"Content-Type": PROTOBUF}
            )
            assert answer.status_code == 503
            assert answer.json()["category"] == "server"
            assert raw.http.get("/health").status_code == 200
            time.sleep(1.0)
            assert len(losses) == 2
        assert raw.output(raw.forward_backward(request(model, 1))).metrics["loss:sum"] > 0
        training.join()
        assert losses == expected
        server.kill()
        server.spawn()
        server.wait_until_ready()
        assert train(trainer, DATA, 1)[0] < losses[-1]


def test_a_result_that_does_not_fit_on_the_disk_is_late_and_not_lost(tmp_path: Path) -> None:
    config = {"scheduler": {"gap_timeout_s": 1.0}, "server": {"long_poll_s": 2.0}}
    with running_server(tmp_path, config) as server, Raw(server) as raw:
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 2))  # runs when 1 is given up
        with full_disk(server):
            for _ in range(3):
                assert raw.retrieve_once(promise).status_code == 408
        assert raw.output(promise).metrics["loss:sum"] > 0


def refused(directory: Path, config: dict[str, Any] | None = None) -> str:
    """What a server says that cannot start."""
    server = server_in(directory, config)
    server.command = (sys.executable, "-c", AS_ANYBODY, *server.command)
    server.spawn()
    code = server.process.wait(timeout=WAIT_S)
    log = server.log_file.read_text()
    assert code not in (0, -9), log
    assert "Traceback" not in log
    assert "cannot start: " in log, log
    return log


@pytest.mark.parametrize("used_before", [False, True])
def test_a_read_only_directory_is_told_at_the_start(tmp_path: Path, used_before: bool) -> None:
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    if used_before:
        with running_server(tmp_path):
            pass
    for path in metadata.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    metadata.chmod(0o555)
    try:
        log = refused(tmp_path)
    finally:
        metadata.chmod(0o755)
    assert "ermission denied" in log or "readonly" in log or "read-only" in log, log


def test_a_checkpoint_directory_that_is_none_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = {"storage": {"checkpoint_dir": str(tmp_path / "file" / "checkpoints")}}
    assert "checkpoint directory" in refused(tmp_path, config)


def test_a_damaged_database_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "futures.db").write_bytes(os.urandom(8192))
    assert "not a database" in refused(tmp_path)


@pytest.mark.parametrize("shared", ["metadata_dir", "checkpoint_dir"])
def test_a_second_server_on_the_same_data_does_not_start(tmp_path: Path, shared: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with running_server(first) as server:
        directory = first / ("metadata" if shared == "metadata_dir" else "checkpoints")
        log = refused(second, {"storage": {shared: str(directory)}})
        assert f"another tinkercloud server uses {directory} (pid {server.process.pid})" in log
        assert httpx.get(f"{server.base_url}/api/v1/health").status_code == 200
