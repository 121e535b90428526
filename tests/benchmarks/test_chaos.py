"""The kill test's own eyes: what is not the same is seen, and moments are where they should be."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.chaos_audit import Data, Kept, Run, differing_lines, differing_runs
from benchmarks.chaos_relay import Relay, Stage
from benchmarks.chaos_server import KilledServer, Target
from tests.servers import server_in
from training.backends.base import LoraSpec
from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import (
    Checkpoint,
    Model,
    ModelStatus,
    SamplerKind,
    SamplingSession,
    Session,
    SessionStatus,
    Snapshot,
    utcnow,
)
from training.storage.database import Connection, Database
from training.storage.repositories import (
    checkpoints,
    models,
    sampling_sessions,
    sessions,
    snapshots,
)

LINES = [{"what": "a", "loss": (0.1).hex()}, {"what": "b", "loss": (0.2).hex()}]
RUN = Run("sft", "train:0")
KEPT = Kept({"weights/final": {"adapter": "1234"}}, ["0 CreateModel", "1 OptimStep"])


def test_the_same_is_no_difference() -> None:
    assert differing_lines(LINES, LINES, "sft") == []
    assert differing_runs({RUN: [KEPT]}, {RUN: [KEPT, KEPT]}) == []


def test_one_bit_of_a_loss_is_a_difference() -> None:
    other = [LINES[0], LINES[1] | {"loss": (0.2 + 2**-54).hex()}]
    (problem,) = differing_lines(LINES, other, "sft")
    assert "line 2" in problem


def test_a_missing_line_is_a_difference() -> None:
    (problem,) = differing_lines(LINES, LINES[:1], "sft")
    assert "1 lines instead of 2" in problem


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (KEPT._replace(operations=[*KEPT.operations, "2 OptimStep"]), "3 instead of 2"),
        (KEPT._replace(operations=["0 CreateModel", "2 OptimStep"]), "2 OptimStep instead of 1"),
        (KEPT._replace(checkpoints={}), "other checkpoints"),
        (KEPT._replace(checkpoints={"weights/final": {"adapter": "4321"}}), "other bytes"),
    ],
)
def test_other_operations_and_files_are_differences(found: Kept, told: str) -> None:
    (problem,) = differing_runs({RUN: [KEPT]}, {RUN: [found]})
    assert told in problem


def test_a_run_that_is_not_there_is_a_difference() -> None:
    (problem,) = differing_runs({RUN: [KEPT], Run("rl", "train:0"): [KEPT]}, {RUN: [KEPT]})
    assert problem == "rl train:0 is missing"


# --------------------------------------------------------------------------- the audit


@pytest.fixture
async def data(tmp_path: Path) -> Data:
    """Of a server with one finished session, whose model was unloaded, and one that goes on."""
    for place in ("checkpoints/.staging", "metadata/snapshots/.staging"):
        (tmp_path / place).mkdir(parents=True)
    database = Database(f"sqlite:///{tmp_path / 'metadata' / 'futures.db'}")
    await database.start()
    await database.write(fill)
    await database.close()
    data = Data(tmp_path)
    for directory in ("checkpoints/c", "checkpoints/u", "metadata/snapshots/s"):
        (tmp_path / directory).mkdir()
    return data


def fill(connection: Connection) -> None:
    now, lora = utcnow(), LoraSpec(8, 1)
    sessions.insert(connection, Session("gone", "me", SessionStatus.FINISHED, now, now))
    sessions.insert(connection, Session("here", "me", SessionStatus.ACTIVE, now, now))
    for session, status in (("gone", ModelStatus.UNLOADED), ("here", ModelStatus.READY)):
        name = f"{session}:train:0"
        model = Model(name, session, 0, "me", "b", lora, "adamw", status, now, now)
        models.insert(connection, model)
    snapshots.add(connection, Snapshot("here:train:0", 3, "s", True, 1, now), 2)
    path = TinkerPath("here:train:0", CheckpointKind.TRAINING, "a")
    checkpoints.insert(connection, Checkpoint(path, "me", "b", lora, "adamw", "c", 1, now))
    sampler = SamplingSession("x", "here", "me", "b", SamplerKind.SNAPSHOT, now, snapshot_id="u")
    sampling_sessions.insert(connection, sampler)


def change(tmp_path: Path, statement: str) -> None:
    with closing(sqlite3.connect(tmp_path / "metadata" / "futures.db")) as connection, connection:
        connection.execute(statement)


def test_what_is_in_use_between_two_starts_is_no_problem(data: Data) -> None:
    assert data.problems_between(is_orderly=True) == []


@pytest.mark.parametrize("is_orderly", [True, False])
def test_what_no_death_may_leave_is_seen(data: Data, tmp_path: Path, is_orderly: bool) -> None:
    change(tmp_path, "UPDATE models SET status = 'unloaded', corrupted = true, fault = 'x'")
    (tmp_path / "checkpoints" / "c").rmdir()
    found = data.problems_between(is_orderly)
    told = (
        "gone:train:0 is marked",
        "here:train:0 is marked",
        "1 snapshots of model here",
        "1 checkp",
    )
    assert len(found) == len(told)
    assert all(any(each in problem for problem in found) for each in told)


def test_orphans_are_left_by_the_killed_alone(data: Data, tmp_path: Path) -> None:
    for place in ("checkpoints", "metadata/snapshots"):
        (tmp_path / place / "orphan").mkdir()
        (tmp_path / place / ".staging" / "half").mkdir()
    assert data.problems_between(is_orderly=False) == []
    assert len(data.problems_between(is_orderly=True)) == 4


def test_the_end_leaves_no_snapshot_of_a_model_that_has_ended(data: Data, tmp_path: Path) -> None:
    """Row and directory agree, and nobody would ever remove them."""
    change(tmp_path, "UPDATE models SET status = 'unloaded'")
    assert any("1 snapshots of model here" in problem for problem in data.problems())


# --------------------------------------------------------------------------- the kills


def test_who_was_not_there_was_not_killed(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    server.command = (sys.executable, "-c", "import time; time.sleep(600)", "serve")
    server.spawn()
    killed = KilledServer(server, lambda is_orderly: [])
    try:
        while Target.API not in killed.processes():
            time.sleep(0.01)
        assert set(killed.kill(Target.ENGINE)) == set()
        assert set(killed.kill(Target.BOTH)) == {Target.API}
        server.process.wait()
        assert set(killed.kill(Target.BOTH)) == set()
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("at_sigterm", "said", "is_right"),
    [
        ("SIG_DFL", "", True),
        ("SIG_DFL", '{"event": "server.ready"}', False),
        ("lambda *_: sys.exit(3)", "", False),
        ("lambda *_: sys.exit(0)", '{"event": "server.ready"}', True),
    ],
)
@pytest.mark.parametrize("make_level", [None, "0", "1"])
def test_a_stop_by_the_signal_is_only_right_while_it_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_sigterm: str,
    said: str,
    is_right: bool,
    make_level: str | None,
) -> None:
    """`make` ends with 2 whatever it was, and numbers itself where another one started it."""
    (tmp_path / "serve.py").write_text(
        "import pathlib, signal, sys, time\nfrom signal import SIG_DFL\n"
        f"signal.signal(signal.SIGTERM, {at_sigterm})\n"
        f"print({said!r}, flush=True)\npathlib.Path('up').touch()\ntime.sleep(600)\n"
    )
    (tmp_path / "Makefile").write_text(f"serve:\n\t@exec {sys.executable} serve.py serve\n")
    monkeypatch.setenv("MAKELEVEL", make_level or "0")
    server = server_in(tmp_path)
    server.command = ("make", "--no-print-directory", "serve")
    if make_level is None:
        server.command = (sys.executable, "serve.py", "serve")
    server.log_file.write_text('{"event": "server.ready"} of the one before\n')
    killed = KilledServer(server, lambda is_orderly: [])
    killed.spawn()
    try:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        assert set(killed.kill(Target.STOP)) == {Target.API}
        killed.check_end(server.process.wait())
        assert (killed.problems == []) is is_right
    finally:
        server.kill()


# --------------------------------------------------------------------------- the relay

HEAD = b"POST /api/v1/retrieve_future HTTP/1.1\r\nhost: here\r\ncontent-length: 22\r\n\r\n"
BODY = b'{"request_id": "abc"} '
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Peer:
    """A server that keeps what it gets and answers a whole request."""

    def __init__(self) -> None:
        self.got = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            self.got += chunk
            if self.got.endswith(BODY):
                writer.write(ANSWER)
                await writer.drain()
        writer.close()


async def relayed(stage: Stage | None, drop: bool) -> tuple[bytes, bytes, int]:
    """What the server had at the moment of the trap, what the client got, results counted."""
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[1])
    async with server, relay.listening():
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        if stage is None:
            writer.write(HEAD + BODY)
            answer, at_trap = await reader.readexactly(len(ANSWER)), b""
        else:
            with relay.trap(stage, "/retrieve_future") as caught:
                writer.write(HEAD + BODY)
                held = await caught
                await asyncio.sleep(0.05)  # whatever is on its way arrives
                at_trap = peer.got
                held.let_go(drop)
                answer = await reader.read(1000)
        writer.close()
        await writer.wait_closed()
    return at_trap, answer, relay.outcomes


async def test_the_relay_passes_on_what_it_gets() -> None:
    assert await relayed(None, drop=False) == (b"", ANSWER, 1)


async def test_half_of_a_body_is_there_in_the_middle_of_it() -> None:
    at_trap, answer, outcomes = await relayed(Stage.BODY, drop=False)
    assert at_trap == HEAD + BODY[:11]
    assert (answer, outcomes) == (ANSWER, 1)


async def test_an_answer_can_be_lost_on_its_way() -> None:
    at_trap, answer, outcomes = await relayed(Stage.ANSWER, drop=True)
    assert at_trap == HEAD + BODY, "the server is done with the request"
    assert (answer, outcomes) == (b"", 0)
