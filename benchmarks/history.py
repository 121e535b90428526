"""What a long history costs: promises accepted, settled, fetched, listed and dropped against the
number of promises that the database remembers, and the start of a server on it.

    python -m benchmarks.history [--sizes 0 1000 10000 50000 200000] [--plans]

Half of the history belongs to the same model and session as the new promises, the other half to
others. All databases are open at once and take turns; medians are told. ``--plans`` shows instead
how SQLite finds its rows for each statement.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from training.config import (
    ModelConfig,
    QuotaConfig,
    SchedulerConfig,
    StorageConfig,
    TrainingConfig,
)
from training.core.records import FutureKind, FutureResult, FutureStatus, NewFuture, utcnow
from training.services.promises import Promises
from training.services.quotas import Quotas
from training.services.server import Server
from training.storage.database import Database
from training.storage.repositories import futures

BODY_BYTES = 1000
"""Of each request and each result: a small pass, or a sample."""
PER_OTHER_SESSION = 100
SCOPE, SESSION = "model:busy:train:0", "busy"
DONE = FutureResult(FutureStatus.DONE, b"r" * BODY_BYTES, "application/x-protobuf")
AT_ONCE = 16


def fill(path: Path, num: int) -> None:
    """``num`` settled promises with their bytes."""
    rows, now = [], utcnow().replace(tzinfo=None).isoformat(" ")
    for number in range(num):
        other = f"other{number // PER_OTHER_SESSION}"
        session, scope = (SESSION, SCOPE) if number % 2 else (other, f"model:{other}:train:0")
        rows.append((f"old-{number}", scope, number, session, number, now, now))
    with sqlite3.connect(path) as connection:
        connection.executemany(
            "INSERT INTO futures (request_id, kind, scope, seq, owner, session_id, status,"
            " completion, created_at, finished_at)"
            " VALUES (?, 'ForwardBackward', ?, ?, 'me', ?, 'done', ?, ?, ?)",
            rows,
        )
        for table in ("payloads", "results"):
            connection.executemany(
                f"INSERT INTO {table} (request_id, content_type, body) VALUES (?, 'x', ?)",
                ((row[0], b"b" * BODY_BYTES) for row in rows),
            )
    connection.close()


class History:
    """A server's database with ``num`` promises in it."""

    def __init__(self, directory: Path, num: int) -> None:
        self.directory = directory
        self.num = num
        self._next = num
        self._cursor = num

    @property
    def config(self) -> TrainingConfig:
        return TrainingConfig(
            storage=StorageConfig(
                metadata_dir=self.directory / "m", checkpoint_dir=self.directory / "c"
            ),
            supported_models=(ModelConfig(name="benchmark/fake", backend="fake"),),
            log_format="json",
        )

    async def open(self) -> None:
        url = self.config.storage.resolved_database_url()
        database = Database(url)
        await database.start()
        await database.close()
        await asyncio.to_thread(fill, self.directory / "m" / "futures.db", self.num)
        self.database = Database(url)
        await self.database.start()

    def promises(self) -> Promises:
        """One that remembers nothing: what it is asked for it reads."""
        return Promises(self.database, Quotas(QuotaConfig(), SchedulerConfig(), is_shared=False))

    def new(self) -> NewFuture:
        self._next += 1
        return NewFuture(
            f"new-{self._next}",
            FutureKind.FORWARD_BACKWARD,
            SCOPE,
            self._next,
            "me",
            SESSION,
            None,
            b"p" * BODY_BYTES,
            "application/x-protobuf",
        )

    async def accept_and_settle(self) -> None:
        promises = self.promises()
        stored = await promises.accept(self.new())
        await promises.settle(stored.request_id, DONE)

    async def retrieve(self) -> None:
        assert await self.promises().wait(f"new-{self._next}", "me", 0) == DONE

    async def list_new(self) -> None:
        """What has settled since the last time."""
        found = await self.database.read(futures.completions, SCOPE, self._cursor, 0, 10**9, 1000)
        self._cursor = max([self._cursor, *(each.completion or 0 for each in found)])

    async def end_session(self) -> None:
        """Of ten promises."""
        session = f"short-{self._next}"
        for number in range(10):
            row = self.new()
            new = NewFuture(
                f"{session}-{number}", row.kind, session, number, "me", session, None, b"p", "x"
            )
            await self.database.write(futures.insert, new, utcnow())
            await self.database.write(futures.finish, new.request_id, DONE, utcnow())
        await self.database.write(futures.drop_bytes_of_session, session, "", 200)

    async def pending(self) -> None:
        assert await self.database.read(futures.pending, FutureKind.SAMPLE) == []


WORK: dict[str, tuple[Callable[[History], Awaitable[None]], int]] = {
    "accept + settle": (History.accept_and_settle, AT_ONCE),
    "retrieve from disk": (History.retrieve, AT_ONCE),
    "list new": (History.list_new, 1),
    "find pending": (History.pending, 1),
    "a session of ten": (History.end_session, 1),
}
"""What is measured, and how many at the same moment."""


async def measure(histories: list[History], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of each, by history."""
    taken: dict[str, list[list[float]]] = {what: [[] for _ in histories] for what in WORK}
    for number in range(rounds + 1):
        order = list(enumerate(histories))[:: 1 if number % 2 else -1]
        for what, (work, at_once) in WORK.items():
            for place, history in order:
                start = time.perf_counter()
                await asyncio.gather(*(work(history) for _ in range(at_once)))
                taken[what][place].append((time.perf_counter() - start) / at_once)
    return {
        what: [1000 * statistics.median(each[1:]) for each in by_history]
        for what, by_history in taken.items()
    }


async def start_s(history: History) -> float:
    """Of a whole server on it."""
    server = Server(history.config)
    start = time.perf_counter()
    await server.start()
    taken_s = time.perf_counter() - start
    await server.close()
    return taken_s


async def plans(history: History) -> None:
    """How SQLite finds the rows of every statement that the work above sends."""
    seen: dict[str, list[Any]] = {}

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            seen.setdefault(statement, parameters)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    for work, _ in WORK.values():
        await work(history)
    sa.event.remove(sa.Engine, "before_cursor_execute", note)
    with sqlite3.connect(history.directory / "m" / "futures.db") as connection:
        for statement, parameters in seen.items():
            print("\n" + " ".join(statement.split()))
            for row in connection.execute("EXPLAIN QUERY PLAN " + statement, parameters):
                print("   ", row[3])


async def run(directory: Path, options: argparse.Namespace) -> None:
    histories = [History(directory / str(num), num) for num in options.sizes]
    for history in histories:
        await history.open()
    if options.plans:
        await plans(histories[-1])
        return
    found = await measure(histories, options.rounds)
    print(f"| promises before | {' | '.join(f'{each.num:,}' for each in histories)} |")
    print("|---|" + "---|" * len(histories))
    for what, medians in found.items():
        print(f"| {what}, ms | {' | '.join(f'{each:.2f}' for each in medians)} |")
    for history in histories:
        await history.database.close()
    starts = [[await start_s(each) for each in histories] for _ in range(options.starts)]
    medians = [statistics.median(each) for each in zip(*starts, strict=True)]
    print(f"| start of a server, s | {' | '.join(f'{each:.2f}' for each in medians)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 1000, 10_000, 50_000, 200_000])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--plans", action="store_true", help="show query plans, measure nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tinkercloud-history-") as directory:
        asyncio.run(run(Path(directory), options))


if __name__ == "__main__":
    main()
