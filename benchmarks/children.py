"""Baselines in processes of their own: one JSON request a line in, one JSON answer a line out.

Both sides, and nothing but the standard library: a child may run under another interpreter. A
child is stopped (SIGSTOP) while others are measured, so that its spinning threads cost nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CLOSE_S = 20.0
_PR_SET_PDEATHSIG = 1

Answer = dict[str, Any]


class ChildFailed(Exception):
    """A baseline that cannot do what was asked; its text has the end of the child's output."""


class Child:
    """The asking side. ``env`` is added to this process's environment."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        # The child outlives this method, and so does what it writes to.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # a group that can be stopped as a whole
        )
        self.started: Answer = self._receive()
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Raises ``ChildFailed``."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ``_receive`` tells why
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._receive()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Ends the whole group: vLLM's engine is a grandchild."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildFailed(f"{self.name} ended:\n{self._log_tail()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed(f"{self.name}: {answer['error']}")
        return answer

    def _log_tail(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-15:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def serve(load: Callable[[], Mapping[str, Callable[..., Answer]]]) -> None:
    """The answering side: ``load`` makes the functions that are called by their names.

    An error is an answer; whatever libraries print goes to stderr.
    """
    # Also while it is stopped, it must not outlive its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    functions = load()
    say({})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(functions[request.pop("do")](**request))
        except Exception as error:  # the border of the process
            say({"error": f"{type(error).__name__}: {error}"[:2000]})
