"""Few at a time through the event loop, so that others get in between."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets ``per_turn`` callers pass in each turn of the event loop, first come first served.

    Hundreds of results that become ready at once would else be answered in one turn, and whoever
    comes meanwhile waited for all of them: between two turns the loop looks at its sockets.
    """

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def enter(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        was_used = self._left < self._per_turn
        self._left = self._per_turn
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # whoever waited may have left
                turn.set_result(None)
                self._left -= 1
        self._is_turning = was_used or self._left < self._per_turn
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._turn)
