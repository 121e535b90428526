"""One engine process from its start to its end: calls by number, its output, its death.

Knows nothing of restarts; ``local.py`` starts the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

import structlog

from training.backends import ipc
from training.backends.base import Capabilities, Saving
from training.backends.death import Death, count_oom_kills, death_of
from training.backends.flight_recorder import FlightRecord
from training.config import EngineConfig
from training.core.errors import BackendDead, ConfigError, DeathCause

_log = structlog.get_logger(__name__)

_KEPT_LINES = 20  # of the child's output, told when it dies
_MAX_LINE_BYTES = 1 << 16

T = TypeVar("T")


def child_environment(engine: EngineConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: ours, with the allocator, threads and hub settings it needs.

    glibc returns large freed blocks to the kernel and so faults every page of every activation
    in again; the MALLOC_ settings keep them (measured: 30 to 50 % of a training step on CPU).
    GNU OpenMP's threads spin at every barrier, by default for so long that a core shared with the
    API or a client stands still. Measured for a training step of 8 x 128 tokens on 2 cores, in
    tokens/s, idle and beside one busy process: default 804 and below 100, 5000 766 and 344,
    0 510 and 500.
    """
    num_threads = str(engine.num_threads or _available_cores())
    return dict(environment) | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "OMP_NUM_THREADS": num_threads,
        "GOMP_SPINCOUNT": "5000",
        "MKL_NUM_THREADS": num_threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _available_cores() -> int:
    if sys.platform == "linux":  # containers and taskset leave us fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class EngineChild:
    """``python -m training.engine`` on one end of a socket pair; we hold the other end."""

    def __init__(self, configure: ipc.Configure, on_line: Callable[[int, str], None]) -> None:
        self._configure = configure
        self._on_line = on_line
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._writings: dict[int, asyncio.Future[None]] = {}  # of states, by their calls
        self._num_calls = 0
        self._outgoing: asyncio.Queue[object] = asyncio.Queue()
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._tasks: list[asyncio.Task[None]] = []
        self._sender: asyncio.Task[None] | None = None
        self._oom_kills = count_oom_kills()
        self._stopping = False
        self._broken = False
        """It lived, but of no use any more, so that we killed it."""
        self._culprits: frozenset[int] | None = None
        """The calls that broke it, where the flight record does not say."""
        self.has_worked = False
        """Whether it has finished any work, which loading and publishing are not."""
        self.ended = asyncio.Event()
        """Set once the process is gone and every call has been answered."""
        self.detail = ""
        """How it ended."""
        self.cause = DeathCause.CLOSED
        """Of its end, once it has ended."""

    async def start(self) -> Capabilities:
        """Returns when the model is loaded.

        Raises ``ConfigError`` with the child's own words when it cannot load, ``BackendDead`` when
        it dies while loading.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ipc.SOCKET_BUFFER_BYTES)
        ours.setblocking(False)
        self._socket = ours
        # A sampler step is for max_running_sequences at most; a failure may add a training call.
        self._record = FlightRecord(self._configure.engine.max_running_sequences + 1)
        try:
            with theirs:
                self._process = await self._spawn(theirs.fileno(), self._record.fd)
        except BaseException:
            ours.close()
            self._record.close()
            raise
        output = asyncio.create_task(self._forward_output())
        self._sender = asyncio.create_task(self._send_all())
        self._tasks = [output, self._sender]
        self._outgoing.put_nowait(self._configure)
        try:
            answer = await self._receive()
        except BaseException:
            await self.close(0.0)
            raise
        if isinstance(answer, ipc.Ready):
            self._tasks.append(asyncio.create_task(self._attend(output)))
            return answer.capabilities
        if isinstance(answer, ipc.StartFailed):
            await self.close(10.0)
            raise ConfigError(answer.message)
        await self._see_to_its_end(output)
        raise BackendDead(self.detail, self.cause)

    async def _spawn(self, fd: int, recorder_fd: int) -> asyncio.subprocess.Process:
        spawning = asyncio.create_task(
            asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "training.engine", "--parent", str(os.getpid())),
                *("--fd", str(fd), "--recorder", str(recorder_fd)),
                pass_fds=(fd, recorder_fd),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=child_environment(self._configure.engine, os.environ),
            )
        )
        try:
            return await asyncio.shield(spawning)
        except asyncio.CancelledError:  # uvloop would leave a process half spawned behind
            process = await spawning
            process.kill()
            await process.wait()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, command: ipc.Command) -> object:
        """The command's value, or its error raised; ``BackendDead`` when the process goes."""
        return await self._ask(self._new_call_id(), command)

    async def save(self, command: ipc.SaveState | ipc.ExportAdapter) -> Saving:
        """Returns with the state captured."""
        call_id = self._new_call_id()
        writing = asyncio.get_running_loop().create_future()
        saving = Saving(writing)
        self._writings[call_id] = writing  # it may end before we wake up from the line below
        try:
            await self._ask(call_id, command)
        except BaseException:
            self._writings.pop(call_id, None)
            raise
        return saving

    def _new_call_id(self) -> int:
        self._num_calls += 1
        return self._num_calls

    async def _ask(self, call_id: int, command: ipc.Command) -> object:
        if self.ended.is_set():
            raise BackendDead(self.detail, DeathCause.LOST)
        if self._stopping:
            raise BackendDead("the engine process is being stopped", DeathCause.CLOSED)
        answer = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        self._outgoing.put_nowait(ipc.Call(call_id, command))
        try:
            value = await answer
        finally:
            self._calls.pop(call_id, None)
        self.has_worked = self.has_worked or isinstance(command, ipc.WORK)
        return value

    def post(self, command: ipc.Command) -> None:
        """Sends a command whose answer nobody waits for."""
        if not self.ended.is_set():
            self._outgoing.put_nowait(ipc.Call(self._new_call_id(), command))

    async def close(self, grace_s: float) -> None:
        """Asks the child to stop, waits ``grace_s`` for it, then kills it."""
        self._stopping = True
        self.post(ipc.Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_s)
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        if self._sender is not None:
            self._sender.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end()

    # ----------------------------------------------------------------- tasks

    async def _receive(self) -> object | None:
        try:
            return await ipc.receive_async(asyncio.get_running_loop(), self._socket)
        except ConnectionError:
            return None

    async def _attend(self, output: asyncio.Task[None]) -> None:
        """From the first reply to the process's end; then every open call is answered."""
        try:
            await self._receive_all()
        except Exception:
            _log.exception("engine.bad_frame", pid=self._process.pid)
            self._culprits = frozenset(self._calls)  # the answer to one of them
        await self._see_to_its_end(output)

    async def _see_to_its_end(self, output: asyncio.Task[None]) -> None:
        if not self._stopping:
            # A child that closed its socket but lives on is of no use, whatever it is doing.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 1.0)
            if self._process.returncode is None:
                self._kill_broken()
        try:
            await self._process.wait()
            await output
        except Exception:
            _log.exception("engine.output_lost", pid=self._process.pid)
        finally:
            if self._sender is not None:
                self._sender.cancel()
            self._end()

    async def _receive_all(self) -> None:
        while (message := await self._receive()) is not None:
            if isinstance(message, ipc.Written):
                writing = self._writings.pop(message.call_id, None)
                _settle(writing, None, message.error)
            else:
                assert isinstance(message, ipc.Reply)
                _settle(self._calls.get(message.call_id), message.value, message.error)

    async def _send_all(self) -> None:
        """The only writer: a cancelled caller never leaves half a frame behind."""
        loop = asyncio.get_running_loop()
        message: object = None
        try:
            while True:
                message = await self._outgoing.get()
                await ipc.send_async(loop, self._socket, message)
        except ConnectionError:
            return  # _receive_all sees the same end and says why
        except Exception:
            # A frame that cannot be sent leaves its caller waiting on a live child: start over.
            _log.exception("engine.send_failed", pid=self._process.pid)
            if isinstance(message, ipc.Call):
                self._culprits = frozenset({message.call_id})
            self._kill_broken()

    def _kill_broken(self) -> None:
        self._broken = True
        self._process.kill()

    async def _forward_output(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._line(line)
        self._line(rest)

    def _line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_lines.append(text)
            self._on_line(self._process.pid, text)

    def _end(self) -> None:
        if self.ended.is_set():
            return
        death = self._death()
        self.cause = death.cause
        self.detail = f"the engine process {self._process.pid} has ended ({death.detail})"
        blamed = self._blamed()
        for call_id, answer in self._calls.items():
            _settle(answer, None, self._dead(call_id in blamed))
        for call_id, writing in self._writings.items():
            _settle(writing, None, self._dead(call_id in blamed))
        self._writings.clear()
        self._socket.close()
        self._record.close()
        self.ended.set()

    def _death(self) -> Death:
        if self._stopping:
            return Death(DeathCause.CLOSED, "it was stopped")
        if self._broken:
            return Death(DeathCause.CRASHED, "it did not answer as it should")
        return death_of(self._process.returncode, self._oom_kills, count_oom_kills())

    def _blamed(self) -> frozenset[int]:
        """The calls that it was at work on when it ended.

        Where a crash came between two pieces of work, the state that was being written is suspect;
        without one, every call is: they are told apart when each runs alone. A crash of the thread
        that writes, in the middle of other work, is held against that work.
        """
        if self._culprits is not None:
            return self._culprits
        at_work = self._record.read()
        if at_work or not self.cause.blames_work:
            return at_work
        captured = [call_id for call_id in self._writings if call_id not in self._calls]
        return frozenset(captured[:1] or self._calls)

    def _dead(self, is_blamed: bool) -> BackendDead:
        ours = self.cause if is_blamed or self.cause is DeathCause.CLOSED else DeathCause.BYSTANDER
        return BackendDead(self.detail, ours)

    def last_lines(self) -> str:
        return "\n".join(self._last_lines)


def _settle(future: asyncio.Future[T] | None, value: T, error: Exception | None) -> None:
    if future is None or future.done():
        return  # posted, or its caller was cancelled
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
