"""Structured logging: readable on a terminal, JSON lines elsewhere. Never a key or a body."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, TextIO, cast

import structlog

MASK = "[secret]"
_SIGNATURE = re.compile(r"(signature=)[^&\s]+")
_MIN_MASKED_CHARS = 8
"""A shorter secret is a word that the log may need."""


class _Forgiving:
    """A stream that loses a line rather than raise: a log file on a full disk, or a reader that
    went away, must not stop the loops that log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class _Masking(_Forgiving):
    """Nothing of ours logs a key; this is for what others put into an exception's text."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        super().__init__(stream)
        masked = {secret for secret in secrets if len(secret) >= _MIN_MASKED_CHARS}
        self._secrets = sorted(masked, key=len, reverse=True)

    def write(self, text: str) -> int:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return super().write(text)


class _MaskedLinks(logging.Filter):
    """uvicorn's access log, where somebody has it on, tells whole paths; a link to a file is its
    own permission."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                _SIGNATURE.sub(rf"\1{MASK}", arg) if isinstance(arg, str) else arg
                for arg in record.args
            )
        return True


class _Relay(logging.Handler):
    """What libraries log (uvicorn, asyncio) in our own form."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        log.log(record.levelno, "library", message=record.getMessage(), exc_info=exc_info)


def configure_logging(
    log_format: Literal["auto", "console", "json"] = "auto", secrets: Sequence[str] = ()
) -> None:
    """``secrets`` never reach the log, whoever writes them."""
    access_log = logging.getLogger("uvicorn.access")
    if not any(isinstance(old, _MaskedLinks) for old in access_log.filters):
        access_log.addFilter(_MaskedLinks())
    on_terminal = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if on_terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(
            cast(TextIO, _Masking(sys.stderr, secrets)),
        ),
    )


def relay_library_logs() -> None:
    """For a process of our own: warnings of libraries go the same way as our lines."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Relay()], force=True)
