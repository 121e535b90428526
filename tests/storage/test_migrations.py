"""Databases of every earlier version open, and all that was in them reads back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from training.backends.base import LoraSpec
from training.core.errors import StorageError
from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import FutureKind, FutureStatus, ModelStatus, SamplerKind, SessionStatus
from training.storage.connections import Connections
from training.storage.database import CONNECTIONS, MIGRATIONS, Database
from training.storage.repositories import (
    checkpoints,
    futures,
    models,
    sampling_sessions,
    sessions,
)


def alembic_config(connection: sa.Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


SCRIPTS = ScriptDirectory.from_config(alembic_config())
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]

THEN = datetime(2026, 1, 2, 3, 4, 5, 678901)
BODY = bytes(range(256))
LORA = {
    "rank": 8,
    "seed": 1,
    "train_attn": True,
    "train_mlp": False,
    "train_unembed": False,
}
PATH = TinkerPath("s:train:0", CheckpointKind.TRAINING, "a")

FIRST_ROWS: dict[str, list[dict[str, object]]] = {
    "sessions": [
        {
            "session_id": "s",
            "owner": "me",
            "status": "active",
            "created_at": THEN,
            "last_heartbeat_at": THEN,
            "tags": ["ä", "b"],
            "user_metadata": {"k": [1, None]},
            "sdk_version": "0.38.0",
        }
    ],
    "models": [
        {
            "model_id": "s:train:0",
            "session_id": "s",
            "model_seq_id": 0,
            "owner": "me",
            "base_model": "org/m",
            "lora": LORA,
            "optimizer": "adamw",
            "status": "ready",
            "created_at": THEN,
            "last_request_at": THEN,
            "user_metadata": {},
            "corrupted": False,
        }
    ],
    "futures": [
        {
            "request_id": f"req-{seq}",
            "kind": "ForwardBackward",
            "scope": "model:s:train:0",
            "seq": seq,
            "owner": "me",
            "session_id": "s",
            "model_id": "s:train:0",
            "status": status,
            "created_at": THEN,
            "completion": completion,
        }
        for seq, status, completion in ((1, "done", 1), (2, "pending", None))
    ],
    "payloads": [
        {"request_id": f"req-{seq}", "content_type": "application/x-protobuf", "body": BODY}
        for seq in (1, 2)
    ],
    "results": [{"request_id": "req-1", "content_type": "application/x-protobuf", "body": BODY}],
    "sampling_sessions": [
        {
            "sampling_session_id": "s:sample:0",
            "session_id": "s",
            "owner": "me",
            "base_model": "org/m",
            "kind": "snapshot",
            "created_at": THEN,
            "num_clones": 3,
        }
    ],
    "checkpoints": [
        {
            "path": str(PATH),
            "training_run_id": "s:train:0",
            "kind": "weights",
            "owner": "me",
            "base_model": "org/m",
            "lora": LORA,
            "optimizer": "adamw",
            "directory": "d" * 32,
            "size_bytes": 2**40,
            "created_at": THEN,
            "user_metadata": {"x": "y"},
            "public": True,
        }
    ],
}
"""What the first released version had stored, in its own columns."""

_TYPES: dict[type, Any] = {
    dict: sa.JSON(),
    list: sa.JSON(),
    bytes: sa.LargeBinary(),
    datetime: sa.DateTime(),
    int: sa.BigInteger(),
    bool: sa.Boolean(),
    str: sa.Text(),
}


def insert_first_rows(connection: sa.Connection) -> None:
    for name, rows in FIRST_ROWS.items():
        columns = [sa.column(key, _TYPES.get(type(value))) for key, value in rows[0].items()]
        connection.execute(sa.insert(sa.table(name, *columns)), rows)


def build(connection: sa.Connection, revision: str) -> None:
    """A database as the version of ``revision`` left it behind."""
    command.upgrade(alembic_config(connection), REVISIONS[0])
    insert_first_rows(connection)
    command.upgrade(alembic_config(connection), revision)


async def opened(url: str) -> Connections:
    parsed = sa.make_url(url)
    connections = CONNECTIONS[parsed.drivername.split("+")[0]](parsed)
    await connections.open()
    return connections


async def prepared(url: str, revision: str) -> None:
    connections = await opened(url)
    await connections.transact(lambda connection: build(connection, revision))
    await connections.close()


def table_names(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


def current(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


@pytest.mark.parametrize("revision", REVISIONS)
async def test_a_database_of_any_version_is_upgraded_with_all_its_rows(
    database_url: str, revision: str
) -> None:
    await prepared(database_url, revision)
    database = Database(database_url)
    await database.start()
    then = THEN.replace(tzinfo=UTC)
    assert await database.read(current) == SCRIPTS.get_current_head()

    session = await database.read(sessions.get, "s")
    assert session is not None
    assert (session.status, session.created_at) == (SessionStatus.ACTIVE, then)
    assert (session.tags, session.user_metadata) == (("ä", "b"), {"k": [1, None]})
    model = await database.read(models.get, "s:train:0")
    assert model is not None
    assert (model.status, model.lora) == (ModelStatus.READY, LoraSpec(**LORA))  # type: ignore[arg-type]
    result = await database.read(futures.result, "req-1")
    assert result is not None
    assert (result.status, result.body) == (FutureStatus.DONE, BODY)
    (pending,) = await database.read(futures.pending, FutureKind.FORWARD_BACKWARD)
    assert (pending.future.request_id, pending.future.seq, pending.body) == ("req-2", 2, BODY)
    sampler = await database.read(sampling_sessions.get, "s:sample:0")
    assert sampler is not None
    assert (sampler.kind, sampler.num_clones) == (SamplerKind.SNAPSHOT, 3)
    checkpoint = await database.read(checkpoints.get, PATH)
    assert checkpoint is not None
    assert (checkpoint.size_bytes, checkpoint.public) == (2**40, True)
    assert checkpoint.created_at == then
    await database.close()


async def test_an_upgrade_that_fails_changes_nothing(database_url: str) -> None:
    """What the next start finds is the old version, whole."""

    def break_off(connection: sa.Connection) -> None:
        build(connection, "head")
        raise RuntimeError("in the middle")

    connections = await opened(database_url)
    with pytest.raises(RuntimeError):
        await connections.transact(break_off)
    tables = await connections.read(
        lambda connection: set(sa.inspect(connection).get_table_names())
    )
    assert tables <= {"last_commit"}
    await connections.close()


async def test_a_database_of_a_newer_version_is_left_alone_and_says_so(database_url: str) -> None:
    await prepared(database_url, "head")
    connections = await opened(database_url)
    newer = "UPDATE alembic_version SET version_num = '9999'"
    await connections.transact(lambda connection: connection.exec_driver_sql(newer))
    await connections.close()
    with pytest.raises(StorageError, match="newer version of tinkercloud") as raised:
        await Database(database_url).start()
    assert "\n" not in str(raised.value)
    connections = await opened(database_url)
    assert await connections.read(current) == "9999"
    await connections.close()


async def test_two_servers_that_start_together_upgrade_once(database_url: str) -> None:
    """The second waits for the first, and finds an upgraded database when that one has ended."""
    await prepared(database_url, REVISIONS[0])
    first, second = Database(database_url), Database(database_url)
    starting = [asyncio.create_task(each.start()) for each in (first, second)]
    done, waiting = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waiting)) == (1, 1)
    winner, other = (first, second) if starting[0] in done else (second, first)
    assert await winner.read(sessions.get, "s") is not None
    await winner.close()
    await asyncio.gather(*starting)
    assert await other.read(current) == SCRIPTS.get_current_head()
    assert await other.read(sessions.get, "s") is not None
    await other.close()
