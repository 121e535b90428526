"""What every answer tells a browser: guess no types, leak no addresses, embed and keep nothing.

The SDK reads none of it. Scripts of other origins call only where ``server.cors_origins`` says.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training.config import ServerConfig

_EVERYWHERE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_NOT_KEPT = (b"cache-control", b"no-store")
_DATA_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_PAGE_POLICY = (
    b"content-security-policy",
    b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    b"form-action 'self'; frame-ancestors 'none'",
)
"""Pages (the console) take everything from this server and run no inline script."""

DATA = (*_EVERYWHERE, _DATA_POLICY, _NOT_KEPT)
"""Of answers with somebody's data."""
_OPEN_DATA = (*_EVERYWHERE, _DATA_POLICY)
_PAGE = (*_EVERYWHERE, _PAGE_POLICY)

_DATA_PATHS = ("/api/", "/oai/")
_OPEN_DATA_PATHS = ("/hf/", "/metrics", "/openapi.json")


def headers_for(path: str) -> tuple[tuple[bytes, bytes], ...]:
    if path.startswith(_DATA_PATHS):
        return DATA
    return _OPEN_DATA if path.startswith(_OPEN_DATA_PATHS) else _PAGE


class SecurityHeaders:
    """Adds what the route itself has not set."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                present = {name.lower() for name, _ in headers}
                wanted = headers_for(scope["path"])
                headers.extend(header for header in wanted if header[0] not in present)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def install_headers(app: FastAPI, config: ServerConfig) -> None:
    if config.cors_origins:
        # No credentials: a key is a header that a script must know, never a cookie.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("X-API-Key", "Authorization", "Content-Type", "Content-Encoding"),
            max_age=600,
        )
    app.add_middleware(SecurityHeaders)
