"""Few at a time through the event loop, so that others get in between."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets ``per_turn`` callers pass in each turn of the event loop: of each owner in turn, and of
    one owner first come first served.

    Hundreds of results that become ready at once would else be answered in one turn, and whoever
    comes meanwhile waited for all of them: between two turns the loop looks at its sockets.
    """

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """By owner, the one whose turn it is first; never empty inside."""
        self._is_turning = False

    async def enter(self, owner: str) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left and not self._lines:
            self._left -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append(turn)
        await turn

    def _turn(self) -> None:
        was_used = self._left < self._per_turn
        self._left = self._per_turn
        while self._lines and self._left:
            owner, line = next(iter(self._lines.items()))
            turn = line.popleft()
            del self._lines[owner]
            if line:
                self._lines[owner] = line  # behind the others
            if not turn.done():  # whoever waited may have left
                turn.set_result(None)
                self._left -= 1
        self._is_turning = was_used or self._left < self._per_turn
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._turn)
