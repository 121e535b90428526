"""What a server has told its clients: what it must still know after a power cut."""

from __future__ import annotations

import json
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httptools

from tests.e2e.chaos_trace import Did, Event
from training.core.errors import TinkercloudError
from training.storage.files import CheckpointFiles

PROMISES = (
    "/create_model",
    "/forward",
    "/forward_backward",
    "/optim_step",
    "/save_weights",
    "/save_weights_for_sampler",
    "/load_weights",
    "/asample",
)


class Exchange(NamedTuple):
    path: str
    request: bytes
    status: int
    answer: bytes


@dataclass
class _Message:
    path: str = ""
    body: bytes = b""


class _Requests:
    """Called by the parser. An answer may come before the end of a body that nobody wants."""

    def __init__(self) -> None:
        self.open: deque[_Message] = deque()
        self._current = _Message()

    def on_url(self, url: bytes) -> None:
        self._current = _Message(url.decode())
        self.open.append(self._current)

    def on_body(self, body: bytes) -> None:
        self._current.body += body


class _Answer:
    """Called by the parser."""

    def __init__(self) -> None:
        self.body = b""
        self.is_complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True


class _Conversation:
    """A connection: requests and their answers, in order."""

    def __init__(self) -> None:
        self._requests = _Requests()
        self._hear = httptools.HttpRequestParser(self._requests)
        self._next_answer()

    def _next_answer(self) -> None:
        self._answer = _Answer()
        self._say = httptools.HttpResponseParser(self._answer)

    def heard(self, data: bytes) -> None:
        self._hear.feed_data(data)

    def said(self, data: bytes) -> Exchange | None:
        """The exchange that is complete with it."""
        self._say.feed_data(data)
        if not self._answer.is_complete:
            return None
        request = self._requests.open.popleft()
        status, body = self._say.get_status_code(), self._answer.body
        self._next_answer()
        return Exchange(request.path, request.body, status, body)


@dataclass
class Claims:
    """What clients have been told; request ids -> what was asked for, or the result."""

    accepted: dict[str, str] = field(default_factory=dict)
    delivered: dict[str, bytes] = field(default_factory=dict)
    sessions: set[str] = field(default_factory=set)

    def broken(self, root: Path) -> list[str]:
        """What of it the data below ``root`` does not keep."""
        return list(self._broken(root))

    def _broken(self, root: Path) -> Iterator[str]:
        file = root / "metadata" / "futures.db"
        if not file.exists():
            if self.accepted or self.sessions:
                yield "there is no database"
            return
        # Opened as the server does: what a log holds is taken over.
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA synchronous=OFF")
            (state,) = database.execute("PRAGMA integrity_check").fetchone()
            if state != "ok":
                yield f"the database is damaged: {state}"
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "futures" in tables:
                yield from self._broken_rows(database)
                yield from _broken_checkpoints(database, root)
            elif self.accepted or self.sessions:
                yield "the database is empty"

    def _broken_rows(self, database: sqlite3.Connection) -> Iterator[str]:
        sessions = {row[0] for row in database.execute("SELECT session_id FROM sessions")}
        if lost := self.sessions - sessions:
            yield f"sessions that were given out are unknown: {lost}"
        statuses = dict(database.execute("SELECT request_id, status FROM futures"))
        bodies = dict(database.execute("SELECT request_id, body FROM results"))
        for request_id, path in self.accepted.items():
            if request_id not in statuses:
                yield f"{path} {request_id} was accepted and is unknown"
        for request_id, answer in self.delivered.items():
            if statuses.get(request_id) != "done":
                yield f"{request_id} was answered and is {statuses.get(request_id)}"
            elif bodies.get(request_id, answer) != answer:
                yield f"{request_id} was answered with other bytes"


class Listener:
    """Follows the events of a server; its ``claims`` grow with what it says."""

    def __init__(self) -> None:
        self.claims = Claims()
        self.finished = False
        """A client has said goodbye: from here on results may be deleted."""
        self._conversations: dict[tuple[int, int], _Conversation] = {}

    def follow(self, event: Event) -> bool:
        """True where an answer is complete with this event."""
        connection = (event.pid, event.fd)
        if event.did is Did.ACCEPTED:
            self._conversations[connection] = _Conversation()
        elif event.did is Did.HEARD:
            self._conversations[connection].heard(event.data)
            self.finished |= b"/finish HTTP" in event.data
        elif event.did is Did.SAID:
            exchange = self._conversations[connection].said(event.data)
            if exchange is not None and exchange.status == 200:
                self._learn(exchange)
                return True
        return False

    def _learn(self, exchange: Exchange) -> None:
        claims = self.claims
        if exchange.path.endswith("/retrieve_future"):
            claims.delivered[json.loads(exchange.request)["request_id"]] = exchange.answer
        elif exchange.path.endswith(PROMISES):
            claims.accepted[json.loads(exchange.answer)["request_id"]] = exchange.path
        elif exchange.path.endswith("/create_session"):
            claims.sessions.add(json.loads(exchange.answer)["session_id"])


def _broken_checkpoints(database: sqlite3.Connection, root: Path) -> Iterator[str]:
    """Whatever has a row has its files."""
    for place, query in (
        ("checkpoints", "SELECT path, directory FROM checkpoints"),
        ("metadata/snapshots", "SELECT model_id || ' ' || seq, directory FROM snapshots"),
    ):
        files = CheckpointFiles(root / place)
        for name, directory in database.execute(query):
            try:
                files.verify(directory)
            except TinkercloudError as error:
                yield f"{name}: {error}"
