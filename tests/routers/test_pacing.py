"""Heartbeats on their short way answer as on the usual one, and nothing else takes it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.raw import Raw
from tests.servers import Server
from training.routers.pacing import HEARTBEAT


@pytest.fixture
def raw(fake_server: Server) -> Iterator[Raw]:
    with Raw(fake_server) as client:
        yield client


def beat(raw: Raw, session_id: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return raw.http.post("/session_heartbeat", json={"session_id": session_id}, headers=named)


def test_both_ways_answer_the_same(raw: Raw) -> None:
    session = raw.new_session()
    short = beat(raw, session)
    # A trailing part of the body, or a key in the other header, is a matter for the usual way.
    key = raw.http.headers["X-API-Key"]
    body = b'{"session_id": "%s"}' % session.encode()
    url = f"{raw.http.base_url}session_heartbeat"
    usual = httpx.post(url, content=body, headers={"Authorization": f"Bearer {key}"})
    pieces = httpx.post(url, content=iter([body[:9], body[9:]]), headers={"X-API-Key": key})
    for answer in (usual, pieces):
        assert answer.status_code == short.status_code == 200
        assert answer.content == short.content
        assert answer.headers["content-type"] == short.headers["content-type"]
        assert answer.headers["content-length"] == short.headers["content-length"]


def test_what_is_wrong_is_told_as_everywhere(raw: Raw, fake_server: Server) -> None:
    session = raw.new_session()
    assert beat(raw, session).status_code == 200
    assert beat(raw, session, X_API_Key="tml-unknown").status_code == 401
    assert beat(raw, session, X_API_Key=fake_server.other_key).status_code == 404
    assert beat(raw, "no-such-session").status_code == 404
    for body in (b"", b"{", b"[]", b'{"session_id": 7}', b"\xff"):
        answer = raw.post_bytes("/session_heartbeat", body)
        assert answer.status_code == 400, body
    assert raw.http.get("/session_heartbeat").status_code == 405
    raw.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}})
    assert beat(raw, session).status_code == 410


def test_a_client_that_goes_in_the_middle_harms_nobody(raw: Raw, fake_server: Server) -> None:
    address = httpx.URL(fake_server.base_url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        head = f"POST {HEARTBEAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{"
        connection.sendall(head.encode())
    assert beat(raw, raw.new_session()).status_code == 200
