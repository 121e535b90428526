"""Object stores on this machine: S3 (moto) and Google Cloud Storage (its emulator)."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.servers import clean_environment, free_port

START_TIMEOUT_S = 120.0
BUCKET = "models"
COMMANDS = {
    "s3": ("moto.server", "-H", "127.0.0.1", "-p"),
    "gs": (
        *("gcp_storage_emulator", "start", "--in-memory", "-q", "-H", "127.0.0.1"),
        *("--default-bucket", BUCKET, "--port"),
    ),
}
"""Scheme -> the module that serves it; its port follows."""


class ObjectStore:
    """Keeps everything in memory: what was stored is gone after ``stop``."""

    def __init__(self, directory: Path, scheme: str = "s3") -> None:
        self.port = free_port()
        self.scheme = scheme
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}",
            "GOOGLE_CLOUD_PROJECT": "tests",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "hush-hush",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }
        self._log = directory / "object-store.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """With one empty bucket. Raises ``RuntimeError`` with the server's log."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *COMMANDS[self.scheme], str(self.port)],
                env=clean_environment(),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._make_bucket()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError(f"the object store does not start: {self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _make_bucket(self) -> None:
        url = f"http://127.0.0.1:{self.port}"
        if self.scheme == "s3":
            request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        else:  # it has made the bucket itself
            request = urllib.request.Request(f"{url}/storage/v1/b/{BUCKET}")
        urllib.request.urlopen(request, timeout=10).close()
