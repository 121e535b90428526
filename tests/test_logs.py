"""Logging never stops what logs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import structlog
from training.logs import configure_logging
configure_logging("json")
for number in range(3):
    structlog.get_logger("test").info("line", number=number)
print("went on")
"""


def test_a_full_disk_under_the_log_stops_nobody() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert run.stdout == b"went on\n"
