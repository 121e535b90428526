"""A data directory of the first version, whose server was killed in the middle of its work."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

from tests.e2e.raw import Raw, request
from tests.servers import REPOSITORY, running_server

DUMP = REPOSITORY / "tests" / "e2e" / "version_0001.sql"
"""Its database: a model after three steps, saved after the second; one made of that checkpoint,
after one step; an operation that waits for one which never came. All on the fake backend."""
SESSION = "20188e53-5c3e-4ba0-92d6-470f9f5e510a"
OLD, RESUMED = f"{SESSION}:train:0", f"{SESSION}:train:1"
CHECKPOINT = "f6be30949bea418b8fe149a2be29ff86"
WAITING = "req-ca075af348ef4c72afc43390e4dcd600"


def step(raw: Raw, model: str, seq: int) -> list[bytes]:
    passed = raw.retrieve(raw.forward_backward(request(model, seq))).content
    stepped = raw.retrieve(raw.optim_step(model, seq + 1, learning_rate=0.1)).content
    return [passed, stepped]


def undisturbed(directory: Path) -> tuple[list[bytes], Path]:
    """The results of the same run without an end in between; the files of its checkpoint."""
    directory.mkdir()
    with running_server(directory) as server, Raw(server) as raw:
        model = raw.new_model()
        results = step(raw, model, 1) + step(raw, model, 3)
        saved = raw.post("/save_weights", {"model_id": model, "seq_id": 5, "path": "kept"})
        assert "path" in raw.retrieve(saved.json()["request_id"]).json()
        results += step(raw, model, 6)
        for seq in (8, 9):
            results.append(raw.retrieve(raw.forward_backward(request(model, seq))).content)
        results.append(raw.retrieve(raw.optim_step(model, 10, learning_rate=0.1)).content)
    files = [path for path in (directory / "checkpoints").iterdir() if len(path.name) == 32]
    assert len(files) == 1
    return results, files[0]


def test_a_server_of_this_version_goes_on_where_the_first_one_was_killed(tmp_path: Path) -> None:
    expected, files = undisturbed(tmp_path / "undisturbed")
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    database = sqlite3.connect(metadata / "futures.db")
    database.executescript(DUMP.read_text())
    database.close()
    shutil.copytree(files, tmp_path / "checkpoints" / CHECKPOINT)
    with running_server(tmp_path) as server, Raw(server) as raw:
        runs = raw.checked(raw.http.get("/training_runs")).json()["training_runs"]
        assert {run["training_run_id"] for run in runs} == {OLD, RESUMED}
        eighth = raw.retrieve(raw.forward_backward(request(OLD, 8))).content
        ninth = raw.retrieve(WAITING).content
        tenth = raw.retrieve(raw.optim_step(OLD, 10, learning_rate=0.1)).content
        assert [eighth, ninth, tenth] == expected[-3:]
        # Made of the checkpoint after the second step, and one step older when it ended.
        assert step(raw, RESUMED, 3)[0] == expected[6]
        runs = raw.checked(raw.http.get("/training_runs")).json()["training_runs"]
        assert not any(run["corrupted"] for run in runs)
        events = [json.loads(x) for x in server.log_file.read_text().splitlines() if x[:1] == "{"]
        replayed = {e["model_id"]: e["num_replayed"] for e in events if "num_replayed" in e}
        assert replayed == {OLD: 8, RESUMED: 3}
