"""Connections that are held, fed or drained on purpose: each ends, and the server does not grow.

The protocol class runs in a server of its own here, so that limits can be short.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
import uvicorn

from training.cli.connections import guarded_protocol
from training.cli.serve import listening_socket
from training.config import ServerConfig

TIMEOUT_S = 1.0
BIG_BYTES = 64 * 2**20
PATIENCE_S = 120.0
"""Only bounds a test of a connection that would never end."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """``/echo`` tells how long the body was, ``/big`` answers much, ``/slow`` answers late."""
    num_bytes, more = 0, True
    while more and scope["path"] != "/unread":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes, more = num_bytes + len(message["body"]), message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * TIMEOUT_S)
    body = b"x" * BIG_BYTES if scope["path"] == "/big" else b"%d" % num_bytes
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(limits: ServerConfig) -> Iterator[tuple[str, int]]:
    with listening_socket("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=guarded_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving(ServerConfig(request_timeout_s=TIMEOUT_S, max_header_bytes=16384)) as found:
        yield found


@contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        yield client


def everything(client: socket.socket) -> bytes:
    """What the server says until it closes; a reset counts as an end."""
    received = bytearray()
    with suppress(ConnectionError):
        while piece := client.recv(2**16):
            received += piece
    return bytes(received)


def trickle(client: socket.socket, piece: bytes, pause_s: float) -> None:
    """Sends until the server has had enough."""
    deadline = time.monotonic() + PATIENCE_S
    with suppress(ConnectionError):
        while time.monotonic() < deadline:
            client.sendall(piece)
            time.sleep(pause_s)
    assert time.monotonic() < deadline, "the connection was never closed"


def still_serves(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(POST + b"connection: close\r\ncontent-length: 3\r\n\r\nabc")
        assert everything(client).endswith(b"\r\n\r\n3")


POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


TRICKLES = {
    "silence": (b"", b""),
    "method": (b"", b"G"),
    "name": (POST, b"a"),
    "header": (POST + b"x-slow: ", b"a"),
    "body": (POST + b"content-length: 1000000\r\n\r\n", b"a"),
    "chunks": (POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "body that nobody reads": (
        b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n",
        b"a",
    ),
}


def test_a_byte_now_and_then_does_not_hold_a_connection(address: tuple[str, int]) -> None:
    def hold(name: str) -> None:
        start, piece = TRICKLES[name]
        with connected(address) as client:
            client.sendall(start)
            if piece:
                trickle(client, piece, 0.2)
            else:
                assert everything(client) == b""

    with ThreadPoolExecutor(len(TRICKLES)) as pool:
        assert len(list(pool.map(hold, TRICKLES))) == len(TRICKLES)
    still_serves(address)


def test_blank_lines_between_requests_do_not_hold_a_connection(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(POST + b"content-length: 0\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        trickle(client, b"\r\n", 0.2)


def test_a_client_that_does_not_read_its_answer_is_let_go(address: tuple[str, int]) -> None:
    before = psutil.Process().memory_info().rss
    clients = [socket.create_connection(address, timeout=PATIENCE_S) for _ in range(4)]
    for client in clients:
        client.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
    process, deadline = psutil.Process(), time.monotonic() + PATIENCE_S
    while _established(process, address[1]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert time.monotonic() < deadline, "the answers were held for ever"
    for client in clients:
        client.close()
    # The loop drops what it held in the turn after the connection's end.
    while process.memory_info().rss - before >= 3 * BIG_BYTES and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.memory_info().rss - before < 3 * BIG_BYTES
    still_serves(address)


def _established(process: psutil.Process, port: int) -> int:
    """Connections on the server's side."""
    return sum(
        item.status == psutil.CONN_ESTABLISHED and item.laddr.port == port
        for item in process.net_connections("tcp4")
        if item.laddr
    )


def test_waiting_for_an_answer_is_no_fault(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_slow_line_is_no_fault(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(POST + b"connection: close\r\ncontent-length: 65536\r\n\r\n")
        for _ in range(16):
            client.sendall(b"x" * 4096)
            time.sleep(TIMEOUT_S / 8)
        assert everything(client).endswith(b"65536")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (POST + b"x-long: ", b"a" * 4096),
        (POST, b"x-many: 1\r\n" * 400),
        (b"GET /", b"a" * 4096),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x-trailer: 1\r\n" * 400),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx-trailer: ", b"a" * 4096),
        (POST + b"transfer-encoding: chunked\r\n\r\n1;ext=", b"a" * 4096),
        (POST + b"transfer-encoding: chunked\r\n\r\n", b"1;" + b"e" * 4096 + b"\r\na\r\n"),
    ],
    ids=["value", "headers", "url", "trailers", "trailer", "extension", "extensions"],
)
def test_what_is_not_body_is_bounded(address: tuple[str, int], start: bytes, piece: bytes) -> None:
    before = psutil.Process().memory_info().rss
    with connected(address) as client:
        client.sendall(start)
        with suppress(ConnectionError):
            for _ in range(20_000):
                client.sendall(piece)
            pytest.fail("80 MB of framing were taken in")
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
    still_serves(address)


def test_long_headers_are_refused_in_words(address: tuple[str, int]) -> None:
    for headers in (b"x-long: " + b"a" * 20_000, b"\r\n".join([b"a: 1"] * 5_000)):
        with connected(address) as client:
            client.sendall(POST + headers + b"\r\n\r\n")
            answer = everything(client)
        assert answer.startswith(b"HTTP/1.1 431")
        assert b"content-length: " in answer
        assert answer.endswith(b'{"detail":"the headers are too long","category":"user"}')


@pytest.mark.parametrize(
    "request_text",
    [
        b"\x00\xff\x16\x03\x01 rubbish\r\n\r\n",
        POST + b"content-length: abc\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 99999999999999999999999\r\n\r\n",
        POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        POST + b"x: a\x00b\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_words(address: tuple[str, int], request_text: bytes) -> None:
    with connected(address) as client:
        client.sendall(request_text)
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")
    assert answer.endswith(b'{"detail":"this is no valid HTTP request","category":"user"}')
    still_serves(address)


def test_an_upgrade_is_not_taken(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(
            b"GET /echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert not client.recv(4096).startswith(b"HTTP/1.1 101")
    still_serves(address)


def test_no_more_connections_than_allowed() -> None:
    with serving(ServerConfig(max_connections=5)) as address:
        kept = [socket.create_connection(address, timeout=PATIENCE_S) for _ in range(5)]
        for client in kept:  # each is answered, so that each is known to be there
            client.sendall(POST + b"content-length: 0\r\n\r\n")
            assert client.recv(4096)
        for _ in range(20):
            with connected(address) as client:
                assert everything(client) == b""
        kept[0].sendall(POST + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        assert everything(kept[0])
        still_serves(address)
        for client in kept:
            client.close()
