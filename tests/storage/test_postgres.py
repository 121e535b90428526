"""PostgreSQL that goes away: between statements, in the middle of a COMMIT, for good."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import sqlalchemy as sa

from tests.postgres import PostgresServer, execute, fresh_database, running_postgres
from tests.storage.proxy import Cut, Proxy, running_proxy
from training.core.errors import ConfigError, InvalidRequest, StorageError
from training.storage import lock, postgres
from training.storage.database import Database
from training.storage.postgres import Postgres

TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One that may be stopped."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    with fresh_database(server.url("postgres")) as url:
        execute(url, "CREATE TABLE log (number integer NOT NULL)")
        yield url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.start()
    yield database
    await database.close()


@pytest.fixture
async def proxy(server: PostgresServer) -> AsyncIterator[Proxy]:
    async with running_proxy(server.directory / ".s.PGSQL.5432") as proxy:
        yield proxy


@pytest.fixture
async def far_database(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Database]:
    """On the other side of ``proxy``; who gets no answer there is impatient."""
    monkeypatch.setattr(postgres, "_COMMAND_TIMEOUT_S", 5.0)
    monkeypatch.setattr(postgres, "_CONNECT_TIMEOUT_S", 5.0)
    name = sa.make_url(url).database
    database = Database(f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}?sslmode=disable")
    await database.start()
    yield database
    await database.close()


def add(connection: sa.Connection, number: int) -> int:
    """Not idempotent on purpose: a second run would be seen."""
    connection.execute(sa.text("INSERT INTO log VALUES (:number)"), {"number": number})
    return number


def logged(connection: sa.Connection) -> list[int]:
    return list(connection.execute(sa.text("SELECT number FROM log ORDER BY number")).scalars())


def lock_holders(connection: sa.Connection) -> int:
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    return int(connection.execute(sa.text(query)).scalar_one())


@pytest.mark.parametrize("cut", Cut)
async def test_a_commit_whose_answer_is_lost_happens_once(
    far_database: Database, proxy: Proxy, cut: Cut
) -> None:
    assert await far_database.write(add, 1) == 1
    proxy.next_commit = cut
    writes = [far_database.write(add, number) for number in (2, 3, 4)]
    assert await asyncio.gather(*writes) == [2, 3, 4]
    assert proxy.was_cut.is_set()
    assert await far_database.write(add, 5) == 5
    assert await far_database.read(logged) == [1, 2, 3, 4, 5]
    assert await far_database.read(lock_holders) == 1


async def test_lost_connections_are_replaced_without_an_error(database: Database, url: str) -> None:
    for number in range(5):
        execute(url, TERMINATE)
        assert await database.write(add, number) == number
        execute(url, TERMINATE)
        assert len(await database.read(logged)) == number + 1


async def test_what_failed_is_not_there_and_what_succeeded_is_there_once(
    database: Database, url: str
) -> None:
    """Connections are cut at random while every other burst is written."""
    draw = random.Random(4)
    done: set[int] = set()

    async def burst(numbers: range) -> None:
        async def write(number: int) -> None:
            await asyncio.sleep(0.1 * draw.random())
            done.add(await database.write(add, number))

        written = await asyncio.gather(*map(write, numbers), return_exceptions=True)
        assert {type(error) for error in written if error is not None} <= {StorageError}

    async def cut(enough: asyncio.Event) -> None:
        while not enough.is_set():
            await asyncio.sleep(0.03 * draw.random())
            await asyncio.to_thread(execute, url, TERMINATE)

    for first in range(0, 1000, 100):
        enough = asyncio.Event()
        cutting = asyncio.create_task(cut(enough))
        await burst(range(first, first + 50))
        enough.set()
        await cutting  # not cancelled: its thread would cut the next burst too
        undisturbed = range(first + 50, first + 100)
        await burst(undisturbed)
        assert done.issuperset(undisturbed)
    assert await database.read(logged) == sorted(done)


async def test_a_server_that_restarts_is_found_again(
    server: PostgresServer, database: Database
) -> None:
    assert await database.write(add, 1) == 1
    server.stop(signal.SIGQUIT)
    try:
        outcomes = await asyncio.gather(
            *(database.write(add, number) for number in range(2, 9)),
            database.read(logged),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} == {StorageError}
    finally:
        server.start()
    assert await database.write(add, 9) == 9
    assert await database.read(logged) == [1, 9]
    assert await database.read(lock_holders) == 1


async def test_a_commit_that_was_sent_to_a_dying_server_is_settled_by_the_next(
    server: PostgresServer, far_database: Database, proxy: Proxy
) -> None:
    assert await far_database.write(add, 1) == 1
    proxy.next_commit = Cut.BEFORE
    writing = asyncio.create_task(far_database.write(add, 2))
    await proxy.was_cut.wait()
    server.stop(signal.SIGQUIT)
    try:
        await asyncio.sleep(0.3)
        assert not writing.done()
        with pytest.raises(StorageError, match="did not answer a commit"):
            await far_database.write(add, 3)
    finally:
        server.start()
    assert await writing == 2
    assert await far_database.read(logged) == [1, 2]


async def test_a_server_that_is_silent_is_left_and_found_again(
    far_database: Database, proxy: Proxy
) -> None:
    """Its connections stay open and answer nothing; new ones work, as after a failover."""
    assert await far_database.write(add, 1) == 1
    assert await asyncio.gather(*(far_database.read(logged) for _ in range(6))) == 6 * [[1]]
    proxy.go_dark()
    outcomes = await asyncio.gather(
        *(far_database.write(add, number) for number in range(2, 9)),
        *(far_database.read(lock_holders) for _ in range(6)),
    )
    assert outcomes[:7] == list(range(2, 9))
    assert await far_database.read(logged) == list(range(1, 9)), "each of them once"


async def test_a_server_that_stays_silent_is_told_in_words(
    far_database: Database, proxy: Proxy
) -> None:
    assert await far_database.write(add, 1) == 1
    proxy.is_dark = True
    proxy.go_dark()
    for call in (far_database.write(add, 2), far_database.read(logged)):
        with pytest.raises(StorageError, match=r"failed: \S"):
            await call
    proxy.is_dark = False
    assert await far_database.write(add, 3) == 3
    assert await far_database.read(logged) == [1, 3]


async def test_an_end_does_not_wait_for_a_database_that_is_away(
    server: PostgresServer, far_database: Database, proxy: Proxy
) -> None:
    assert await far_database.write(add, 1) == 1
    proxy.next_commit = Cut.BEFORE
    writing = asyncio.create_task(far_database.write(add, 2))
    await proxy.was_cut.wait()
    server.stop(signal.SIGQUIT)
    try:
        await asyncio.wait_for(far_database.close(), 60.0)  # only bounds a failure
        with pytest.raises(StorageError, match="write failed"):
            await writing
    finally:
        server.start()


async def test_sockets_notice_that_the_other_machine_is_gone(far_database: Database) -> None:
    connections = far_database._connections
    assert isinstance(connections, Postgres)
    for engine in (connections._writer, connections._reader):
        async with engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            found = raw._transport.get_extra_info("socket")  # type: ignore[union-attr]
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for name, value in postgres._WATCH.items():
                if hasattr(socket, name):
                    assert found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


async def test_who_lost_the_lock_writes_no_more(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was cut off, and replaced, must not come back beside its successor."""
    monkeypatch.setattr(lock, "WAIT_S", 0.3)
    assert await database.write(add, 1) == 1
    successor = Database(url)
    starting = asyncio.create_task(successor.start())
    await asyncio.sleep(0.1)
    await asyncio.to_thread(execute, url, f"{TERMINATE} AND application_name LIKE '%pid%'")
    # Both want it now; whoever of the two was cut off, only one may go on.
    outcomes: list[object] = []
    for _ in range(3):
        outcomes += await asyncio.gather(database.write(add, 2), return_exceptions=True)
    started = (await asyncio.gather(starting, return_exceptions=True))[0] is None
    won = [outcome for outcome in outcomes if outcome == 2]
    if started:
        assert not won
        assert all("another tinkercloud server" in str(outcome) for outcome in outcomes)
        assert await successor.write(add, 3) == 3
        await successor.close()
        assert await database.write(add, 4) == 4, "it is free again"
    else:
        assert len(won) == 3


