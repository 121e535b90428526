"""Where measurements are kept: ``docs/performance/NAME.json``, one entry for each part that can be
measured by itself. The plots and tables of the page are made from these files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.children import REPOSITORY
from benchmarks.machine import Limits
from benchmarks.workload import Case

DIRECTORY = REPOSITORY / "docs" / "performance"


def load(name: str, directory: Path = DIRECTORY) -> dict[str, Any]:
    """Empty where nothing has been measured."""
    path = directory / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def store(
    name: str, part: str, values: Mapping[str, Any], limits: Limits, directory: Path = DIRECTORY
) -> None:
    """Replaces ``part`` and leaves the others as they are."""
    everything = load(name, directory)
    everything[part] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "limits": rounded(asdict(limits)),
        **rounded(dict(values)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(everything.items())), indent=1)
    (directory / f"{name}.json").write_text(text + "\n")


def rounded(value: Any) -> Any:
    """Cases as JSON, and floats with the five digits that mean something."""
    match value:
        case Case():
            return value.to_json()
        case float():
            return float(f"{value:.5g}")
        case Mapping():
            return {key: rounded(each) for key, each in value.items()}
        case str():
            return value
        case Sequence():
            return [rounded(each) for each in value]
        case _:
            return value
