"""Spill directories end with their process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.servers import REPOSITORY
from training.engine.spill_files import SpillDirectory

OWNER = """
import sys
from pathlib import Path
from training.engine.spill_files import SpillDirectory
directory = SpillDirectory(Path(sys.argv[1]))
directory.new_path().write_bytes(b"state")
print("ready", flush=True)
sys.stdin.read()
"""


def start_owner(parent: Path) -> subprocess.Popen[str]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    return owner


def files(parent: Path) -> list[Path]:
    return sorted(parent.glob("*/*.spill"))


def test_files_go_with_a_process_that_ends(tmp_path: Path) -> None:
    with start_owner(tmp_path) as owner:
        assert len(files(tmp_path)) == 1
        owner.communicate()
    assert list(tmp_path.glob("engine-*")) == []


def test_files_of_a_killed_process_go_when_the_next_starts(tmp_path: Path) -> None:
    with start_owner(tmp_path) as killed, start_owner(tmp_path) as alive:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert len(files(tmp_path)) == 2
        SpillDirectory(tmp_path)
        assert len(files(tmp_path)) == 1
        alive.communicate()
    assert files(tmp_path) == []


def test_nothing_is_made_before_the_first_file(tmp_path: Path) -> None:
    directory = SpillDirectory(tmp_path / "spill")
    assert directory.files() == []
    assert not (tmp_path / "spill").exists()
    first, second = directory.new_path(), directory.new_path()
    assert first != second
    assert first.parent == second.parent
