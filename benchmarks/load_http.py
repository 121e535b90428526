"""HTTP/1.1 for many clients in one process, as the SDK uses it: a connection for each call that is
under way, kept open for the next one."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import orjson

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
KEPT_S = 30.0
"""Shorter than servers keep an idle connection, so that none is closed as it is used again."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    """Names in small letters."""
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)


class Http:
    """Of one client. A lost connection raises ``OSError`` or ``asyncio.IncompleteReadError``."""

    def __init__(self, port: int, api_key: str) -> None:
        self._port = port
        self._key = api_key
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []
        """And since when; the one used last is used next."""

    async def get(self, path: str, prefix: str = "/api/v1") -> Answer:
        return await self._call("GET", path, b"", JSON, prefix)

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        return await self._call("POST", path, orjson.dumps(body), JSON)

    async def post_bytes(self, path: str, body: bytes) -> Answer:
        return await self._call("POST", path, body, PROTOBUF)

    async def _call(
        self, method: str, path: str, body: bytes, content_type: str, prefix: str = "/api/v1"
    ) -> Answer:
        head = (
            f"{method} {prefix}{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {self._key}\r\n"
            f"User-Agent: AsyncTinker/Python 0.38.0\r\nAccept: {JSON}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await self._connection()
        try:
            writer.write(head.encode() + body)
            answer = await _read(reader)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer, time.monotonic()))
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since_s = self._idle.pop()
            if time.monotonic() - since_s < KEPT_S and not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)

    async def close(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()
        self._idle.clear()


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(head[0].split(" ")[1]), headers, body)
