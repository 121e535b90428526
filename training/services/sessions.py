"""Sessions: opened, kept alive by heartbeats, ended by the client or by silence."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import NamedTuple

import structlog

from training.config import SessionConfig
from training.core import ids
from training.core.errors import Gone, NotFound, StorageError
from training.core.records import Session, SessionStatus, utcnow
from training.services.quotas import Quotas
from training.storage.database import Database
from training.storage.repositories import sessions
from training.wire.requests import CreateSessionRequest

log = structlog.get_logger(__name__)

_FLUSH_S = 30.0
"""After a restart all sessions start afresh, so what is written serves only to find silent ones."""
_BEATS_AT_ONCE = 500
_CLOCK_SLACK_S = 1.0


class ActiveSession(NamedTuple):
    """What is kept of each in memory: the rest, which may be 128 KiB, is in the database."""

    session_id: str
    owner: str


class SessionService:
    """``on_end`` frees what the session held, and may be repeated: where it raises, it is."""

    def __init__(
        self,
        database: Database,
        config: SessionConfig,
        quotas: Quotas,
        on_end: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._database = database
        self._config = config
        self._quotas = quotas
        self._num_active: Counter[str] = Counter()
        """By owner."""
        self._on_end = on_end
        self._beats: dict[str, datetime] = {}
        self._active: dict[str, ActiveSession] = {}
        self._num_ended = 0
        self._unfinished: dict[str, str] = {}
        """Ended sessions that still hold something, and why they ended."""
        self._reaper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Clients could not beat while the server was down, so active sessions start afresh."""
        active = await self._start_afresh()
        self._num_active = Counter(session.owner for session in active)
        self._reaper = asyncio.create_task(self._reap(), name="session-reaper")

    async def close(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        try:
            await self._flush()
        except StorageError as error:
            # Nothing is lost: sessions start afresh with the next process.
            log.warning("session.beats_not_stored", error=str(error))

    async def create(self, owner: str, request: CreateSessionRequest) -> Session:
        """Raises ``OverQuota``."""
        self._quotas.check_sessions(self._num_active[owner])
        self._num_active[owner] += 1
        try:
            return await self._create(owner, request)
        except BaseException:
            self._num_active[owner] -= 1
            raise

    async def _create(self, owner: str, request: CreateSessionRequest) -> Session:
        now = utcnow()
        session = Session(
            session_id=ids.new_session_id(),
            owner=owner,
            status=SessionStatus.ACTIVE,
            created_at=now,
            last_heartbeat_at=now,
            tags=tuple(sorted(request.tags)),
            user_metadata=request.user_metadata or {},
            sdk_version=request.sdk_version,
            project_id=request.project_id,
            display_name=request.display_name,
        )
        await self._database.write(sessions.insert, session)
        self._active[session.session_id] = ActiveSession(session.session_id, owner)
        log.info("session.created", session_id=session.session_id, sdk=request.sdk_version)
        return session

    async def get(self, owner: str, session_id: str) -> Session:
        """Raises ``NotFound`` for other people's sessions too."""
        session = await self._database.read(sessions.get, session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"no such session: {session_id}")
        return session

    async def get_active(self, owner: str, session_id: str) -> ActiveSession:
        """Raises ``NotFound``, or ``Gone`` for a session that has ended."""
        if self.beat(owner, session_id):
            return self._active[session_id]
        num_ended = self._num_ended
        session = await self.get(owner, session_id)
        if session.status is not SessionStatus.ACTIVE:
            raise Gone(f"session {session_id} has ended ({session.finish_reason})")
        active = ActiveSession(session_id, owner)
        if num_ended == self._num_ended:  # else it may have ended while it was read
            self._active[session_id] = active
            self._beats[session_id] = utcnow()
        return active

    def beat(self, owner: str, session_id: str) -> bool:
        """Notes the heartbeat of a session that this process knows; False where it has to look."""
        session = self._active.get(session_id)
        if session is None or session.owner != owner:
            return False
        self._beats[session_id] = utcnow()
        return True

    async def heartbeat(self, owner: str, session_id: str) -> None:
        """Raises ``NotFound`` or ``Gone``."""
        await self.get_active(owner, session_id)

    async def finish(self, owner: str, session_id: str, reason: str, detail: str | None) -> None:
        """The first reason wins; finishing twice changes nothing."""
        active = self._active.get(session_id)
        if active is None or active.owner != owner:
            session = await self.get(owner, session_id)
            if session.status is not SessionStatus.ACTIVE:
                return
            active = ActiveSession(session_id, owner)
        await self._end(active, SessionStatus.FINISHED, reason, detail)

    async def _end(
        self, session: ActiveSession, status: SessionStatus, reason: str, detail: str | None
    ) -> None:
        session_id = session.session_id
        ended = await self._database.write(
            sessions.end, session_id, status, utcnow(), reason, detail
        )
        self._num_ended += 1
        self._active.pop(session_id, None)
        self._beats.pop(session_id, None)
        if ended:
            self._num_active[session.owner] -= 1
            log.info("session.ended", session_id=session_id, reason=reason)
            await self._free(session_id, reason)

    async def _free(self, session_id: str, reason: str) -> None:
        """It has ended for its client, whatever goes wrong here."""
        try:
            await self._on_end(session_id, reason)
        except BaseException as error:
            self._unfinished[session_id] = reason
            if not isinstance(error, Exception):
                raise
            log.exception("session.end_unfinished", session_id=session_id)
        else:
            self._unfinished.pop(session_id, None)

    async def _reap(self) -> None:
        pause_s = min(_FLUSH_S, self._config.expiry_s / 4)
        before = utcnow()
        is_clock_off = False
        while True:
            await asyncio.sleep(pause_s)
            now = utcnow()
            # The machine slept, whether or not other clocks went on meanwhile, or its clock was
            # set: what clients did in the time that seems to have passed, nobody knows.
            off_s = abs((now - before).total_seconds() - pause_s)
            is_clock_off |= off_s > max(self._config.expiry_s / 4, _CLOCK_SLACK_S)
            before = now
            try:
                if is_clock_off:
                    log.warning("session.clock_jumped", seconds=round(off_s))
                    await self._start_afresh()
                    is_clock_off = False
                await self._flush()
                await self._expire(now)
                for session_id, reason in tuple(self._unfinished.items()):
                    await self._free(session_id, reason)
            except Exception:
                # The border of the job: a full disk now must not stop expiry for good.
                log.exception("session.reaper_failed")

    async def _expire(self, now: datetime) -> None:
        limit = now - timedelta(seconds=self._config.expiry_s)
        detail = f"no heartbeat for {self._config.expiry_s:g} s"
        for session in await self._database.read(sessions.stale, limit):
            silent = ActiveSession(session.session_id, session.owner)
            await self._end(silent, SessionStatus.EXPIRED, "expired", detail)

    async def _start_afresh(self) -> list[Session]:
        """Active sessions, which count as if they had just beaten."""
        active = await self._database.read(sessions.active)
        self._beats |= {session.session_id: utcnow() for session in active}
        await self._flush()
        return active

    async def _flush(self) -> None:
        """A piece at a time, so that requests do not wait for all of them."""
        beats, self._beats = list(self._beats.items()), {}
        for start in range(0, len(beats), _BEATS_AT_ONCE):
            piece = dict(beats[start : start + _BEATS_AT_ONCE])
            await self._database.write(sessions.touch, piece)
