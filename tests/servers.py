"""Real server processes for tests: started on a free loopback port, waited for, stopped by id.

A server gets its own folder, configuration file and environment, so nothing of the machine's or of
another test's leaks into it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "slime-test-key"
OTHER_KEY = "slime-other-key"
FAKE_MODEL = "tests/tiny"
START_TIMEOUT_S = 600.0
"""Only bounds a server that hangs; one whose process ends is noticed at once."""

_OURS = ("TRAINING_", "TINKER_", "ENGINE_", "RAY_")
_ALSO_OURS = (
    "METADATA_DIR",
    "FUTURES_DB_NAME",
    "DATABASE_URL",
    "CHECKPOINT_DIR",
    "MODEL_DIR",
    "SUPPORTED_MODELS",
    "LOG_FORMAT",
)


def clean_environment() -> dict[str, str]:
    """This process's environment without any setting of tinkercloud or the SDK."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OURS) and name not in _ALSO_OURS
    }


@dataclass
class Server:
    """A running server. ``api_key`` is in the form the SDK accepts."""

    base_url: str
    directory: Path
    command: tuple[str, ...]
    environment: Mapping[str, str]
    api_key: str = f"tml-{KEY}"
    other_key: str = f"tml-{OTHER_KEY}"
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def log_file(self) -> Path:
        return self.directory / "server.log"

    def client_environment(self) -> dict[str, str]:
        """For a client process of this server."""
        return clean_environment() | {
            "TINKER_BASE_URL": self.base_url,
            "TINKER_API_KEY": self.api_key,
            "TINKER_TELEMETRY": "0",
            "PYTHONPATH": str(REPOSITORY),
        }

    def log_tail(self, num_lines: int = 40) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def wait_until_ready(self) -> None:
        """Until /api/v1/health answers 200. Raises ``RuntimeError`` with the end of the log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=self.base_url, timeout=10.0) as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended while starting:\n{self.log_tail()}")
                try:
                    if client.get("/api/v1/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise RuntimeError(f"the server did not become ready:\n{self.log_tail()}")

    def spawn(self) -> None:
        """Starts the process (again): same port, same data."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=dict(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        """Asks the process to end, and ends it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60.0)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def assert_client_ended(done: subprocess.CompletedProcess[str]) -> None:
    """Of a program that uses the SDK. On a busy machine one in some hundred aborts after all is
    printed, the SDK's own command line too, in which nothing is ours; why was not found."""
    aborted_at_exit = done.returncode == -signal.SIGABRT and done.stdout and not done.stderr
    assert done.returncode == 0 or aborted_at_exit, f"{done.args}: {done.stdout}{done.stderr}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``top`` in place, section by section."""
    result = dict(base)
    for key, value in top.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def fake_model(**settings: Any) -> dict[str, Any]:
    return {"name": FAKE_MODEL, "backend": "fake", **settings}


def server_in(directory: Path, config: Mapping[str, Any] | None = None) -> Server:
    """A server that is not started, with ``config`` over the tests' defaults: the fake model, two
    keys, all in ``directory``."""
    port = free_port()
    settings = merged(
        {
            "server": {"host": "127.0.0.1", "port": port, "long_poll_s": 5.0},
            "auth": {"api_keys": [KEY, OTHER_KEY]},
            "storage": {
                "metadata_dir": str(directory / "metadata"),
                "checkpoint_dir": str(directory / "checkpoints"),
            },
            "model_dir": str(directory / "models"),
            "supported_models": [fake_model()],
            "log_format": "json",
        },
        config or {},
    )
    config_file = directory / "training.json"
    config_file.write_text(json.dumps(settings))
    environment = clean_environment() | {
        "TRAINING_CONFIG": str(config_file),
        "PYTHONPATH": str(REPOSITORY),
    }
    return Server(
        base_url=f"http://127.0.0.1:{port}",
        directory=directory,
        command=(sys.executable, "-m", "training.cli", "serve"),
        environment=environment,
    )


@contextmanager
def running_server(directory: Path, config: Mapping[str, Any] | None = None) -> Iterator[Server]:
    """``server_in`` of the same arguments, started; stopped at the end."""
    server = server_in(directory, config)
    server.spawn()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
