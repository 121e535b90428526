"""Who is suspected when the kernel killed engine and server for their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.services import running
from training.services.running import RunningRequests


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vmstat"
    path.write_text("oom_kill 3\n")
    monkeypatch.setattr(running, "_COUNTER", (path,))
    return path


def killed(tmp_path: Path, *names: str) -> Path:
    """Leaves the file of a server that was killed while it ran these."""
    path = tmp_path / "running.json"
    server = RunningRequests(path)
    assert server.start() == []
    server.note("model", ["some", "much longer", "names", "before"])
    server.note("model", names)
    return path


def test_what_ran_when_memory_ended_is_suspected_once(tmp_path: Path, counter: Path) -> None:
    path = killed(tmp_path, "a", "b")
    counter.write_text("oom_kill 4\n")
    assert RunningRequests(path).start() == ["a", "b"]
    assert RunningRequests(path).start() == []


def test_a_kill_by_hand_is_nobodys_fault(tmp_path: Path, counter: Path) -> None:
    assert RunningRequests(killed(tmp_path, "a")).start() == []


def test_after_a_power_cut_nobody_is_to_blame(tmp_path: Path, counter: Path) -> None:
    path = killed(tmp_path, "a")
    counter.write_text("oom_kill 4\n")
    left = json.loads(path.read_text())
    path.write_text(json.dumps({**left, "boot_id": "another"}))
    assert RunningRequests(path).start() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"running": 3}', b"\xff\x00", b"null"])
def test_a_file_that_is_damaged_blames_nobody(
    tmp_path: Path, counter: Path, content: bytes
) -> None:
    path = killed(tmp_path, "a")
    path.write_bytes(content)
    assert RunningRequests(path).start() == []


def test_a_directory_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    server = RunningRequests(tmp_path / "missing" / "running.json")
    assert server.start() == []
    server.note("model", ["a"])
    server.close()
