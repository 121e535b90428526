"""How much each owner may hold at once, so that none takes the room of all. Counts in memory.

What ends by itself (operations and samples that wait, and their bytes) is answered with ``Busy``:
come again. What only its owner can end (sessions, models, checkpoints) is ``OverQuota``.

Where several keys share a server, an owner may hold at most as much as it leaves free: one alone
half of the server's room, two a third each. So whoever comes last still finds some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from training.config import QuotaConfig, SchedulerConfig
from training.core.errors import Busy, OverQuota
from training.core.records import FutureKind

RETRY_S = 1.0
"""The SDK waits as long before it sends the same operation again."""
CREATION_RETRY_S = 6.0
"""It sends a creation ten times more and then gives up, so these ten should take a while."""
ARRIVAL_FREE_BYTES = 4096
"""Polls, heartbeats and the like. They are bounded by the number of connections."""
_CREATIONS = frozenset({FutureKind.CREATE_MODEL, FutureKind.LOAD_WEIGHTS})


class Room:
    """Of one kind of thing: ``each`` is an owner's limit, ``all_`` the server's."""

    def __init__(self, what: str, each: int | None, all_: int, is_shared: bool) -> None:
        self._what = what
        self._each = each
        self._all = all_
        self._is_shared = is_shared
        self._held: Counter[str] = Counter()
        self._total = 0

    def why_not(self, owner: str, amount: int) -> str | None:
        """Why ``amount`` more do not fit; None where they do. An owner that holds nothing may hold
        more than its part at once, for instance in the bytes of one large request."""
        held, free = self._held[owner], self._all - self._total
        if amount > free:
            return f"{self._total} {self._what} are waiting, all that this server takes"
        if held == 0:
            return None
        if self._each is not None and held + amount > self._each:
            return f"{held} {self._what} of this key are waiting, and {self._each} may"
        if self._is_shared and held + amount > free:
            return f"{held} {self._what} of this key are waiting; the rest is kept for other keys"
        return None

    def why_not_awaited(self, amount: int) -> str | None:
        """Of what makes others end: as much again as there is, so that what was let in before must
        end first."""
        if self._total > 0 and self._total + amount > 2 * self._all:
            return f"{self._total} {self._what} are waiting, twice what this server takes"
        return None

    def take(self, owner: str, amount: int) -> None:
        self._held[owner] += amount
        self._total += amount

    def give_back(self, owner: str, amount: int) -> None:
        self._held[owner] -= amount
        self._total -= amount
        if self._held[owner] == 0:
            del self._held[owner]

    def check_integrity(self) -> None:
        if self._total != sum(self._held.values()) or min(self._held.values(), default=0) < 0:
            raise AssertionError(f"{self._what}: {self._total} held, by owner {dict(self._held)}")


class Arrival:
    """The room that the body of one request takes, from its announcement to its answer."""

    def __init__(self, room: Room, owner: str) -> None:
        self._room = room
        self._owner = owner
        self._held = 0

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.give_back(self._owner, self._held)

    def hold(self, num_bytes: int) -> None:
        """Holds as many from here on. Raises ``Busy`` where they do not fit: not for a few, so that
        who uploads too much still learns of its results."""
        self._room.give_back(self._owner, self._held)
        self._held = 0
        if num_bytes <= ARRIVAL_FREE_BYTES:
            return
        if (reason := self._room.why_not(self._owner, num_bytes)) is not None:
            raise Busy(reason, RETRY_S)
        self._room.take(self._owner, num_bytes)
        self._held = num_bytes


class Quotas:
    """``is_shared``: several owners use the server."""

    def __init__(self, quota: QuotaConfig, scheduler: SchedulerConfig, is_shared: bool) -> None:
        self._quota = quota
        self._is_shared = is_shared
        self._operations = Room(
            "operations",
            quota.max_pending_operations,
            scheduler.max_pending_operations,
            is_shared,
        )
        self._samples = Room(
            "sampling requests",
            quota.max_pending_samples,
            scheduler.max_pending_samples,
            is_shared,
        )
        self._bytes = Room(
            "bytes of requests", quota.max_pending_bytes, scheduler.max_pending_bytes, is_shared
        )

    # ----------------------------------------------------------------- promises

    def check(self, owner: str, kind: FutureKind, num_bytes: int) -> None:
        """Raises ``Busy`` where one more promise has no room."""
        reason = self._room(kind).why_not(owner, 1) or self._bytes.why_not(owner, num_bytes)
        if reason is not None:
            raise Busy(reason, CREATION_RETRY_S if kind in _CREATIONS else RETRY_S)

    def check_awaited(self, num_bytes: int) -> None:
        """The same for an operation that others wait for. Of these there is one for each model that
        has others, and as they run at once they may take as much again as the server has."""
        if (reason := self._bytes.why_not_awaited(num_bytes)) is not None:
            raise Busy(reason, RETRY_S)

    def take(self, owner: str, kind: FutureKind, num_bytes: int) -> None:
        """A promise is accepted, whether or not there is room."""
        self._room(kind).take(owner, 1)
        self._bytes.take(owner, num_bytes)

    def give_back(self, owner: str, kind: FutureKind, num_bytes: int) -> None:
        """It has settled."""
        self._room(kind).give_back(owner, 1)
        self._bytes.give_back(owner, num_bytes)

    def _room(self, kind: FutureKind) -> Room:
        return self._samples if kind is FutureKind.SAMPLE else self._operations

    def check_integrity(self) -> None:
        for room in (self._operations, self._samples, self._bytes):
            room.check_integrity()

    # ----------------------------------------------------------------- what lasts

    def check_sessions(self, num_active: int) -> None:
        """Raises ``OverQuota`` for one session more."""
        _check("sessions", num_active, self._quota.max_sessions, "finish one")

    def check_samplers(self, num_held: int) -> None:
        """Raises ``OverQuota`` for one sampling session more."""
        _check("samplers", num_held, self._quota.max_samplers, "finish a session")

    def check_models(self, owner: str, held: Mapping[str, int], num_slots: int) -> None:
        """Raises ``OverQuota`` for one model more; ``held``: loaded models by owner."""
        _check("models", held.get(owner, 0), self._quota.max_models, "finish a session")
        free = num_slots - sum(held.values())
        if self._is_shared and 0 < held.get(owner, 0) >= free > 0:
            raise OverQuota(
                f"{held[owner]} models of this key are loaded, and the {free} places left are kept "
                "for other keys: finish a session first"
            )

    def check_checkpoint_bytes(self, num_bytes: int) -> None:
        """Raises ``OverQuota`` where an owner's checkpoints take all that they may, those without
        a name included."""
        limit = self._quota.max_checkpoint_bytes
        _check("bytes of checkpoints", num_bytes, limit, "delete some or finish a session")


def _check(what: str, num: int, limit: int | None, advice: str) -> None:
    if limit is not None and num >= limit:
        raise OverQuota(f"this key has {num} {what}, its limit is {limit}: {advice} first")
