"""The one way from the event loop to blocking work."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OwnThreads:
    """Its methods run in ``threads``: what it waits for may hang, and then keeps nobody else's."""

    threads: Executor


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function`` in a worker thread; for disk, decompression and decoding."""
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, OwnThreads):
        return await asyncio.to_thread(function, *args, **kwargs)
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(owner.threads, call)


async def in_thread_if(
    is_long: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """A thread hop costs more than short work does."""
    return await in_thread(function, *args, **kwargs) if is_long else function(*args, **kwargs)
