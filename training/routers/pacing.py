"""Requests enter few at a time, but for those that must never wait for the others."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from training.core.turnstile import Turnstile
from training.routers.common import API

PER_TURN = 4
"""Each takes a millisecond or two of the event loop."""
AT_ONCE = frozenset({f"{API}/health", f"{API}/healthz", f"{API}/session_heartbeat", "/metrics"})


class PacedApp(FastAPI):
    """The turnstile stands before everything: half of a request's time goes to what is around the
    route. ``state.turnstile`` is there for answers too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._turnstile = self.state.turnstile = Turnstile(PER_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in AT_ONCE:
            await self._turnstile.enter()
        await super().__call__(scope, receive, send)
