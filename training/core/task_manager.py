"""Runs the operations of every model of one trainer: revive, plan, run, save.

Knows neither the database nor the wire: a ``Keeper`` makes outcomes durable and brings models back,
``encode`` turns a trainer output into the bytes the client receives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace

import structlog

from training.backends.base import TrainerBackend
from training.core import metrics
from training.core.errors import BackendDead, BackendError, Busy, Gone, TinkercloudError
from training.core.fairness import FairShares
from training.core.gathering import Gathering
from training.core.keeper import Keeper
from training.core.model_queue import ModelQueue
from training.core.operations import (
    CallWork,
    Operation,
    Outcome,
    RefusedWork,
    SlotOf,
    StoredWork,
)
from training.core.planner import Plan, PlanKind, plan_next
from training.core.progress import SnapshotPolicy
from training.core.records import STATEFUL_KINDS, FutureStatus
from training.core.saving import Saving
from training.core.settling import Settling
from training.core.suspects import Suspects
from training.core.unit_runner import Encode, UnitRunner, effect_of_failure, failed

log = structlog.get_logger(__name__)

_REVIVE_PAUSE_S = 0.2
"""After a model could not be brought back because the engine went again."""
_MAX_REPLAY_FAILURES = 3


@dataclass(frozen=True)
class TaskPolicy:
    unit_tokens: int = 16384
    turn_tokens: int = 1024
    gap_timeout_s: float = 60.0
    max_pending_per_model: int = 4096
    snapshots: SnapshotPolicy = field(default_factory=SnapshotPolicy)


class TaskManager:
    """One per trainer backend."""

    def __init__(
        self,
        backend: TrainerBackend,
        keeper: Keeper,
        encode: Encode,
        policy: TaskPolicy,
    ) -> None:
        self._backend = backend
        self._keeper = keeper
        self._policy = policy
        self._queues: dict[str, ModelQueue] = {}
        self._active: dict[str, ModelQueue] = {}
        """Those that are not idle: thousands of idle models cost a busy one nothing."""
        self._closed: dict[str, TinkercloudError] = {}
        self._gap_since_s: dict[str, float] = {}
        self._gathering = Gathering()
        self._shares = FairShares(policy.turn_tokens)
        self._wake = asyncio.Event()
        self._settling = Settling(keeper)
        self._saving = Saving(keeper, self._settling, policy.snapshots, self._wake.set)
        self.suspects = Suspects()
        self._units = UnitRunner(backend, self._settling, encode, self._replay_failed)
        self._between: list[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = []
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        """Per model: calls and revivals that run beside the loop."""

    # ----------------------------------------------------------------- from the services

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="task-manager")

    async def drain(self, within_s: float) -> None:
        """Lets the running unit end, starts nothing more, and saves what can be saved. What is
        queued stays pending in the database."""
        try:
            async with asyncio.timeout(within_s):
                self._stopping = True
                self._wake.set()
                if self._loop is not None:
                    await asyncio.wait([self._loop])
                await self._saving.drained()
                for queue in self._loaded():
                    if queue.progress.is_dirty():
                        await self._saving.save(queue)
                        await self._saving.drained()
                running = [task for tasks in self._tasks.values() for task in tasks]
                await asyncio.gather(*running, return_exceptions=True)
                await self._settling.drained()
        except TimeoutError:
            log.warning("tasks.not_drained", seconds=within_s)
        except BackendDead as error:
            log.warning("tasks.not_drained", error=str(error))

    async def close(self) -> None:
        """Abandons what runs; it and what is queued stay pending in the database."""
        running = [task for tasks in self._tasks.values() for task in tasks]
        if self._loop is not None:
            running.append(self._loop)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._saving.close()
        for _, done in self._between:
            done.cancel()
        await self._settling.drained()

    def open_model(self, model_id: str, slot: SlotOf, next_seq: int = 0) -> None:
        """A new model, whose operation ``next_seq`` creates it in an engine's slot."""
        self._closed.pop(model_id, None)
        self._queues[model_id] = ModelQueue(model_id, slot, next_seq)

    def open_stored(self, model_id: str, slot: SlotOf, next_seq: int, has_pending: bool) -> None:
        """A model of an earlier process. It is brought back when it has something to do; now, if
        operations wait for it in the database."""
        self.open_model(model_id, slot, next_seq)
        queue = self._queues[model_id]
        queue.must_revive, queue.has_stored = True, has_pending
        queue.is_stored = True
        self._active[model_id] = queue
        self._wake.set()

    def close_model(self, model_id: str, error: TinkercloudError) -> None:
        """Fails what is queued, and whatever still arrives, with ``error``."""
        self._closed[model_id] = error
        self._gap_since_s.pop(model_id, None)
        self._gathering.forget(model_id)
        queue = self._queues.pop(model_id, None)
        self._active.pop(model_id, None)
        if queue is not None and queue.reviving is not None:
            queue.reviving.cancel()  # it may be waiting for an engine
        for operation in queue.drain() if queue else []:
            if not operation.is_settled:
                self._settling.put(operation, Outcome(failed(error)))

    async def released(self, model_id: str) -> None:
        """Of a closed model: returns when nothing that runs uses its slot any longer."""
        await self._idle(model_id)

        async def nothing() -> None:
            pass

        await self.run_between(nothing)
        await self._settling.drained(model_id)

    def check_room(self, model_id: str, seq: int) -> bool:
        """Raises ``Busy`` before anything is stored for a model whose queue is full. True for the
        operation that all others of the model wait for: it is always let in."""
        queue = self._queues.get(model_id)
        if queue is None:
            return False
        if seq <= queue.next_seq:
            return True
        if len(queue) >= self._policy.max_pending_per_model:
            raise Busy(f"{len(queue)} operations of this model are waiting", retry_after_s=1.0)
        return False

    def submit(self, operation: Operation) -> None:
        queue = self._queues.get(operation.model_id)
        if queue is None:
            gone = Gone(f"model {operation.model_id} is not loaded")
            error = self._closed.get(operation.model_id, gone)
            self._settling.put(operation, Outcome(failed(error)))
        elif not queue.push(operation):
            self._settling.put(operation, Outcome(failed(_late(operation))))
        else:
            self._gathering.arrived(operation.model_id, operation.arrived_s)
            self._active[operation.model_id] = queue
            self._wake.set()

    def loaded(self, model_id: str, seq: int, generation: int) -> None:
        """Operation ``seq`` put new weights into the model's slot; what was accumulated, or went
        wrong, belonged to the old."""
        if (queue := self._queues.get(model_id)) is not None:
            queue.loaded(seq, generation)

    async def run_between(self, action: Callable[[], Awaitable[None]]) -> None:
        """Runs ``action`` while no plan is running: nothing still uses what it takes away."""
        if self._loop is None or self._loop.done():
            await action()
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._between.append((action, done))
        self._wake.set()
        await done

    def num_queued(self) -> int:
        return sum(len(queue) for queue in self._active.values())

    def num_reviving(self) -> int:
        """Models that have work to do and are not back yet."""
        return sum(queue.must_revive and _has_work(queue) for queue in self._active.values())

    # ----------------------------------------------------------------- the loop

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._run_actions()
            for queue in [each for each in self._active.values() if each.is_idle()]:
                del self._active[queue.model_id]
            self._revive_stale()
            self._give_up_gaps()
            metrics.QUEUED_OPERATIONS.set(self.num_queued())
            now_s = time.monotonic()
            save = self._saving.next(self._loaded(), now_s)
            if isinstance(save, ModelQueue):
                await self._save(save)
                continue
            ready = [run for queue in self._active.values() if (run := self._ready(queue))]
            standing = self._shares.standing((run[0].owner for run in ready), now_s)
            plan = plan_next(ready, self._policy.unit_tokens, standing)
            if plan is None:
                await self._sleep(save)
                continue
            models = (run[0].model_id for run in ready)
            if pause_s := self._gathering.pause_s(plan, models, time.monotonic()):
                await self._sleep(pause_s)
                continue
            plan = replace(plan, operations=self.suspects.cut(plan.operations))
            for operation in plan.operations:
                self._queues[operation.model_id].pop(operation)
            self._shares.took(plan.operations, time.monotonic())
            if plan.kind is PlanKind.CALL:
                self._start_call(plan.operations[0])
            else:
                await self._execute(plan)
        await self._run_actions()

    def _ready(self, queue: ModelQueue) -> list[Operation]:
        if queue.busy or queue.must_revive:
            return []
        run = queue.run_of_ready()
        # Before its creation has run, a model has no slot that anything else could use.
        return run if queue.generation is not None else run[:1]

    def _loaded(self) -> list[ModelQueue]:
        """Of the models that the engine of now holds."""
        health = self._backend.health()
        if not health.alive:
            return []
        return [
            queue
            for queue in self._active.values()
            if queue.generation == health.generation and not queue.must_revive
        ]

    async def _run_actions(self) -> None:
        while self._between:
            action, done = self._between.pop(0)
            failure: Exception | None = None
            try:
                await action()
            except Exception as error:
                failure = error
            if done.done():  # whoever asked was cancelled
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    async def _sleep(self, at_most_s: float | None = None) -> None:
        """Until something arrives, a gap is to be given up, or ``at_most_s`` are over."""
        now = time.monotonic()
        deadlines = [since + self._policy.gap_timeout_s for since in self._gap_since_s.values()]
        if at_most_s is not None:
            deadlines.append(now + at_most_s)
        timeout = max(min(deadlines) - now, 0.0) if deadlines else None
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return

    def _give_up_gaps(self) -> None:
        now = time.monotonic()
        for queue in self._active.values():
            if queue.must_revive or not queue.has_gap():
                self._gap_since_s.pop(queue.model_id, None)
                continue
            waited_s = now - self._gap_since_s.setdefault(queue.model_id, now)
            if waited_s >= self._policy.gap_timeout_s or queue.gap_is_settled():
                missing = queue.skip_gap()
                del self._gap_since_s[queue.model_id]
                log.warning(
                    "queue.gap_given_up",
                    model_id=queue.model_id,
                    first_seq=missing.start,
                    num_missing=len(missing),
                )

    async def _execute(self, plan: Plan) -> None:
        now = time.monotonic()
        for operation in plan.operations:
            metrics.QUEUE_WAIT_SECONDS.labels(plan.kind.value).observe(now - operation.arrived_s)
        metrics.UNIT_OPERATIONS.labels(plan.kind.value).observe(len(plan.operations))
        try:
            with metrics.UNIT_SECONDS.labels(plan.kind.value).time():
                operations = [await _decoded(item) for item in plan.operations]
                self._keeper.note_running(
                    self._backend.capabilities().base_model,
                    [item.request_id for item in operations],
                )
                async with self.suspects.alone(item.request_id for item in operations):
                    await self._units.run(plan.kind, operations, self._queues)
            self.suspects.forget(item.request_id for item in operations)
            self._gathering.ran(plan, now, time.monotonic())
        except BackendDead as error:
            await self._died(self._units.unsettled, error)
        except Exception as error:
            # The border of the job: one broken plan must not stop the loop for every tenant.
            log.exception("plan.failed", kind=plan.kind.value)
            internal = BackendError(f"internal error ({type(error).__name__}); see the server log")
            self._units.fail(list(self._units.unsettled), internal)

    async def _save(self, queue: ModelQueue) -> None:
        try:
            await self._saving.save(queue)
        except BackendDead as error:
            await self._died([], error)
        except Exception:
            # The border of the job: a snapshot that fails costs a longer replay, nothing else.
            log.exception("snapshot.failed", model_id=queue.model_id)

    # ----------------------------------------------------------------- calls

    def _start_call(self, operation: Operation) -> None:
        """Beside the loop: other models do not wait while one is created, loaded or saved."""
        queue = self._queues[operation.model_id]
        queue.busy = True
        earlier = set(self._tasks.get(operation.model_id, ()))
        self._start(operation.model_id, self._call(queue, operation, earlier))

    async def _call(
        self, queue: ModelQueue, operation: Operation, earlier: set[asyncio.Task[None]]
    ) -> None:
        try:
            try:
                async with self.suspects.alone([operation.request_id]):
                    decoded = await _decoded(operation)
                    if isinstance(decoded.work, RefusedWork):
                        raise decoded.work.error
                    assert isinstance(decoded.work, CallWork)
                    finish = await decoded.work.run()
            finally:
                queue.busy = False
                self._wake.set()
            outcome = await finish()
        except BackendDead as error:
            await self._died([operation], error)
            return
        except TinkercloudError as error:
            outcome = Outcome(failed(error))
        except Exception as error:
            # The border of the job: one broken call must not leave its client waiting.
            log.exception("call.failed", kind=operation.kind.value)
            internal = BackendError(f"internal error ({type(error).__name__}); see the server log")
            outcome = Outcome(failed(internal))
        await self._absorb(operation, outcome, earlier)

    async def _absorb(
        self, operation: Operation, outcome: Outcome, earlier: set[asyncio.Task[None]]
    ) -> None:
        if not operation.is_settled:
            if operation.kind in STATEFUL_KINDS and earlier:
                # Its snapshot covers saves that still write; they must be answered first.
                await asyncio.wait(earlier)
                await self._settling.drained(operation.model_id)
            self._settling.put(operation, outcome)
        elif outcome.result.status is FutureStatus.DONE:
            self._settling.compare(operation, outcome.result)
        else:
            self._replay_failed(operation, BackendError(outcome.result.error))
        if operation.is_settled and outcome.undo is not None:
            await outcome.undo()  # its files have done their part, and are those of no record

    def _start(self, model_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.setdefault(model_id, set()).add(task)
        task.add_done_callback(lambda done: self._ended(model_id, done))
        return task

    def _ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        tasks = self._tasks[model_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[model_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", model_id=model_id, exc_info=error)

    async def _idle(self, model_id: str) -> None:
        """Returns when no call of the model runs beside the loop."""
        tasks = self._tasks.get(model_id, set()) - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks)

    # ----------------------------------------------------------------- death and recovery

    async def _died(self, operations: Sequence[Operation], error: BackendDead) -> None:
        """What had no outcome runs again when its model is back, unless it is to blame."""
        for operation in operations:
            if (queue := self._queues.get(operation.model_id)) is not None:
                self._must_revive(queue)
        self._wake.set()
        verdict = self.suspects.died((item.request_id for item in operations), error)
        if verdict.counted:
            await self._keeper.note_deaths(verdict.counted)
        for operation in list(operations):
            if (poison := verdict.poison.get(operation.request_id)) is None:
                continue
            log.error("operation.poison", request_id=operation.request_id, error=str(poison))
            if operation.is_settled or operation.seq == 0:
                self._lose(operation.model_id, poison)
            else:
                # The model comes back from the database, which knows what this did to its window.
                outcome = Outcome(failed(poison, effect_of_failure(operation)))
                self._settling.put(operation, outcome)

    def _revive_stale(self) -> None:
        health = self._backend.health()
        for queue in self._active.values():
            stale = queue.generation is not None and (
                not health.alive or queue.generation != health.generation
            )
            if stale:
                queue.must_revive = True
            if queue.must_revive and _has_work(queue) and queue.reviving is None and not queue.busy:
                queue.reviving = self._start(queue.model_id, self._revive(queue))

    async def _revive(self, queue: ModelQueue) -> None:
        """Beside the loop. Everything that is known of the model's operations is stored first, so
        that the database tells what is to be run again."""
        model_id = queue.model_id
        try:
            await self._idle(model_id)
            await self._settling.drained(model_id)
            with metrics.REVIVAL_SECONDS.time():
                until = None if queue.is_stored else queue.high_seq
                revival = await self._keeper.revive(model_id, until)
            for operation in revival.operations:
                assert operation.stored is not None
                self.suspects.remember(operation.request_id, operation.stored.deaths)
            late = queue.revive(revival.next_seq, revival.operations, revival.generation)
            for operation in late:
                self._settling.put(operation, Outcome(failed(_late(operation))))
            log.info(
                "model.revived",
                model_id=model_id,
                next_seq=revival.next_seq,
                num_replayed=sum(item.is_settled for item in revival.operations),
            )
        except BackendDead as error:
            log.warning("model.not_revived_yet", model_id=model_id, error=str(error))
            await asyncio.sleep(_REVIVE_PAUSE_S)
        except TinkercloudError as error:
            self._lose(model_id, error)
        finally:
            queue.reviving = None
            self._wake.set()

    def _must_revive(self, queue: ModelQueue) -> None:
        """There are operations to run again, which only the database has."""
        queue.must_revive = queue.has_stored = True
        self._active[queue.model_id] = queue

    def _replay_failed(self, operation: Operation, error: TinkercloudError) -> None:
        """An operation that was done before could not be done again: not as it was, yet."""
        queue = self._queues.get(operation.model_id)
        if queue is None:
            return
        queue.replay_failures += 1
        self._must_revive(queue)
        log.error("replay.failed", model_id=operation.model_id, seq=operation.seq, error=str(error))
        if queue.replay_failures >= _MAX_REPLAY_FAILURES:
            reason = f"operation {operation.seq} cannot be run again: {error}"
            self._lose(operation.model_id, BackendError(reason))

    def _lose(self, model_id: str, error: TinkercloudError) -> None:
        self._start(f"lose {model_id}", self._keeper.give_up(model_id, error))


def _has_work(queue: ModelQueue) -> bool:
    return queue.has_stored or len(queue) > 0


def _late(operation: Operation) -> Gone:
    return Gone(f"operation {operation.seq} came after the server stopped waiting for it")


async def _decoded(operation: Operation) -> Operation:
    if isinstance(operation.work, StoredWork) and not operation.is_passed_over:
        return replace(operation, work=await operation.work.load())
    return operation
