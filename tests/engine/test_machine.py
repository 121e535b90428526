"""What the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.engine import machine
from training.engine.machine import memory_bytes

CPU = torch.device("cpu")


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the container: a file that is not there yet."""
    path = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (tmp_path / "of another version", path))
    return path


@pytest.mark.parametrize("text", [None, "max\n", "9223372036854771712\n"])
def test_without_a_limit_all_that_is_installed(limit: Path, text: str | None) -> None:
    if text is not None:
        limit.write_text(text)
    (total,) = (
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert memory_bytes(CPU) == total


def test_a_container_may_have_less(limit: Path) -> None:
    limit.write_text("123456789\n")
    assert memory_bytes(CPU) == 123456789
