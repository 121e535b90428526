"""The kernels' library, in every form that this processor runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from training.engine.native import build, library


def _targets() -> list[build.Target | None]:
    try:
        return list(build.supported_targets())
    except build.BuildError:
        return [None]


@pytest.fixture(scope="session", params=_targets(), ids=lambda target: getattr(target, "name", ""))
def kernels(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """What the engine would load; skips where nothing runs: another processor, or no compiler."""
    target: build.Target | None = request.param
    with pytest.MonkeyPatch.context() as patch:
        if target is not None:
            patch.setattr(build, "TARGETS", (target,))
        library.load.cache_clear()
        try:
            loaded = library.load()
        except build.BuildError as error:
            pytest.skip(f"no native kernels: {error}")
        yield loaded
    library.load.cache_clear()


@pytest.fixture
def threads(kernels: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library, whose number of threads is set back after the test."""
    before = kernels.tc_num_threads()
    yield kernels
    kernels.tc_set_num_threads(before)
