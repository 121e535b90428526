"""Directories and files that outlast a power cut: a new name is on the disk once what holds it is
synced."""

from __future__ import annotations

import os
from pathlib import Path


def make_directory(path: Path) -> None:
    """With its parents; one that is there passes. Raises ``OSError``."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises ``OSError``."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_bytes(content)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def reason(error: OSError) -> str:
    """Without the path: a client reads it."""
    return error.strerror or type(error).__name__
