"""Fixtures that everything below may use: real servers, and models for them.

Set before anything is imported: a Hugging Face cache of the tests' own, never the network's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

_CACHE = tempfile.TemporaryDirectory(prefix="tinkercloud-tests-hf-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TINKER_TELEMETRY"] = "0"

from tests.postgres import ENVIRONMENT_VARIABLE, fresh_database, running_postgres  # noqa: E402
from tests.servers import REPOSITORY, Server, running_server  # noqa: E402
from training.config import EMBEDDED_MODEL, TrainingConfig  # noqa: E402
from training.models.registry import ensure_embedded_model  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """The SDK reads its configuration through an HTTP client that it never closes; the garbage
    collector then complains in whatever test is running."""
    for leak in ("unclosed transport", "unclosed <socket.socket"):
        config.addinivalue_line("filterwarnings", f"ignore:{leak}:ResourceWarning")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """An application that a test makes in this process sets the logging of the process: it goes
    with the test, or what the next one reads would depend on which ran before it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Directory of the embedded model, converted once per checkout."""
    return ensure_embedded_model(TrainingConfig(model_dir=REPOSITORY / "data" / "models"))


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the fake model alone: the protocol at full speed."""
    with running_server(tmp_path_factory.mktemp("fake-server")) as server:
        yield server


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    """A server of the embedded model on the local engine."""
    config = {
        "supported_models": [{"name": EMBEDDED_MODEL, "path": str(embedded_model)}],
        # One thread: two that wait for each other stand still on a machine that is busy.
        "engine": {"num_threads": 1, "kv_cache_tokens": 16384},
    }
    with running_server(tmp_path_factory.mktemp("real-server"), config) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server where tests make databases of their own."""
    if url := os.environ.get(ENVIRONMENT_VARIABLE):
        yield url
        return
    with running_postgres() as server:
        yield server.url("postgres")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Tests that ask for this one run on both databases; it is empty, and theirs alone."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'meta' / 'futures.db'}"
        return
    with fresh_database(request.getfixturevalue("postgres")) as url:
        yield url
