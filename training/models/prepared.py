"""The marker of a prepared model directory: what it was made from and what each file weighs.

Knows nothing of torch; the conversion itself lives in ``training.engine.prepare``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

MARKER_NAME = "prepared.json"
FORMAT = 1
"""Raised whenever the conversion writes something else; older directories are then redone."""


class PreparedFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    size_bytes: int
    sha256: str


class Marker(BaseModel):
    """Written last, so a directory with a marker is whole."""

    model_config = ConfigDict(frozen=True)

    format: int
    model: str
    source: str
    source_sha256: str
    files: dict[str, PreparedFile]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_marker(directory: Path, model: str, source: Path) -> Marker:
    """Describes every file of ``directory``, which must be complete."""
    marker = Marker(
        format=FORMAT,
        model=model,
        source=source.name,
        source_sha256=sha256_of(source),
        files={
            path.name: PreparedFile(size_bytes=path.stat().st_size, sha256=sha256_of(path))
            for path in sorted(directory.iterdir())
            if path.name != MARKER_NAME
        },
    )
    (directory / MARKER_NAME).write_text(marker.model_dump_json(indent=2) + "\n")
    return marker


def read_marker(directory: Path) -> Marker | None:
    """None where there is no marker, or one that this version does not understand."""
    try:
        return Marker.model_validate(json.loads((directory / MARKER_NAME).read_text()))
    except (OSError, json.JSONDecodeError, ValidationError):
        return None


def is_prepared(directory: Path) -> bool:
    """Whether ``directory`` holds every file of a current conversion, by size.

    Sizes are enough at each start (the marker is written after the files are on disk);
    ``damaged_files`` reads the contents.
    """
    marker = read_marker(directory)
    if marker is None or marker.format != FORMAT:
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == file.size_bytes
        for name, file in marker.files.items()
    )


def is_usable(directory: Path) -> bool:
    """Whether ``directory`` is a model: our own if whole and current, anybody else's as it is."""
    if (directory / MARKER_NAME).exists():
        return is_prepared(directory)
    return (directory / "config.json").is_file()


def damaged_files(directory: Path) -> list[str]:
    """Names whose contents differ from the marker's checksums; for ``tinkercloud doctor``."""
    marker = read_marker(directory)
    if marker is None:
        return [MARKER_NAME]
    return [
        name
        for name, file in marker.files.items()
        if not (directory / name).is_file() or sha256_of(directory / name) != file.sha256
    ]
