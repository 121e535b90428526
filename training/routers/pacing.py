"""How requests enter: few at a time and fair to their owners, but for those that must never wait.

A heartbeat of a session that is known to live has a short way of its own: 5,000 idle sessions send
500 a second, and FastAPI's part of a request is many times that of a heartbeat. Whatever is not
plain about one goes the usual way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from training.core.errors import Unauthenticated
from training.core.turnstile import Turnstile
from training.routers.common import API
from training.routers.headers import DATA
from training.services.server import Server
from training.wire.responses import Heartbeat, dump_json

PER_TURN = 4
"""Each takes a millisecond or two of the event loop."""
HEARTBEAT = f"{API}/session_heartbeat"
AT_ONCE = frozenset({f"{API}/health", f"{API}/healthz", HEARTBEAT, "/metrics"})
STRANGER = ""
"""Whoever has no key in its usual place; they share one line."""
_NOT_PLAIN = {b"content-encoding", b"origin"}
"""A body to be unpacked; a web page, whose origin is looked at and answered."""
_BEATEN = dump_json(Heartbeat())
_BEATEN_HEADERS = [
    *DATA,
    (b"content-length", str(len(_BEATEN)).encode()),
    (b"content-type", b"application/json"),
]


class PacedApp(FastAPI):
    """The turnstile stands before everything: half of a request's time goes to what is around the
    route. So who asks is found out twice. ``state.turnstile`` is there for answers too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._turnstile = self.state.turnstile = Turnstile(PER_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] == HEARTBEAT and scope["method"] == "POST":
                first = await receive()
                if _has_beaten(self.state.server, scope, first):
                    start = {"type": "http.response.start", "status": 200}
                    await send(start | {"headers": _BEATEN_HEADERS})
                    await send({"type": "http.response.body", "body": _BEATEN})
                    return
                receive = _beginning_with(first, receive)
            elif scope["path"] not in AT_ONCE:
                owner = _owner(self.state.server, dict(scope["headers"]))
                await self._turnstile.enter(owner or STRANGER)
        await super().__call__(scope, receive, send)


def _has_beaten(server: Server, scope: Scope, message: Message) -> bool:
    """False for all that needs a closer look."""
    headers = dict(scope["headers"])
    if message["type"] != "http.request" or message.get("more_body"):
        return False
    owner = _owner(server, headers)
    if owner is None or not headers.keys().isdisjoint(_NOT_PLAIN):
        return False
    try:
        body = orjson.loads(message["body"])
    except orjson.JSONDecodeError:
        return False
    session_id = body.get("session_id") if isinstance(body, dict) else None
    return isinstance(session_id, str) and server.sessions.beat(owner, session_id)


def _owner(server: Server, headers: Mapping[bytes, bytes]) -> str | None:
    """None without a key that is known, in the header that the SDK uses."""
    try:
        return server.auth.authenticate(headers.get(b"x-api-key", b"").decode("latin-1"))
    except Unauthenticated:
        return None


def _beginning_with(first: Message, receive: Receive) -> Receive:
    messages = [first]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
