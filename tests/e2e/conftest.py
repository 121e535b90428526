"""The servers that the end-to-end tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.tiny import write_tiny_llama
from tests.e2e import raw as wire
from tests.servers import FAKE_MODEL, Server, running_server


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The local engine with a tiny Llama that looks like the fake model from outside: its name, its
    vocabulary, its context, its texts."""
    directory = tmp_path_factory.mktemp("tiny-server")
    model = write_tiny_llama(
        directory / "tiny-llama", vocab_size=512, context_length=4096, text_of=chr
    )
    config = {
        "supported_models": [{"name": FAKE_MODEL, "path": str(model)}],
        "engine": {"dtype": "float32", "num_threads": 1, "kv_cache_tokens": 16384},
    }
    with running_server(directory, config) as server:
        yield server


@pytest.fixture(scope="session", params=["fake", "local"])
def any_server(request: pytest.FixtureRequest) -> Server:
    """Tests that ask for this one run twice: on exact arithmetic and on the real engine."""
    fixture = {"fake": "fake_server", "local": "tiny_server"}[str(request.param)]
    server: Server = request.getfixturevalue(fixture)
    return server


@pytest.fixture
def raw(fake_server: Server) -> Iterator[wire.Raw]:
    with wire.Raw(fake_server) as client:
        yield client


@pytest.fixture
def model(raw: wire.Raw) -> Iterator[str]:
    """A model of the raw wire; operation 1 is the test's, and 2 and 3 must work after it."""
    model_id = raw.new_model()
    yield model_id
    raw.retrieve(raw.forward_backward(wire.request(model_id, 1)))  # where the test used no number
    raw.retrieve(raw.optim_step(model_id, 2, learning_rate=0.0))
    assert raw.output(raw.forward_backward(wire.request(model_id, 3))).metrics["loss:sum"] > 0
    assert "metrics" in raw.retrieve(raw.optim_step(model_id, 4, learning_rate=1e-3)).json()
