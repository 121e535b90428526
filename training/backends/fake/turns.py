"""Turns of samples in the caller's event loop: one at a time, tenants one after the other."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class TenantTurns:
    """However many samples of one tenant wait, another's only waits for one of them."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._giving: asyncio.Task[None] | None = None

    async def turn(self, tenant: str) -> None:
        """Returns when it is the caller's; it lasts until the caller waits for something."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        if self._giving is None:
            self._giving = asyncio.create_task(self._give())
        await mine

    async def _give(self) -> None:
        while self._waiting:
            tenant, futures = self._waiting.popitem(last=False)
            next_one = futures.popleft()
            if futures:
                self._waiting[tenant] = futures  # behind the others
            if not next_one.done():  # else its caller has gone
                next_one.set_result(None)
                await asyncio.sleep(0)  # it runs now
        self._giving = None
