"""The kernels' library, for tests that call it directly."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from training.engine.native.build import BuildError, library_path


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    """Skips where the kernels do not run: another processor, or no compiler."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except BuildError as error:
        pytest.skip(f"no native kernels: {error}")
    if not library.tc_available():
        pytest.skip("no native kernels: this processor has no AMX (tiles of bfloat16)")
    return library


@pytest.fixture
def threads(kernels: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library, whose number of threads is set back after the test."""
    before = kernels.tc_num_threads()
    yield kernels
    kernels.tc_set_num_threads(before)
