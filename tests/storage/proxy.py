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


class Proxy:
    """Listens on ``port`` of the loopback and passes bytes to PostgreSQL's unix socket."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._abandoned: list[asyncio.StreamWriter] = []
        self.next_commit: Cut | None = None
        self.was_cut = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
        answers = asyncio.create_task(self._pass_answers(server_reader, writer))
        cut: Cut | None = None
        with suppress(OSError):
            while cut is None and (data := await reader.read(1 << 16)):
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
        writer.close()
        if cut in (Cut.SILENT, Cut.UNSEEN):
            self._abandoned.append(server_writer)
        else:
            server_writer.close()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
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