async def test_a_database_that_is_not_there_is_named_without_its_password(
    server: PostgresServer,
) -> None:
    where = f"?host={server.directory}&passfile=s3cret"
    database = Database(f"postgresql://postgres:s3cret@/nothing{where}")
    with pytest.raises(StorageError, match="nothing") as raised:
        await database.start()
    assert "3cret" not in str(raised.value)


async def test_a_parameter_that_asyncpg_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="channel_binding"):
        await Database("postgresql://u@h/db?channel_binding=require").start()


@pytest.mark.parametrize("url", ["mysql://u@h/db", "nonsense", "postgresql://h:port/db"])
def test_a_url_that_nothing_can_open_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Database(url)


async def test_commits_are_durable_even_where_the_default_says_otherwise(url: str) -> None:
    name = sa.make_url(url).database
    execute(url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    database = Database(url)
    await database.start()

    def setting(connection: sa.Connection) -> object:
        return connection.execute(sa.text("SHOW synchronous_commit")).scalar_one()

    assert await database.write(setting) == "on"
    await database.close()


async def test_values_that_no_column_holds_are_the_requests_fault(database: Database) -> None:
    with pytest.raises(InvalidRequest, match="cannot be stored"):
        await database.write(add, 2**70)

    def find(connection: sa.Connection, number: int) -> object:
        query = sa.text("SELECT number FROM log WHERE number = :number")
        return connection.execute(query, {"number": number}).first()

    with pytest.raises(InvalidRequest, match="cannot be stored"):
        await database.read(find, 2**70)
