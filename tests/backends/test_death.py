"""Why a process ended, of real processes and with counters of our own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.backends.death import STALL_EXIT_CODE, count_oom_kills, counter_files, death_of
from training.core.errors import DeathCause

ENDS = {
    "abort": ("import os; os.abort()", DeathCause.CRASHED, f"signal {signal.SIGABRT:d}"),
    "segfault": (
        "import ctypes; ctypes.string_at(0)",
        DeathCause.CRASHED,
        f"signal {signal.SIGSEGV:d}",
    ),
    "exit": ("import os; os._exit(3)", DeathCause.CRASHED, "exit code 3"),
    "leaves": ("pass", DeathCause.CRASHED, "exit code 0"),
    "stall": (f"import os; os._exit({STALL_EXIT_CODE})", DeathCause.STALLED, "stalled"),
    "kill": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        DeathCause.KILLED,
        "signal 9",
    ),
}


def end_of(code: str) -> int:
    # As little as possible is said about a death that is meant.
    return subprocess.run(
        [sys.executable, "-X", "faulthandler=0", "-c", code], check=False, stderr=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ended_by_itself_crashed_and_one_that_was_killed_did_not(end: str) -> None:
    code, cause, detail = ENDS[end]
    death = death_of(end_of(code), 5, 5)
    assert death.cause is cause
    assert detail in death.detail


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        (5, 5, DeathCause.KILLED),
        (5, 6, DeathCause.CRASHED),
        (None, None, DeathCause.CRASHED),
        (None, 5, DeathCause.CRASHED),
    ],
)
def test_a_kill_is_the_kernels_where_its_count_grew_or_cannot_be_read(
    before: int | None, after: int | None, cause: DeathCause
) -> None:
    assert death_of(-signal.SIGKILL, before, after).cause is cause


def test_only_a_crash_and_a_stall_are_held_against_the_work() -> None:
    blamed = {cause for cause in DeathCause if cause.blames_work}
    assert blamed == {DeathCause.CRASHED, DeathCause.STALLED}


def test_the_first_file_with_a_count_decides(tmp_path: Path) -> None:
    events, vmstat = tmp_path / "memory.events", tmp_path / "vmstat"
    assert count_oom_kills([events, vmstat]) is None
    vmstat.write_text("pgfault 12\noom_kill 7\nthp_oom_kill 9\n")
    assert count_oom_kills([events, vmstat]) == 7
    events.write_text("low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n")
    assert count_oom_kills([events, vmstat]) == 2
    events.write_text("oom_kill_disable 0\nunder_oom 0\n")  # an old kernel's
    assert count_oom_kills([events, vmstat]) == 7


def test_our_own_group_is_asked_before_the_machine(tmp_path: Path) -> None:
    cgroups = tmp_path / "cgroup"
    machine = Path("/proc/vmstat")
    assert counter_files(cgroups, tmp_path) == [machine]
    cgroups.write_text("0::/system.slice/tinkercloud.service\n")
    assert counter_files(cgroups, tmp_path) == [
        tmp_path / "system.slice/tinkercloud.service/memory.events",
        tmp_path / "memory.events",
        machine,
    ]
    cgroups.write_text("5:devices:/\n4:hugetlb,memory:/docker/12ab\n1:name=systemd:/a:b\n")
    assert counter_files(cgroups, tmp_path) == [
        tmp_path / "memory/docker/12ab/memory.oom_control",
        tmp_path / "memory/memory.oom_control",
        machine,
    ]
