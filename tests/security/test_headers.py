"""What browsers are told, and which web pages may call."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from tests.e2e.raw import Raw
from tests.servers import Server, running_server
from training.config import ServerConfig

CONSOLE = "https://console.example.org"
STRANGE = "https://evil.example.org"


@pytest.fixture(scope="module")
def cors_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("cors")
    with running_server(directory, {"server": {"cors_origins": [CONSOLE]}}) as found:
        yield found


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Asks for no key."""
    directory = tmp_path_factory.mktemp("open")
    settings = {"auth": {"enabled": False}, "server": {"cors_origins": [CONSOLE]}}
    with running_server(directory, settings) as found:
        yield found


PATHS = (
    "/api/v1/health",
    "/api/v1/training_runs",
    "/api/v1/nothing",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/hf/a/b/resolve/main/config.json",
    "/",
    "/nothing",
)


def check_headers(answer: httpx.Response) -> None:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert re.match(r"default-src '(none|self)'", answer.headers["content-security-policy"])
    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_key", [True, False])
def test_every_answer_has_them(fake_server: Server, path: str, with_key: bool) -> None:
    headers = {"X-API-Key": fake_server.api_key} if with_key else {}
    answer = httpx.get(fake_server.base_url + path, headers=headers)
    check_headers(answer)
    assert (answer.headers.get("cache-control") == "no-store") == path.startswith("/api/")


def test_heartbeats_have_them(fake_server: Server) -> None:
    """Those of live sessions are answered before any middleware."""
    url = fake_server.base_url + "/api/v1/session_heartbeat"
    headers = {"X-API-Key": fake_server.api_key}
    with Raw(fake_server) as raw:
        answer = httpx.post(url, json={"session_id": raw.new_session()}, headers=headers)
    assert answer.status_code == 200
    check_headers(answer)
    assert answer.headers["cache-control"] == "no-store"


def test_heartbeats_of_web_pages_are_answered_as_all_else(cors_server: Server) -> None:
    url = cors_server.base_url + "/api/v1"
    headers = {"X-API-Key": cors_server.api_key, "Origin": CONSOLE}
    with httpx.Client(headers=headers) as client:
        session = client.post(f"{url}/create_session", json={"tags": []}).json()
        beat = {"session_id": session["session_id"]}
        answer = client.post(f"{url}/session_heartbeat", json=beat)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == CONSOLE


def test_an_internal_error_has_them_too(tmp_path: Path) -> None:
    """Made outside of the middleware: by a route that fails in an application of our own."""
    from fastapi.testclient import TestClient

    from training.api import create_app
    from training.config import ModelConfig, StorageConfig, TrainingConfig

    fake = ModelConfig(name="tests/fake", backend="fake")
    storage = StorageConfig(metadata_dir=tmp_path / "m", checkpoint_dir=str(tmp_path / "c"))
    app = create_app(TrainingConfig(supported_models=(fake,), storage=storage))

    @app.get("/api/v1/bug")
    async def bug() -> None:
        raise ZeroDivisionError("secret detail")

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/api/v1/bug")
    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error; see the server log", "category": "server"}
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_of_the_api_runs_no_script_but_its_own(fake_server: Server) -> None:
    page = httpx.get(f"{fake_server.base_url}/docs")
    policy = page.headers["content-security-policy"]
    (script,) = re.findall(rb"<script>(.*?)</script>", page.content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    (scripts,) = re.findall(r"script-src ([^;]*)", policy)
    assert scripts.split() == ["https://cdn.jsdelivr.net", f"'sha256-{digest}'"]
    assert "connect-src 'self'" in policy
    linked = re.findall(rb'(?:src|href)="(https?://[^/"]+)', page.content)
    assert set(linked) == {b"https://cdn.jsdelivr.net"}


# --------------------------------------------------------------------------- other origins


def preflight(server: Server, origin: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "x-api-key, content-type"}
    return httpx.options(f"{server.base_url}/api/v1/create_session", headers=asked)


def test_no_page_of_another_origin_may_call(fake_server: Server) -> None:
    answer = preflight(fake_server, STRANGE)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_listed_origin_may_and_no_other(cors_server: Server) -> None:
    allowed = preflight(cors_server, CONSOLE)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == CONSOLE
    assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
    for origin in (STRANGE, "null", CONSOLE + ".evil.org", CONSOLE.replace("https", "http")):
        refused = preflight(cors_server, origin)
        assert "access-control-allow-origin" not in refused.headers
    for origin, told in ((CONSOLE, CONSOLE), (STRANGE, None)):
        headers = {"Origin": origin, "X-API-Key": cors_server.api_key}
        answer = httpx.get(f"{cors_server.base_url}/api/v1/training_runs", headers=headers)
        assert answer.headers.get("access-control-allow-origin") == told
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example.org", "null", "example.org", "https://a/b", "https://a b"]
)
def test_a_list_of_origins_has_no_wildcards(origin: str) -> None:
    with pytest.raises(ValidationError, match="wildcard"):
        ServerConfig.model_validate({"cors_origins": [origin]})


@pytest.mark.parametrize("url", ["example.org", "ftp://a", "https://a/?x=1", "javascript:1", ""])
def test_a_public_url_is_one(url: str) -> None:
    with pytest.raises(ValidationError, match="public_url"):
        ServerConfig.model_validate({"public_url": url})


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_without_keys_no_foreign_page_can_post_a_form(
    open_server: Server, content_type: str
) -> None:
    """Such a request needs no preflight, so a browser sends it for any page."""

    def post(**origin: str) -> int:
        headers: dict[str, Any] = {"Content-Type": content_type} | origin
        url = f"{open_server.base_url}/api/v1/create_session"
        return httpx.post(url, content=b"{}", headers=headers).status_code

    assert post() == 200
    assert post(Origin=open_server.base_url) == 200
    assert post(Origin=CONSOLE) == 200
    for origin in (STRANGE, "null", "https://127.0.0.1.evil.org", "file://"):
        assert post(Origin=origin) == 401


def test_refusals_have_one_shape(fake_server: Server) -> None:
    with Raw(fake_server) as raw:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("PUT", "/create_session", 405),
            ("GET", "/training_runs?limit=x", 400),
            ("GET", "/samplers/none", 404),
            ("POST", "/get_info", 400),
        ):
            answer = raw.http.request(method, path)
            assert answer.status_code == status
            assert answer.json().keys() == {"detail", "category"}
            assert isinstance(answer.json()["detail"], str)
    unknown = httpx.get(f"{fake_server.base_url}/api/v1/training_runs")
    assert unknown.headers["www-authenticate"] == "Bearer"


def test_the_key_file_is_its_users_alone(fake_server: Server) -> None:
    path = Path(fake_server.directory) / "metadata" / "signing.key"
    assert path.stat().st_mode & 0o777 == 0o600
