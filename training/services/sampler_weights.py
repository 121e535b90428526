"""What samplers read: directories of adapters, who uses them, and when they go.

A sampling session uses its directory until its session ends, a request while it runs, a save until
it is stored. When the last user ends, the engines forget the directory, and its files are deleted
unless a checkpoint names them. Counts in memory; the database tells the next process the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog

from training.core import ids
from training.core.errors import StorageError
from training.core.records import SamplerKind, SamplingSession
from training.core.threads import in_thread
from training.services.hosts import Hosts
from training.services.quotas import Quotas
from training.storage.database import Database
from training.storage.files import CheckpointFiles
from training.storage.repositories import checkpoints, sampling_sessions

log = structlog.get_logger(__name__)


class _Weights(NamedTuple):
    directory: str
    saved_seq: int


class _Share(NamedTuple):
    owner: str
    size_bytes: int


_NOBODYS = _Share("", 0)


@dataclass(eq=False)
class _Samplers:
    """Those of one session."""

    owner: str
    num: int = 0
    weights: dict[str, _Weights] = field(default_factory=dict)
    """By sampling session; the inflight ones of a model, which share theirs, by model."""


class SamplerWeights:
    def __init__(
        self, database: Database, files: CheckpointFiles, hosts: Hosts, quotas: Quotas
    ) -> None:
        self._database = database
        self._files = files
        self._hosts = hosts
        self._quotas = quotas
        self._num_users: Counter[str] = Counter()
        """By directory."""
        self._unnamed: dict[str, _Share] = {}
        """Directories of no checkpoint: never of one, or of one that was deleted or replaced and is
        nobody's share any longer."""
        self._num_bytes: Counter[str] = Counter()
        """Of these, by owner."""
        self._samplers: dict[str, _Samplers] = {}
        """By session, while it is active."""
        self._num_samplers: Counter[str] = Counter()
        """By owner."""
        self._checks: dict[str, asyncio.Future[Path]] = {}

    async def start(self) -> None:
        """Learns what is in use, and removes directories that nothing refers to any longer."""
        named = await self._database.read(checkpoints.directories)
        for session in await self._database.read(sampling_sessions.live):
            self._add(session)
            if session.snapshot_id is not None and session.snapshot_id not in named:
                self._own(session.snapshot_id, _Share(session.owner, session.size_bytes))
        unused = await in_thread(self._files.names) - named - set(self._num_users)
        for directory in filter(ids.is_directory, unused):
            log.info("checkpoint.orphan_removed", directory=directory)
            await self._delete(directory)

    # ----------------------------------------------------------------- users

    def hold(self, directory: str) -> None:
        self._num_users[directory] += 1

    async def let_go(self, directory: str) -> None:
        """Ends one ``hold``."""
        self._num_users[directory] -= 1
        if self._num_users[directory] == 0:
            del self._num_users[directory]
            await self._unused(directory)

    @asynccontextmanager
    async def using(self, directory: str | None) -> AsyncIterator[None]:
        """None, the base model's own weights, needs nothing."""
        if directory is None:
            yield
            return
        self.hold(directory)
        try:
            yield
        finally:
            await self.let_go(directory)

    def hold_unnamed(self, directory: str, owner: str, size_bytes: int) -> None:
        """As ``hold``, for one that no checkpoint will name."""
        self._own(directory, _Share(owner, size_bytes))
        self.hold(directory)

    def _own(self, directory: str, share: _Share) -> None:
        """As often as one likes."""
        if directory not in self._unnamed:
            self._unnamed[directory] = share
            self._num_bytes[share.owner] += share.size_bytes

    async def discard(self, directory: str) -> None:
        """No checkpoint names it any longer: its files go now, or with the last that uses them."""
        self._own(directory, _NOBODYS)
        if directory not in self._num_users:
            await self._unused(directory)

    async def check(self, directory: str) -> None:
        """Compares the files of a directory that the caller holds with their checksums, once while
        anybody does: they never change. Raises ``NotFound`` or ``DamagedFile``."""
        check = self._checks.get(directory)
        if check is None:
            check = asyncio.ensure_future(in_thread(self._files.verify, directory))
            self._checks[directory] = check
        try:
            await asyncio.shield(check)
        except Exception:
            if self._checks.get(directory) is check:
                del self._checks[directory]
            raise

    # ----------------------------------------------------------------- sampling sessions

    def num_samplers(self, owner: str) -> int:
        return self._num_samplers[owner]

    def unnamed_bytes(self, owner: str) -> int:
        return self._num_bytes[owner]

    @contextmanager
    def opening(self, owner: str) -> Iterator[None]:
        """One more that is being made counts as if it were there. Raises ``OverQuota``."""
        self._quotas.check_samplers(self._num_samplers[owner])
        self._num_samplers[owner] += 1
        try:
            yield
        finally:
            self._num_samplers[owner] -= 1

    async def opened(self, session: SamplingSession) -> None:
        """It is stored. An inflight one takes its model's others along to its weights."""
        if (before := self._add(session)) is not None:
            await self.let_go(before)

    def _add(self, session: SamplingSession) -> str | None:
        """Returns the directory that is to be let go of."""
        samplers = self._samplers.setdefault(session.session_id, _Samplers(session.owner))
        samplers.num += 1
        self._num_samplers[session.owner] += 1
        if session.snapshot_id is None:
            return None
        key = session.sampling_session_id
        if session.kind is SamplerKind.INFLIGHT:
            assert session.model_id is not None
            key = session.model_id
        before = samplers.weights.get(key)
        if before is not None and before.saved_seq > session.saved_seq:
            return None
        self.hold(session.snapshot_id)
        samplers.weights[key] = _Weights(session.snapshot_id, session.saved_seq)
        return None if before is None else before.directory

    async def session_ended(self, session_id: str) -> None:
        samplers = self._samplers.pop(session_id, None)
        if samplers is None:
            return
        self._num_samplers[samplers.owner] -= samplers.num
        for weights in samplers.weights.values():
            await self.let_go(weights.directory)

    # ----------------------------------------------------------------- the end

    async def _unused(self, directory: str) -> None:
        self._checks.pop(directory, None)
        for host in self._hosts.all():
            await host.snapshots.retire(directory)
        if directory in self._unnamed and directory not in self._num_users:
            share = self._unnamed.pop(directory)
            self._num_bytes[share.owner] -= share.size_bytes
            await self._delete(directory)

    async def _delete(self, directory: str) -> None:
        """What cannot be deleted now is removed when the server starts again."""
        try:
            await in_thread(self._files.delete, directory)
        except StorageError as error:
            log.warning("checkpoint.not_deleted", directory=directory, error=str(error))

    def check_integrity(self) -> None:
        held = Counter(
            weights.directory
            for samplers in self._samplers.values()
            for weights in samplers.weights.values()
        )
        if not held <= self._num_users or min(self._num_users.values(), default=1) < 1:
            raise AssertionError(f"samplers use {dict(held)}, counted: {dict(self._num_users)}")
        shares: Counter[str] = Counter()
        for share in self._unnamed.values():
            shares[share.owner] += share.size_bytes
        if +shares != +self._num_bytes:
            raise AssertionError(f"{dict(self._num_bytes)} bytes counted, there are {dict(shares)}")
