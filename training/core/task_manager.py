"""Runs the operations of every model of one trainer: revive, plan, run, save.

Knows neither the database nor the wire: a ``Keeper`` makes outcomes durable and brings models back,
``encode`` turns a trainer output into the bytes the client receives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from training.backends.base import TrainerBackend
from training.core import metrics
from training.core.background import Background
from training.core.call_runner import CallRunner
from training.core.errors import BackendDead, BackendError, Busy, Gone, TinkercloudError
from training.core.fairness import FairShares
from training.core.gaps import Gaps
from training.core.gathering import Gathering
from training.core.keeper import Keeper
from training.core.model_queue import ModelQueue
from training.core.model_queues import ModelQueues
from training.core.operations import (
    Operation,
    Outcome,
    SlotOf,
)
from training.core.planner import Plan, PlanKind, plan_next
from training.core.progress import SnapshotPolicy
from training.core.recovery import Recovery
from training.core.saving import Saving
from training.core.settling import Settling
from training.core.unit_runner import Encode, UnitRunner, came_too_late, failed

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TaskPolicy:
    unit_tokens: int = 16384
    turn_tokens: int = 2048
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
        self._queues = ModelQueues()
        self._closed: dict[str, TinkercloudError] = {}
        self._gathering = Gathering()
        self._shares = FairShares(policy.turn_tokens)
        self._wake = asyncio.Event()
        self._settling = Settling(keeper)
        self._saving = Saving(keeper, self._settling, policy.snapshots, self._wake.set)
        self._background = Background()
        self._recovery = Recovery(
            backend, keeper, self._settling, self._background, self._queues, self._wake.set
        )
        self.suspects = self._recovery.suspects
        self._gaps = Gaps(keeper, self._background, policy.gap_timeout_s, self._wake.set)
        self._calls = CallRunner(self._settling, self._background, self._recovery, self._wake.set)
        self._units = UnitRunner(backend, self._settling, encode, self._recovery.replay_failed)
        self._between: list[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = []
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False

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
                await asyncio.gather(*self._background.all(), return_exceptions=True)
                await self._settling.drained()
        except TimeoutError:
            log.warning("tasks.not_drained", seconds=within_s)
        except BackendDead as error:
            log.warning("tasks.not_drained", error=str(error))

    async def close(self) -> None:
        """Abandons what runs; it and what is queued stay pending in the database."""
        running = self._background.all()
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
        self._queues.open(model_id, slot, next_seq)

    def open_stored(self, model_id: str, slot: SlotOf, next_seq: int, has_pending: bool) -> None:
        """A model of an earlier process. It is brought back when it has something to do; now, if
        operations wait for it in the database."""
        self._closed.pop(model_id, None)
        queue = self._queues.open(model_id, slot, next_seq)
        queue.must_revive, queue.has_stored = True, has_pending
        queue.is_stored = True
        self._queues.activate(queue)
        self._wake.set()

    def close_model(self, model_id: str, error: TinkercloudError) -> None:
        """Fails what is queued, and whatever still arrives, with ``error``."""
        self._closed[model_id] = error
        self._gaps.forget(model_id)
        self._gathering.forget(model_id)
        queue = self._queues.close(model_id)
        if queue is not None and queue.reviving is not None:
            queue.reviving.cancel()  # it may be waiting for an engine
        for operation in queue.drain() if queue else []:
            if not operation.is_settled:
                self._settling.put(operation, Outcome(failed(error)))

    async def released(self, model_id: str) -> None:
        """Of a closed model: returns when nothing that runs uses its slot any longer."""
        await self._background.idle(model_id)

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
            self._settling.put(operation, Outcome(came_too_late(operation)))
        else:
            self._gathering.arrived(operation.model_id, operation.arrived_s)
            self._queues.activate(queue)
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
        return sum(len(queue) for queue in self._queues.active())

    def num_reviving(self) -> int:
        """Models that have work to do and are not back yet."""
        return sum(queue.must_revive and queue.has_work() for queue in self._queues.active())

    # ----------------------------------------------------------------- the loop

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._run_actions()
            self._queues.prune()
            self._recovery.revive_stale()
            self._gaps.give_up(self._queues.active(), time.monotonic())
            metrics.QUEUED_OPERATIONS.set(self.num_queued())
            now_s = time.monotonic()
            save = self._saving.next(self._loaded(), now_s)
            if isinstance(save, ModelQueue):
                await self._save(save)
                continue
            ready = [run for queue in self._queues.active() if (run := self._ready(queue))]
            standing = self._shares.standing(ready, now_s)
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
                self._queue(operation).pop(operation)
            self._shares.took(plan.operations)
            if plan.kind is PlanKind.CALL:
                call = plan.operations[0]
                self._calls.start(self._queue(call), call)
            else:
                await self._execute(plan)
        await self._run_actions()

    def _queue(self, operation: Operation) -> ModelQueue:
        """Of an operation that is planned."""
        queue = self._queues.get(operation.model_id)
        assert queue is not None
        return queue

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
            for queue in self._queues.active()
            if queue.generation == health.generation
            and not queue.must_revive
            and not queue.busy  # what runs may be changing it
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
        waits_s = [self._gaps.due_in_s(time.monotonic()), at_most_s]
        try:
            await asyncio.wait_for(
                self._wake.wait(), min((each for each in waits_s if each is not None), default=None)
            )
        except TimeoutError:
            return

    async def _execute(self, plan: Plan) -> None:
        now = time.monotonic()
        for operation in plan.operations:
            metrics.QUEUE_WAIT_SECONDS.labels(plan.kind.value).observe(now - operation.arrived_s)
        metrics.UNIT_OPERATIONS.labels(plan.kind.value).observe(len(plan.operations))
        self._units.unsettled = list(plan.operations)
        try:
            with metrics.UNIT_SECONDS.labels(plan.kind.value).time():
                operations = await self._recovery.decode(plan.operations)
                self._keeper.note_running(
                    self._backend.capabilities().base_model,
                    [item.request_id for item in operations],
                )
                async with self.suspects.alone(item.request_id for item in operations):
                    await self._units.run(plan.kind, operations, self._queues)
            self.suspects.forget(item.request_id for item in operations)
            self._gathering.ran(plan, now, time.monotonic())
        except BackendDead as error:
            await self._recovery.died(self._units.unsettled, error)
        except Exception as error:
            # The border of the job: one broken plan must not stop the loop for every tenant.
            log.exception("plan.failed", kind=plan.kind.value)
            internal = BackendError(f"internal error ({type(error).__name__}); see the server log")
            self._units.fail(list(self._units.unsettled), internal)

    async def _save(self, queue: ModelQueue) -> None:
        try:
            await self._saving.save(queue)
        except BackendDead as error:
            await self._recovery.died([], error)
        except Exception:
            # The border of the job: a snapshot that fails costs a longer replay, nothing else.
            log.exception("snapshot.failed", model_id=queue.model_id)
