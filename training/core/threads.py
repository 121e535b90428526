"""The one way from the event loop to blocking work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function`` in a worker thread; for disk, decompression and decoding."""
    return await asyncio.to_thread(function, *args, **kwargs)
