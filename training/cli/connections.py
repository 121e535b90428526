"""Bounds what one connection may cost: uvicorn alone reads headers of any size, for any time.

A client that sends too slowly, sends too much besides its body, or does not read its answer loses
its connection. One that waits for an answer never does.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, ClassVar

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from training.config import ServerConfig

log = structlog.get_logger(__name__)

_CHECKS_PER_LIMIT = 6
_GRACE_S = 1.0
"""A late client gets this much more, in which the loop reads what already lies in the socket: the
loop may have been slow, not the client."""
_MIN_BYTES_PER_S = 1024
_FRAMING_PER_BODY_BYTE = 8
"""A chunked body of one byte per chunk has five bytes of framing for each of its own."""
_HEADER_COST_BYTES = 32
"""What a header counts for besides its text, as in HTTP/2: many small ones cost memory too."""
_SPARE_FILES = 512
"""Descriptors for the database, the engines, checkpoints."""

# Rubbish on a socket is not worth a line each: strangers could fill the disk with them.
_LOGGER = logging.getLogger("training.connections")
_LOGGER.setLevel(logging.ERROR)


def guarded_protocol(limits: ServerConfig) -> type[HttpToolsProtocol]:
    """A class for ``uvicorn.Config(http=...)``."""
    bounds = {"limits": limits, "max_connections": _room_for(limits.max_connections)}
    return type("BoundProtocol", (GuardedProtocol,), bounds)


def _room_for(num_connections: int) -> int:
    """Raises the process's limit of open files as far as it may; what still does not fit is cut
    off, so that strangers who connect cannot keep the database from opening its files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _SPARE_FILES
    if resource.RLIM_INFINITY != soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return num_connections
    room = max(soft - _SPARE_FILES, soft // 2)
    log.warning("connections.limited", max_connections=room, open_files=soft)
    return room


class _TooLong(Exception):
    """Ends the parsing of a request."""


class GuardedProtocol(HttpToolsProtocol):
    limits: ClassVar[ServerConfig]
    max_connections: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _LOGGER
        self._owed_since: float | None = None
        """Since when the client owes us (the rest of) a request; None while it owes nothing."""
        self._idle_since: float | None = None
        self._request_bytes = 0
        self._body_bytes = 0
        self._is_in_head = False
        self._began_in_this_piece = False
        self._is_too_long = False
        self._unread_bytes = 0
        self._unread_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._owed_since = self.loop.time()
        self._timer = self.loop.call_later(self._check_s(), self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._began_in_this_piece = False
        super().data_received(data)
        if self._owed_since is None or self.transport.is_closing():
            return
        if not self._began_in_this_piece:
            self._request_bytes += len(data)
        framing_bytes = self._request_bytes - self._body_bytes
        allowance = self.limits.max_header_bytes + _FRAMING_PER_BODY_BYTE * self._body_bytes
        if framing_bytes <= allowance:
            return
        if self._is_in_head:
            self._is_too_long = True
            self.send_400_response("")
        else:  # endless trailers, or chunks that are all extension
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """In the form of all our refusals. ``msg`` is uvicorn's."""
        status, detail = b"400 Bad Request", b"this is no valid HTTP request"
        if self._is_too_long:
            status, detail = b"431 Request Header Fields Too Large", b"the headers are too long"
        body = b'{"detail":"%s","category":"user"}' % detail
        self.transport.write(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, len(body), body)
        )
        self.transport.close()

    # ------------------------------------------------------------------ parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._owed_since = self.loop.time()
        self._idle_since = None
        self._request_bytes = self._body_bytes = 0
        self._is_in_head = self._began_in_this_piece = True

    def on_headers_complete(self) -> None:
        head_bytes = len(self.url) + sum(
            len(name) + len(value) + _HEADER_COST_BYTES for name, value in self.headers
        )
        if head_bytes > self.limits.max_header_bytes:
            self._is_too_long = True
            raise _TooLong  # the parser stops, and send_400_response is called
        self._is_in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._owed_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()

    # ------------------------------------------------------------------ time

    def _check(self, is_final: bool = False) -> None:
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        late = self._is_late()
        if late and is_final:
            self.transport.abort()
            return
        self._timer = self.loop.call_later(_GRACE_S if late else self._check_s(), self._check, late)

    def _check_s(self) -> float:
        return self.limits.request_timeout_s / _CHECKS_PER_LIMIT

    def _is_late(self) -> bool:
        now, limit_s = self.loop.time(), self.limits.request_timeout_s
        unread_bytes = self.transport.get_write_buffer_size()
        if not unread_bytes or unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since = unread_bytes, now
        if unread_bytes and now - self._unread_since > limit_s:
            return True
        if self._owed_since is not None and not self.flow.read_paused:
            return now - self._owed_since > limit_s + self._body_bytes / _MIN_BYTES_PER_S
        # Blank lines between two requests stop uvicorn's own timeout.
        is_idle = self._owed_since is None and self._idle_since is not None
        return is_idle and now - (self._idle_since or now) > self.timeout_keep_alive + limit_s
