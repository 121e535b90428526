"""Keys and signatures appear nowhere: not in what a server prints, writes or answers.

A server with canary keys is driven into every kind of error, then everything is searched.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import logging
import re
import secrets
import socket
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from tests.e2e.raw import Raw, request
from tests.servers import REPOSITORY, Server, clean_environment, running_server
from training.config import AuthConfig, StorageConfig, TrainingConfig
from training.services.auth import Authenticator

CANARY = "canary-" + secrets.token_hex(16)
OTHER = "canary-" + secrets.token_hex(16)
WRONG = "canary-" + secrets.token_hex(16)
"""Also a secret: perhaps the key of another server."""
FORMS = ("json", "console")


@pytest.fixture(scope="module", params=FORMS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = {
        "auth": {"api_keys": [f"tml-{CANARY}", OTHER]},
        "log_format": request.param,
        "server": {"long_poll_s": 0.2, "max_body_bytes": 100_000},
        "scheduler": {"gap_timeout_s": 0.1},
    }
    directory = tmp_path_factory.mktemp("secrets")
    with running_server(directory, config) as found:
        (directory / "training.json").unlink()  # read already; the only place for a key
        found.api_key = f"tml-{CANARY}"
        yield found


def ways_of_sending(key: str) -> Iterator[dict[str, str]]:
    yield {"X-API-Key": key}
    yield {"X-API-Key": "", "Authorization": f"Bearer {key}"}
    yield {"X-API-Key": "", "Authorization": f"Basic {key}"}
    yield {"X-API-Key": key, "Content-Encoding": "zstd"}
    yield {"X-API-Key": key, "Content-Type": f"application/{key}"}


REQUESTS = (
    ("GET", "/training_runs"),
    ("GET", "/nothing"),
    ("GET", "/checkpoints?limit=x"),
    ("POST", "/create_session"),
    ("POST", "/forward_backward"),
    ("DELETE", "/create_session"),
)


def hammer(server: Server, raw: Raw) -> tuple[list[httpx.Response], list[str]]:
    """Every kind of error that a client can cause; what was answered, and links that were given."""
    answers: list[httpx.Response] = []
    for key in (CANARY, f"tml-{CANARY}", WRONG, f"tml-{WRONG}"):
        for headers in ways_of_sending(key):
            for method, path in REQUESTS:
                rubbish = raw.http.request(method, path, headers=headers, content=b"\xff rubbish")
                answers.append(rubbish)
    answers.append(raw.http.post("/create_session", content=b"x" * 200_000))
    model_id = raw.new_model()
    save = {"model_id": model_id, "seq_id": 1, "path": "a"}
    raw.retrieve(raw.post("/save_weights", save).json()["request_id"])
    files = f"/training_runs/{model_id}/checkpoints/weights/a/files"
    links = list(raw.http.get(files).json()["urls"].values())
    for link in links:
        answers += [httpx.get(link + "0"), httpx.get(link.replace("expires=", "expires=9"))]
        assert httpx.get(link).status_code == 200
    for stored in (server.directory / "checkpoints").glob("*/*.json"):
        stored.write_bytes(b"damaged")
    load = {"model_id": model_id, "seq_id": 2, "path": f"tinker://{model_id}/weights/a"}
    answers.append(raw.retrieve(raw.post("/load_weights", load).json()["request_id"]))
    answers.append(raw.http.get(files))
    assert answers[-1].status_code == 503  # logged as an error, with its path
    open_paths = ("/docs", "/openapi.json", "/metrics", "/api/v1/health")
    answers += [httpx.get(server.base_url + path) for path in open_paths]
    return answers, links


def send_no_http(server: Server) -> None:
    host, port = server.base_url.removeprefix("http://").split(":")
    for text in (f"GET / HTTP/1.1\r\nX-API-Key: {CANARY}\x00\r\n\r\n", f"{CANARY}\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(text.encode())
            while client.recv(4096):
                pass


def test_no_key_and_no_signature_is_told_or_kept(server: Server) -> None:
    with Raw(server) as raw:
        answers, links = hammer(server, raw)
        send_no_http(server)
        raw.output(raw.forward_backward(request(raw.new_model(), 1)))
    server.stop()
    needles = [CANARY, OTHER, WRONG, CANARY[7:23], WRONG[7:23]]
    needles += [hashlib.sha256(key.encode()).hexdigest() for key in (CANARY, OTHER)]
    signatures = [urlsplit(link).query.split("signature=")[1] for link in links]
    assert signatures
    written = [path for path in server.directory.rglob("*") if path.is_file()]
    assert {"server.log", "futures.db"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        for needle in needles + signatures:
            assert needle.encode() not in content, (path.name, needle)
    for answer in answers:
        assert not any(needle in f"{answer.headers} {answer.text}" for needle in needles)
    with closing(sqlite3.connect(server.directory / "metadata" / "futures.db")) as database:
        dump = "\n".join(database.iterdump())
    assert "key-" in dump  # owners are there
    assert not any(needle in dump for needle in needles + signatures)
    assert "request.failed" in server.log_file.read_text()  # errors were logged at all


_CRASH = f"""
import asyncio, logging
from training.logs import configure_logging, relay_library_logs
configure_logging("FORMAT", ["{CANARY}"])
relay_library_logs()
import structlog
key = "{CANARY}"
headers = {{"x-api-key": key}}
try:
    raise ValueError(f"bad headers: {{headers}}")
