"""Starts a server on port 8000, trains on it with examples/demo.py, then serves until Ctrl-C.

With ``--exit`` it ends with the demo's exit code instead.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TextIO

PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
KEY = "tml-slime-dev-key"
LOG = Path("data/demo-server.log")
POLL_S = 0.2
STOP_S = 60.0


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/api/v1/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def wait_until_healthy(server: subprocess.Popen[bytes], log: TextIO) -> bool:
    """Shows what the starting server logs. False if its process ends first."""
    while True:
        ended = server.poll() is not None
        up = not ended and healthy()
        sys.stderr.write(log.read())
        sys.stderr.flush()
        if ended or up:
            return up
        time.sleep(POLL_S)


def demo(arguments: list[str]) -> int:
    # The mirror: a tokenizer at once, where the hub cannot be reached.
    client = {"TINKER_BASE_URL": URL, "TINKER_API_KEY": KEY, "HF_ENDPOINT": f"{URL}/hf"}
    command = [sys.executable, "-m", "examples.demo", *arguments]
    return subprocess.run(command, env=os.environ | client, check=False).returncode


def main(arguments: list[str]) -> int:
    exit_after = "--exit" in arguments
    arguments = [argument for argument in arguments if argument != "--exit"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    LOG.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "training.cli", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    with LOG.open("wb") as output, LOG.open() as log:
        server = subprocess.Popen(
            command,
            env=os.environ | {"TINKER_API_KEY": KEY, "LOG_FORMAT": "console"},
            stdout=output,
            stderr=output,
        )
        try:
            if not wait_until_healthy(server, log):
                return server.returncode or 1
            status = demo(arguments)
            if exit_after:
                return status
            print(f"\nThe server keeps running on {URL} (its log: {LOG}). Ctrl-C stops it.")
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
