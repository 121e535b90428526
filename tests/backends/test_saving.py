"""``Saving``, whoever does or does not ask how it ended."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from training.backends.base import Saving
from training.core.errors import StorageError


async def test_a_failure_that_nobody_asks_about_is_no_error_of_asyncios() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    writing: asyncio.Future[None] = loop.create_future()
    saving = Saving(writing)
    writing.set_exception(StorageError("full"))
    await asyncio.sleep(0)
    del saving, writing
    gc.collect()
    assert complaints == []


async def test_who_stops_waiting_stops_nobody_else() -> None:
    writing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    saving = Saving(writing)
    impatient, patient = (asyncio.create_task(saving.written()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.sleep(0)
    assert impatient.cancelled()
    assert not writing.cancelled()
    writing.set_exception(StorageError("full"))
    with pytest.raises(StorageError):
        await patient
    with pytest.raises(StorageError):
        await saving.written()
