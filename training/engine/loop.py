"""The engine's loop: training and sampling share one device, a micro-batch or a decode step a turn.

Knows neither torch nor sockets: a ``TrainerWork``, a ``SamplerWork``, an inbox and a way to reply.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from training.backends import ipc
from training.backends.base import (
    AdamParams,
    LoraSpec,
    OptimOutput,
    SampleRequest,
    SampleResult,
    TrainOutput,
    TrainUnit,
)
from training.backends.state_files import reason
from training.core.errors import StorageError, TinkercloudError, UnitError
from training.engine.state_writer import Captured, StateWriter

_log = logging.getLogger(__name__)


class Wake:
    """In the inbox: a thread of ours has changed what the loop can do next."""


Inbox = queue.SimpleQueue[ipc.Call | Wake | None]
"""What has arrived; None is its end."""

TrainRun = Generator[None, None, list[TrainOutput]]
"""Yields after each micro-batch. When closed or failed, it leaves no gradient of its unit."""


class TrainerWork(Protocol):
    """What the loop asks of ``engine.trainer.Trainer``; see ``TrainerBackend`` for the meaning."""

    def load_slot(
        self, slot: int, spec: LoraSpec, state_dir: Path | None, with_optimizer: bool
    ) -> None: ...

    def unload_slot(self, slot: int) -> None: ...

    def forward_backward(self, unit: TrainUnit) -> TrainRun: ...

    def forward(self, unit: TrainUnit) -> TrainRun: ...

    def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]: ...

    def discard_grads(self, slot: int) -> None: ...

    def capture_state(self, slot: int) -> Captured: ...

    def capture_adapter(self, slot: int) -> Captured: ...

    def tidy(self, busy: bool) -> float | None:
        """A few milliseconds of housekeeping, less of it while others are ``busy``; returns the
        seconds until there is more to do if nothing else happens, None: never."""


class SamplerWork(Protocol):
    """What the loop asks of ``engine.sampler.Sampler``."""

    def publish(self, snapshot_id: str, directory: Path) -> None: ...

    def retire(self, snapshot_id: str) -> None: ...

    def submit(self, request: SampleRequest) -> None: ...

    def cancel(self, request_id: str) -> None:
        """The next ``step`` answers the request with ``UserError``; unknown ids pass."""

    @property
    def has_work(self) -> bool: ...

    def step(self, begin: Callable[[set[str]], None]) -> list[tuple[str, SampleResult | Exception]]:
        """``begin`` is told which requests the next piece of the step is for."""


class Turn(Enum):
    TRAIN = "train"
    SAMPLE = "sample"
    WAIT = "wait"


class TimeShare:
    """Whose turn it is: alone, a side gets everything; both get their shares of measured time."""

    def __init__(self, sampling_share: float) -> None:
        self._share = sampling_share
        self._owed_to_sampling_s = 0.0

    def plan(self, training_waits: bool, sampling_waits: bool) -> Turn:
        if not (training_waits and sampling_waits):
            self._owed_to_sampling_s = 0.0  # nobody saves up turns while the other is away
            if training_waits:
                return Turn.TRAIN
            return Turn.SAMPLE if sampling_waits else Turn.WAIT
        return Turn.SAMPLE if self._owed_to_sampling_s >= 0 else Turn.TRAIN

    def spend(self, turn: Turn, seconds: float) -> None:
        if turn is Turn.TRAIN:
            self._owed_to_sampling_s += seconds * self._share
        elif turn is Turn.SAMPLE:
            self._owed_to_sampling_s -= seconds * (1 - self._share)


@dataclass
class Pauses:
    """How long samples in progress stood still because training had its turn.

    A pause is one micro-batch or one other training command; several in a row only where a decode
    step takes so long that sampling's share of the time has to be earned again.
    ``engine.micro_batch_tokens`` bounds it, but for a single longer sequence.
    """

    num: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0
    _current_s: float = 0.0

    def note(self, turn: Turn, seconds: float, sampling_waits: bool) -> None:
        if turn is Turn.TRAIN and sampling_waits:
            self._current_s += seconds
            return
        if self._current_s:
            self.num += 1
            self.total_s += self._current_s
            self.longest_s = max(self.longest_s, self._current_s)
        self._current_s = 0.0


class EngineLoop:
    """Runs until ``Stop`` or the inbox's None. ``fatal`` errors are raised: the process must end.

    Training commands are answered in the order they came; so are sampling commands, but for
    ``Sample`` itself, which is answered when it is finished. ``reply`` is called by two threads:
    ours, and the one that writes captured states. ``at_work`` is told for which calls each piece of
    work is, before it begins, and none when it is over.
    """

    def __init__(
        self,
        trainer: TrainerWork,
        sampler: SamplerWork,
        inbox: Inbox,
        reply: Callable[[ipc.Reply | ipc.Written], None],
        *,
        sampling_share: float,
        at_work: Callable[[Sequence[int]], None] = lambda calls: None,
        fatal: tuple[type[BaseException], ...] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trainer = trainer
        self._sampler = sampler
        self._inbox = inbox
        self._reply = reply
        self._at_work = at_work
        self._fatal = fatal
        self._clock = clock
        self._time_share = TimeShare(sampling_share)
        self.pauses = Pauses()
        self._training: deque[ipc.Call] = deque()
        self._run: TrainRun | None = None  # of self._training[0]
        self._samples: dict[str, int] = {}  # request id -> call id
        self._calls: Sequence[int] = ()  # that are worked on
        self._trained: int = 0  # the call of the last training turn
        self._writer = StateWriter()
        self._stopped = False
        self._tidy_in_s: float | None = None
        self._num_pieces = 0
        self._waits = False

    def current_work(self) -> int | None:
        """The number of the command, micro-batch or decode step that is being done; None while the
        loop sleeps. For a watchdog, from any thread."""
        return None if self._waits else self._num_pieces

    def run(self) -> None:
        turn = Turn.WAIT
        try:
            while not self._stopped:
                turn = self.turn(wait=turn is Turn.WAIT)
        except self._fatal:
            # The device tells of it late: it may be of what training left there to be computed.
            self._begin([*self._calls, self._trained])
            raise
        self._writer.close()

    def turn(self, wait: bool) -> Turn:
        """Takes in what has arrived (with ``wait``, sleeps until something has or it is time to
        tidy up), then lets one side work for one micro-batch or one decode step."""
        self._receive(wait)
        if self._stopped:
            return Turn.WAIT
        self._num_pieces += 1
        sampling_waits = self._sampler.has_work
        turn = self._time_share.plan(self._training_waits(), sampling_waits)
        started_at = self._clock()
        if turn is Turn.TRAIN:
            self._train()
        elif turn is Turn.SAMPLE:
            self._sample()
        self._begin(())
        seconds = self._clock() - started_at
        self._time_share.spend(turn, seconds)
        self.pauses.note(turn, seconds, sampling_waits)
        self._tidy_in_s = self._trainer.tidy(busy=turn is not Turn.WAIT)
        return turn

    # ----------------------------------------------------------------- absorb

    def _receive(self, wait: bool) -> None:
        """With ``wait``, sleeps until something has arrived or it is time to tidy up."""
        while not self._stopped:
            self._waits = wait
            try:
                call = self._inbox.get(block=wait, timeout=self._tidy_in_s)
            except queue.Empty:
                return
            finally:
                self._waits = wait = False
                self._num_pieces += 1
            if isinstance(call, Wake):
                continue
            if call is None or isinstance(call.command, ipc.Stop):
                self._stopped = True
            elif isinstance(call.command, ipc.Publish | ipc.Retire | ipc.Sample | ipc.Cancel):
                self._sampling_command(call.call_id, call.command)
                self._begin(())
            else:
                self._training.append(call)

    def _begin(self, calls: Sequence[int]) -> None:
        """The work from now on is for these."""
        self._calls = calls
        self._at_work(calls)

    def _sampling_command(self, call_id: int, command: ipc.SamplingCommand) -> None:
        self._begin([call_id])
        try:
            match command:
                case ipc.Publish(snapshot_id, directory):
                    self._sampler.publish(snapshot_id, directory)
                case ipc.Retire(snapshot_id):
                    self._sampler.retire(snapshot_id)
                case ipc.Cancel(request_id):
                    self._sampler.cancel(request_id)
                case ipc.Sample(request):
                    self._sampler.submit(request)
                    self._samples[request.request_id] = call_id
                    return
        except Exception as error:
            self._reply(ipc.Reply(call_id, error=self._shown(error, command)))
            return
        self._reply(ipc.Reply(call_id))

    # ----------------------------------------------------------------- turns

    def _sample(self) -> None:
        def begin(requests: set[str]) -> None:
            self._begin([self._samples[request_id] for request_id in requests])

        for request_id, result in self._sampler.step(begin):
            call_id = self._samples.pop(request_id)
            if isinstance(result, Exception):
                shown = self._shown(result, ipc.Sample)
                self._reply(ipc.Reply(call_id, error=shown))
            else:
                self._reply(ipc.Reply(call_id, result))

    def _training_waits(self) -> bool:
        """Whether the first training command can go on: a state is captured only where there is
        room for it, and as commands keep their order, those behind it wait too."""
        if not self._training:
            return False
        saves = isinstance(self._training[0].command, ipc.SaveState | ipc.ExportAdapter)
        return not (saves and self._writer.is_full)

    def _train(self) -> None:
        """One micro-batch of the first training command, or all of it where it has none."""
        call = self._training[0]
        self._trained = call.call_id
        self._begin([call.call_id])
        try:
            if self._run is None and isinstance(call.command, ipc.ForwardBackward):
                self._run = self._trainer.forward_backward(call.command.unit)
            elif self._run is None and isinstance(call.command, ipc.Forward):
                self._run = self._trainer.forward(call.command.unit)
            if self._run is not None:
                next(self._run)
                return
            reply = ipc.Reply(call.call_id, self._training_command(call.call_id, call.command))
        except StopIteration as end:
            reply = ipc.Reply(call.call_id, end.value)
        except Exception as error:
            reply = ipc.Reply(call.call_id, error=self._shown(error, call.command))
        self._run = None
        self._training.popleft()
        self._reply(reply)

    def _training_command(self, call_id: int, command: ipc.Command) -> object:
        match command:
            case ipc.LoadSlot(slot, spec, state_dir, with_optimizer):
                self._trainer.load_slot(slot, spec, state_dir, with_optimizer)
            case ipc.UnloadSlot(slot):
                self._trainer.unload_slot(slot)
            case ipc.OptimStep(params):
                return self._trainer.optim_step(params)
            case ipc.DiscardGrads(slot):
                self._trainer.discard_grads(slot)
            case ipc.SaveState(slot, directory):
                self._write(call_id, self._trainer.capture_state(slot), directory)
            case ipc.ExportAdapter(slot, directory):
                self._write(call_id, self._trainer.capture_adapter(slot), directory)
            case _:
                raise TypeError(f"not a training command: {command}")
        return None

    def _write(self, call_id: int, captured: Captured, directory: Path) -> None:
        """In the background; its end is told by a ``Written``."""

        def done(error: Exception | None) -> None:
            shown = None if error is None else _shown(error, ipc.Written)
            self._reply(ipc.Written(call_id, shown))
            self._inbox.put(Wake())  # a command may have waited for room

        self._writer.put(captured, directory, done)

    def _shown(self, error: Exception, command: object) -> Exception:
        if isinstance(error, self._fatal):
            raise error
        return _shown(error, command)


def _shown(error: Exception, command: object) -> Exception:
    """The error as the other side may see it: ours as they are, others short and logged."""
    name = command.__name__ if isinstance(command, type) else type(command).__name__
    if isinstance(error, StorageError):
        _log.error("%s failed: %s", name, error)
    if isinstance(error, TinkercloudError):
        return error
    _log.error("%s failed", name, exc_info=error)
    told = (reason(error).splitlines() or [""])[0][:200]
    text = f"{name} failed: {type(error).__name__}: {told}"
    return StorageError(text) if isinstance(error, OSError) else UnitError(text)
