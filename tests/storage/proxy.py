"""A network between server and PostgreSQL that fails where a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path


class Cut(Enum):
    """What happens to the next COMMIT."""

    BEFORE = "it does not arrive"
    AFTER = "its answer does not arrive"
    SILENT = "it does not arrive, and the server does not notice that the client is gone"
    UNSEEN = "it arrives, its answer does not, and the server does not notice either"
    DARK = "it does not arrive, and nobody notices anything"


class Proxy:
    """Listens on ``port`` of the loopback and passes bytes to PostgreSQL's unix socket."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._abandoned: list[asyncio.StreamWriter] = []
        self._num_connections = 0
        self._num_dark = 0
        self.is_dark = False
        """For connections that are yet to come."""
        self.next_commit: Cut | None = None
        self.was_cut = asyncio.Event()
        self.port = 0

    def go_dark(self) -> None:
        """The connections that there are stay open, and nothing passes in either direction."""
        self._num_dark = self._num_connections

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._num_connections = self._num_connections, self._num_connections + 1
        if self.is_dark:
            await self._swallow(reader, writer)
            return
        server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
        answers = asyncio.create_task(self._pass_answers(server_reader, writer, number))
        cut: Cut | None = None
        with suppress(OSError):
            while cut is None and (data := await reader.read(1 << 16)):
                if number < self._num_dark:
                    continue
                if self.next_commit is not None and b"COMMIT;" in data:
                    cut, self.next_commit = self.next_commit, None
                    self.was_cut.set()
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                if cut in (None, Cut.AFTER, Cut.UNSEEN):
                    server_writer.write(data)
                    await server_writer.drain()
                if cut in (Cut.AFTER, Cut.UNSEEN):
                    await server_reader.read(1 << 16)
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)
        if cut is Cut.DARK:
            await self._swallow(reader, writer)
        writer.close()
        if cut in (Cut.SILENT, Cut.UNSEEN, Cut.DARK):
            self._abandoned.append(server_writer)
        else:
            server_writer.close()

    async def _swallow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while await reader.read(1 << 16):
                pass
        writer.close()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if number >= self._num_dark:
                    writer.write(data)
                    await writer.drain()
        writer.close()

    def close(self) -> None:
        for writer in self._abandoned:
            writer.close()


@asynccontextmanager
async def running_proxy(upstream: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        proxy.close()
        server.close()
        await server.wait_closed()
