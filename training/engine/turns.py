"""Turns between members of anything: who has fewest running is next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Member(Protocol):
    num_running: int


MemberT = TypeVar("MemberT", bound=Member)


class Turns(Generic[MemberT]):
    """Members that have something to run, in the order of their last turns."""

    def __init__(self) -> None:
        self._idle: OrderedDict[MemberT, None] = OrderedDict()  # nothing running: a plain queue
        self._busy: OrderedDict[MemberT, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._idle or self._busy)

    def next(self) -> MemberT:
        """Of those with nothing running the one that waits longest; else the one with fewest
        running. There must be one."""
        if self._idle:
            return next(iter(self._idle))
        return min(self._busy, key=lambda each: each.num_running)

    def place(self, member: MemberT, waits: bool, first: bool = False) -> None:
        """To be called when ``waits`` or the member's ``num_running`` has changed. ``first``: to
        the head of its queue."""
        mine, other = self._idle, self._busy
        if member.num_running:
            mine, other = other, mine
        other.pop(member, None)
        if not waits:
            mine.pop(member, None)
            return
        mine.setdefault(member)
        if first:
            mine.move_to_end(member, last=False)

    def had_turn(self, member: MemberT) -> None:
        for queue in (self._idle, self._busy):
            if member in queue:
                queue.move_to_end(member)
