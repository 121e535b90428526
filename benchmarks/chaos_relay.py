"""A relay between a client and a server that is killed: it knows where requests begin and end.

It passes bytes on as they are. A trap set for a moment of a request (half of its body sent, its
answer about to be passed on) holds that connection there until whoever set it lets go. While the
server is down, clients are refused, as they would be without the relay.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum

import httptools

_CHUNK_BYTES = 1 << 16
_RESULTS = "/retrieve_future"


class Stage(StrEnum):
    BODY = "half of the body is sent"
    ANSWER = "the answer is about to be passed on"


@dataclass(eq=False)
class Held:
    """A connection that stands still until ``let_go``, which may close it instead."""

    path: str
    _dropped: bool = False
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def let_go(self, drop: bool = False) -> None:
        self._dropped = drop
        self._released.set()

    async def wait(self) -> None:
        """Raises ``ConnectionResetError`` where the connection is to be closed."""
        await self._released.wait()
        if self._dropped:
            raise ConnectionResetError


@dataclass(eq=False)
class Trap:
    """Catches the first request at ``stage`` whose path ends with one of ``suffixes``."""

    stage: Stage
    suffixes: tuple[str, ...]
    caught: asyncio.Future[Held]

    async def pass_by(self, stage: Stage, path: str) -> None:
        if stage is self.stage and path.endswith(self.suffixes) and not self.caught.done():
            held = Held(path)
            self.caught.set_result(held)
            await held.wait()


class Relay:
    """``outcomes`` counts results of promises that the client has received for the first time."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._traps: list[Trap] = []
        self._outcomes: set[str] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def outcomes(self) -> int:
        return len(self._outcomes)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    @contextmanager
    def trap(self, stage: Stage, *suffixes: str) -> Iterator[asyncio.Future[Held]]:
        """What it has caught is let go at the end, if nobody did before."""
        trap = Trap(stage, suffixes, asyncio.get_running_loop().create_future())
        self._traps.append(trap)
        try:
            yield trap.caught
        finally:
            self._traps.remove(trap)
            if trap.caught.done() and not trap.caught.cancelled():
                trap.caught.result().let_go()
            trap.caught.cancel()

    def _begin(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._connection(client, to_client))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connection(
        self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            await _close(to_client)
            return
        talk = _Talk()
        up = asyncio.create_task(self._up(talk, client, to_server))
        down = asyncio.create_task(self._down(talk, server, to_client))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            await _close(to_server)
            await _close(to_client)

    async def _up(
        self, talk: _Talk, client: asyncio.StreamReader, to_server: asyncio.StreamWriter
    ) -> None:
        while chunk := await client.read(_CHUNK_BYTES):
            num_body_bytes = talk.sent(chunk)
            if num_body_bytes:
                cut = len(chunk) - (num_body_bytes + 1) // 2
                to_server.write(chunk[:cut])
                await self._pass_by(Stage.BODY, talk.path)
                chunk = chunk[cut:]
            to_server.write(chunk)
            await to_server.drain()

    async def _down(
        self, talk: _Talk, server: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        while chunk := await server.read(_CHUNK_BYTES):
            if talk.begins_answer():
                await self._pass_by(Stage.ANSWER, talk.path)
            outcome = talk.received(chunk)
            to_client.write(chunk)
            await to_client.drain()
            if outcome is not None:
                self._outcomes.add(outcome)

    async def _pass_by(self, stage: Stage, path: str) -> None:
        for trap in list(self._traps):
            await trap.pass_by(stage, path)


async def _close(writer: asyncio.StreamWriter) -> None:
    """What was written still goes out, as the kernel does it for a process that was killed."""
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


class _Talk:
    """One connection's requests and answers, one after the other, as HTTP/1.1 has them."""

    def __init__(self) -> None:
        self.path = ""
        self._requests = httptools.HttpRequestParser(self)
        self._answer = _Answer()
        self._body: list[bytes] = []
        self._num_body_bytes = 0

    def sent(self, chunk: bytes) -> int:
        """Returns how many bytes of a body are in it."""
        self._num_body_bytes = 0
        self._requests.feed_data(chunk)
        return self._num_body_bytes

    def begins_answer(self) -> bool:
        return not self._answer.began

    def received(self, chunk: bytes) -> str | None:
        """Returns the id of the promise whose result is complete with it."""
        status = self._answer.received(chunk)
        if status != 200 or not self.path.endswith(_RESULTS):
            return None
        request_id: str = json.loads(b"".join(self._body))["request_id"]
        return request_id

    # ----------------------------------------------------------------- called by the parser

    def on_url(self, url: bytes) -> None:
        self.path = url.decode()
        self._body = []
        self._answer = _Answer()

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        if self.path.endswith(_RESULTS):
            self._body.append(body)


class _Answer:
    def __init__(self) -> None:
        self.began = False
        self._is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def received(self, chunk: bytes) -> int | None:
        """The status once the answer is complete."""
        self.began = True
        self._parser.feed_data(chunk)
        return self._parser.get_status_code() if self._is_complete else None

    def on_message_complete(self) -> None:
        self._is_complete = True
