"""Nothing that was answered depends on a page that was not synced.

A server runs with a recorder of its system calls; from the record a disk is rebuilt as a power cut
could have left it (``chaos_disk``), after every answer and between, and held against what clients
had been told by then (``chaos_claims``). `kill -9` shows none of this: the kernel keeps its pages.
"""

from __future__ import annotations

import copy
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.backends.tiny import write_tiny_llama
from tests.e2e import chaos_disk
from tests.e2e.chaos_claims import Claims, Listener
from tests.e2e.chaos_disk import Disk, Folder, Lucky, Tree
from tests.e2e.chaos_trace import Did, Event, Recorder
from tests.e2e.raw import Raw
from tests.servers import FAKE_MODEL, REPOSITORY, Server, running_server, server_in

CHANCES = (0.0, 0.5, 0.9)
"""That something which was not synced has reached the disk."""
BETWEEN = 0.05
"""Share of the moments between two answers that are tried."""
NUM_RESUMED = 3
CLIENTS = {"sft": 8, "rl": 3}
"""Workload of the kill test -> steps."""

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="the recorder needs g++ on Linux"
)


class Cut(NamedTuple):
    """A disk that lost power, and what clients had been told."""

    tree: Tree
    claims: Claims


class Recorded(NamedTuple):
    """A server's life from its first start to its end. ``disk`` is at the start of it, ``said`` is
    all that clients were told."""

    model: Path
    data: Path
    disk: Disk
    events: list[Event]
    said: Claims


class Tried(NamedTuple):
    """``disk``: at the end of all events."""

    num_cuts: int
    broken: list[str]
    some: list[Cut]
    disk: Disk


def config_of(data: Path, model: Path) -> dict[str, Any]:
    return {
        "storage": {
            "metadata_dir": str(data / "metadata"),
            "checkpoint_dir": str(data / "checkpoints"),
        },
        "client": {"fwdbwd_max_chunk_len": 4},
        "durability": {"snapshot_steps": 2, "snapshot_pause_s": 0.0, "snapshot_share": 1.0},
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"dtype": "float32", "num_threads": 1, "kv_cache_tokens": 4096},
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("power")
    model = write_tiny_llama(folder / "llama", vocab_size=512, context_length=4096, text_of=chr)
    data = folder / "data"
    data.mkdir()
    disk, recorder = Disk(data), Recorder(folder, data)
    server = server_in(folder, config_of(data, model))
    server.environment = {**server.environment, **recorder.environment()}
    server.spawn()
    try:
        server.wait_until_ready()
        run_clients(server, folder)
    finally:
        server.stop()
    events, listener = recorder.events(), Listener()
    for event in events:
        listener.follow(event)
    return Recorded(model, data, disk, events, listener.claims)


def run_clients(server: Server, folder: Path) -> None:
    clients = []
    for name, steps in CLIENTS.items():
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.chaos_{name}"]
        command += [str(folder / name), "--model", FAKE_MODEL, "--steps", str(steps)]
        environment = server.client_environment()
        clients.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment))
    assert [client.wait() for client in clients] == [0] * len(clients)


@pytest.fixture(scope="module")
def tried(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return try_cuts(
        recorded, recorded.events, CHANCES, Folder(tmp_path_factory.mktemp("cuts") / "data")
    )


def try_cuts(
    recorded: Recorded, events: list[Event], chances: Sequence[float], folder: Folder
) -> Tried:
    """Until the first client says goodbye: from then on results may be deleted."""
    disk, listener, draw = copy.deepcopy(recorded.disk), Listener(), random.Random(1)
    claims = listener.claims
    num_accepted = len(recorded.said.accepted)
    keep_at = [num_accepted * part // (NUM_RESUMED + 1) for part in range(1, NUM_RESUMED + 1)]
    num_cuts, broken, some = 0, [], []
    for number, event in enumerate(events):
        disk.follow(event)
        is_answer = listener.follow(event)
        is_tried = is_answer or (event.did < Did.ACCEPTED and draw.random() < BETWEEN)
        if listener.finished or not is_tried:
            continue
        for chance in chances:
            tree = disk.after_a_cut(Lucky(draw, chance))
            told = claims.broken(folder.become(tree))
            broken += [f"event {number}, chance {chance}: {problem}" for problem in told]
            num_cuts += 1
        if len(claims.accepted) in keep_at:
            keep_at.remove(len(claims.accepted))
            some.append(Cut(tree, copy.deepcopy(claims)))
    return Tried(num_cuts, broken, some, disk)


def test_the_record_is_complete(recorded: Recorded, tried: Tried) -> None:
    """With all events and no cut the rebuilt disk is the real one. Snapshots were taken too."""
    assert any("/snapshots/" in event.name for event in recorded.events if event.did is Did.RENAME)
    assert tried.disk.current() == chaos_disk.read(recorded.data)


def test_no_cut_takes_back_an_answer(tried: Tried) -> None:
    assert tried.num_cuts > 500
    assert tried.broken[:5] == []


def test_what_is_not_synced_is_missed(recorded: Recorded, tmp_path: Path) -> None:
    """The check itself: without the syncs of the database's log, the same events break promises."""
    log = {event.inode for event in recorded.events if event.name.endswith("-wal")}
    unsynced = [
        event for event in recorded.events if event.did is not Did.SYNC or event.inode not in log
    ]
    assert len(unsynced) < len(recorded.events)
    assert try_cuts(recorded, unsynced, CHANCES[:1], Folder(tmp_path / "cut")).broken


@pytest.mark.parametrize("number", range(NUM_RESUMED))
def test_a_server_goes_on_from_what_a_cut_left(
    recorded: Recorded, tried: Tried, tmp_path: Path, number: int
) -> None:
    """Every promise is kept, and with the very bytes of the server that was never cut off."""
    tree, claims = tried.some[number]
    data = Folder(tmp_path / "data").become(tree)
    promised = without_gaps(data) & set(claims.accepted)
    with running_server(tmp_path, config_of(data, recorded.model)) as server, Raw(server) as raw:
        for request_id in sorted(promised):
            answer = raw.retrieve(request_id).content
            # Torch's sampler, run again in other company, may differ in the last bits.
            if claims.accepted[request_id].endswith("/asample"):
                assert answer == claims.delivered.get(request_id, answer)
            else:
                assert answer == recorded.said.delivered[request_id]


def without_gaps(data: Path) -> set[str]:
    """Requests whose predecessors had been accepted too: others wait for their clients."""
    with closing(sqlite3.connect(data / "metadata" / "futures.db")) as database:
        rows = database.execute(
            "SELECT request_id FROM (SELECT request_id, scope, seq, row_number() OVER "
            "(PARTITION BY scope ORDER BY seq) - 1 AS place FROM futures) "
            "WHERE seq = place OR scope NOT LIKE 'model:%'"
        )
        return {request_id for (request_id,) in rows}
