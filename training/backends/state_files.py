"""Files of a state as backends write and read them: on disk when the call returns, errors in one
form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from training.core.errors import StorageError


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file. ``tensors`` are contiguous and may be views of one array: they are
    written from where they are, without the interpreter's lock."""
    save_file(dict(tensors), path, metadata=metadata)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def reason(error: Exception) -> str:
    """Without paths of ours: a client reads it."""
    if isinstance(error, FileNotFoundError):  # safetensors' own has no number, only a text
        return "the file is not there"
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


@contextmanager
def storage_errors() -> Iterator[None]:
    """A disk that refuses becomes a ``StorageError`` without paths of ours: a client reads it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write the state: {reason(error)}") from error
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise StorageError(f"cannot write the state: {error}") from error