except ValueError:
    structlog.get_logger("t").exception("request.crashed", headers=headers)
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
logging.getLogger("asyncio").error("task failed: %s", headers)
"""


@pytest.mark.parametrize("form", FORMS)
def test_not_even_an_exception_that_repeats_a_key(form: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _CRASH.replace("FORMAT", form)],
        env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = run.stdout + run.stderr
    assert printed.count("bad headers") >= 2
    assert "[secret]" in printed
    assert CANARY not in printed


def test_uvicorns_access_log_masks_links(capfd: pytest.CaptureFixture[str]) -> None:
    from training.logs import configure_logging

    configure_logging()
    configure_logging()
    log = logging.getLogger("uvicorn.access")
    record = log.makeRecord(
        log.name,
        logging.INFO,
        "",
        0,
        '%s - "%s %s HTTP/%s" %d',
        ("1.2.3.4", "GET", "/a?expires=1&signature=f00d&x=1", "1.1", 200),
        None,
    )
    assert all(item.filter(record) for item in log.filters if isinstance(item, logging.Filter))
    assert record.getMessage() == '1.2.3.4 - "GET /a?expires=1&signature=[secret]&x=1 HTTP/1.1" 200'


def test_the_configuration_hides_its_secrets() -> None:
    config = TrainingConfig(
        auth=AuthConfig(api_keys=(SecretStr(CANARY),)),
        storage=StorageConfig(database_url=f"postgresql+asyncpg://user:{CANARY}@host/db"),
    )
    for text in (repr(config), str(config), f"{config.auth!r}", f"{config.storage!r}"):
        assert CANARY not in text


def test_errors_of_the_configuration_hide_its_secrets(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    for auth in ({"api_keys": CANARY}, {"api_keys": [CANARY, ""]}, {"api_keys": {CANARY: 1}}):
        path.write_text(json.dumps({"auth": auth}))
        run = subprocess.run(
            [sys.executable, "-m", "training.cli", "serve", "--config", str(path)],
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 2, run.stderr
        assert "auth.api_keys" in run.stderr
        assert CANARY not in run.stdout + run.stderr


# --------------------------------------------------------------------------- comparing keys


def test_every_key_is_compared_and_none_with_an_equals_sign() -> None:
    """Structure, not time: a statistical test would fail by chance. Each configured digest is given
    to ``compare_digest``, also after one has matched, and a digest has the same length whatever was
    sent."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Authenticator.authenticate)))
    (comprehension,) = [node for node in ast.walk(tree) if isinstance(node, ast.ListComp)]
    assert re.search(r"hmac\.compare_digest\(known, digest\)", ast.unparse(comprehension))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.Break))]
