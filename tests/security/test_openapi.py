"""schemathesis over our own OpenAPI, with a key and without: what the page says is what happens.

Bounded in examples (``SCHEMATHESIS_MAX_EXAMPLES``) and fixed by ``SCHEMATHESIS_SEED``, so that a
longer run is ``SCHEMATHESIS_MAX_EXAMPLES=500 SCHEMATHESIS_SEED=7 scripts/test <this file>``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.raw import Raw, request
from tests.security.memory import MIB, resident_bytes
from tests.servers import FAKE_MODEL, REPOSITORY, Server, clean_environment, running_server

MAX_EXAMPLES = int(os.environ.get("SCHEMATHESIS_MAX_EXAMPLES", "10"))
SEED = os.environ.get("SCHEMATHESIS_SEED", "1")
UNCHECKED = ("positive_data_acceptance",)
"""A schema cannot say all that is checked: that 3.0 is no integer, that a model exists, that one of
two fields is needed."""
REFUSALS = [400, 401, 403, 404, 405, 413, 422, 429]
"""schemathesis does not count 413, with which a body is refused before anybody looks into it."""
MAX_GROWTH_BYTES = 128 * MIB
"""Some 25 kB for each request of a short run; a server that kept bodies would pass it early."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = {
        "server": {"long_poll_s": 0.1, "max_body_bytes": 16 * MIB},
        "scheduler": {"gap_timeout_s": 0.1},
    }
    with running_server(tmp_path_factory.mktemp("schemathesis"), config) as found:
        yield found


def known_ids(raw: Raw) -> dict[str, str]:
    model_id = raw.new_model()
    session_id = model_id.split(":")[0]
    body = {"model_id": model_id, "seq_id": 1, "path": "saved"}
    path = raw.retrieve(raw.post("/save_weights", body).json()["request_id"]).json()["path"]
    sampler = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": FAKE_MODEL}
    return {
        "model_id": model_id,
        "run_id": model_id,
        "session_id": session_id,
        "sampling_session_id": str(
            raw.post("/create_sampling_session", sampler).json()["sampling_session_id"]
        ),
        "request_id": raw.forward_backward(request(model_id, 2)),
        "base_model": FAKE_MODEL,
        "kind": "weights",
        "name": "saved",
        "tinker_path": str(path),
        "model_path": str(path),
    }


@pytest.mark.parametrize(
    ("key", "phases"), [("with a key", "coverage,fuzzing"), ("without a key", "fuzzing")]
)
def test_the_server_does_what_its_openapi_says(
    server: Server, tmp_path: Path, key: str, phases: str
) -> None:
    settings = f"[checks]\nnegative_data_rejection.expected-statuses = {REFUSALS}\n"
    (tmp_path / "schemathesis.toml").write_text(settings)
    with Raw(server) as raw:
        ids = known_ids(raw)
        headers = ["--header", f"X-API-Key: {server.api_key}"] if key == "with a key" else []
        before = resident_bytes(server)
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run"),
                f"{server.base_url}/openapi.json",
                *("--phases", phases, "--max-examples", str(MAX_EXAMPLES)),
                *("--seed", SEED, "--exclude-checks", ",".join(UNCHECKED)),
                *("--request-timeout", "60", "--continue-on-failure", "--no-color"),
                *headers,
            ],
            cwd=tmp_path,
            env=clean_environment()
            | {
                "SCHEMATHESIS_HOOKS": "tests.security.openapi_hooks",
                "KNOWN_IDS": json.dumps(ids),
                "PYTHONPATH": str(REPOSITORY),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2_000:]
        assert resident_bytes(server) - before < MAX_GROWTH_BYTES
        assert raw.output(raw.forward_backward(request(raw.new_model(), 1))).metrics["loss:sum"] > 0
    assert "request.crashed" not in server.log_file.read_text()
