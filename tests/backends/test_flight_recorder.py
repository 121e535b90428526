"""What is read of an engine that has ended: of real processes, killed at any moment."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.servers import REPOSITORY
from training.backends.flight_recorder import FlightRecord, FlightRecorder

WRITER = """
import itertools, sys
from training.backends.flight_recorder import FlightRecorder
recorder = FlightRecorder(int(sys.argv[1]))
print("ready", flush=True)
for first in itertools.count(1, 64):
    recorder.at_work(range(first, first + 64))
    sum(range(1000))
    recorder.at_work(())
"""
"""64 calls, of which no two sets share one."""


@pytest.fixture
def record() -> Iterator[FlightRecord]:
    record = FlightRecord(max_calls=64)
    yield record
    record.close()


def test_what_is_noted_is_read(record: FlightRecord) -> None:
    recorder = FlightRecorder(record.fd)
    assert record.read() == frozenset()
    recorder.at_work([3, 2**63])
    assert record.read() == {3, 2**63}
    recorder.at_work((5,))
    assert record.read() == {5}
    recorder.receiving(6)
    assert record.read() == {5, 6}
    recorder.at_work(())
    assert record.read() == {6}
    recorder.receiving(0)
    assert record.read() == frozenset()
    recorder.at_work(range(1, 65))
    assert record.read() == set(range(1, 65))


def test_calls_that_were_only_half_noted_are_not_read(record: FlightRecord) -> None:
    recorder = FlightRecorder(record.fd)
    recorder.at_work([3, 4])
    recorder.receiving(7)
    os.pwrite(record.fd, struct.pack("=Q", 3), 0)
    assert record.read() == {7}
    os.pwrite(record.fd, struct.pack("=Q", 4), 0)
    assert record.read() == {3, 4, 7}


def test_more_calls_than_there_is_room_for_are_refused(record: FlightRecord) -> None:
    with pytest.raises(ValueError, match="different structures"):
        FlightRecorder(record.fd).at_work(range(65))


def test_a_process_that_is_killed_at_any_moment_leaves_one_whole_set_or_none() -> None:
    full = 0
    for attempt in range(12):
        record = FlightRecord(max_calls=64)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(record.fd)],
            pass_fds=(record.fd,),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.001 * attempt)
            process.kill()
        if calls := record.read():
            assert calls == set(range(min(calls), min(calls) + 64))
            assert min(calls) % 64 == 1
            full += 1
        record.close()
    assert full, "it works for most of its time"
