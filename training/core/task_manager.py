"""Runs the operations of every model of one trainer: plan, run, absorb.

Knows neither the database nor the wire: ``settle`` makes an outcome durable and wakes its waiter,
``encode`` turns a trainer output into the bytes the client receives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

import structlog

from training.backends.base import (
    AdamParams,
    OptimOutput,
    TrainerBackend,
    TrainOp,
    TrainOutput,
    TrainUnit,
)
from training.core import metrics
from training.core.errors import (
    BackendDead,
    BackendError,
    Busy,
    Gone,
    TinkercloudError,
    UserError,
)
from training.core.gathering import Gathering
from training.core.model_queue import ModelQueue
from training.core.operations import CallWork, Operation, OptimWork, RefusedWork, TrainWork
from training.core.planner import Plan, PlanKind, plan_next
from training.core.records import FutureKind, FutureResult, FutureStatus

log = structlog.get_logger(__name__)

Settle = Callable[[str, FutureResult], Coroutine[None, None, None]]
Encode = Callable[[TrainOutput | OptimOutput], FutureResult]
_SPOILS_WINDOW = frozenset({PlanKind.FORWARD_BACKWARD, PlanKind.OPTIM_STEP})
"""After these failed, nobody knows which gradients the slot holds: the next step discards them."""


def failed(error: TinkercloudError) -> FutureResult:
    return FutureResult(FutureStatus.FAILED, error=str(error), category=error.category)


class TaskManager:
    """One per trainer backend. ``on_backend_dead`` hears of a death once per failed plan."""

    def __init__(
        self,
        backend: TrainerBackend,
        settle: Settle,
        encode: Encode,
        on_backend_dead: Callable[[str], Awaitable[None]],
        unit_tokens: int,
        gap_timeout_s: float,
        max_pending_per_model: int,
    ) -> None:
        self._backend = backend
        self._settle_future = settle
        self._encode = encode
        self._on_backend_dead = on_backend_dead
        self._unit_tokens = unit_tokens
        self._gap_timeout_s = gap_timeout_s
        self._max_pending_per_model = max_pending_per_model
        self._queues: dict[str, ModelQueue] = {}
        self._closed: dict[str, TinkercloudError] = {}
        self._gap_since_s: dict[str, float] = {}
        self._gathering = Gathering()
        self._between: list[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()

    # ----------------------------------------------------------------- from the services

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="task-manager")

    async def close(self) -> None:
        """Abandons the call in flight; it and what is queued stay pending in the database."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for _, done in self._between:
            done.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)

    def open_model(self, model_id: str, next_seq: int = 0) -> None:
        self._closed.pop(model_id, None)
        self._queues[model_id] = ModelQueue(model_id, next_seq)

    def close_model(self, model_id: str, error: TinkercloudError) -> None:
        """Fails what is queued, and whatever still arrives, with ``error``."""
        self._closed[model_id] = error
        self._gap_since_s.pop(model_id, None)
        self._gathering.forget(model_id)
        queue = self._queues.pop(model_id, None)
        for operation in queue.drain() if queue else []:
            self._settle(operation, failed(error))

    def check_room(self, model_id: str, seq: int) -> None:
        """Raises ``Busy`` before anything is stored for a model whose queue is full; the operation
        that all others wait for is always let in."""
        queue = self._queues.get(model_id)
        if queue is None or seq <= queue.next_seq:
            return
        if len(queue) >= self._max_pending_per_model:
            raise Busy(f"{len(queue)} operations of this model are waiting", retry_after_s=1.0)

    def submit(self, operation: Operation) -> None:
        queue = self._queues.get(operation.model_id)
        if queue is None:
            gone = Gone(f"model {operation.model_id} is not loaded")
            self._settle(operation, failed(self._closed.get(operation.model_id, gone)))
        elif not queue.push(operation):
            self._settle(
                operation,
                failed(
                    Gone(f"operation {operation.seq} came after the server stopped waiting for it")
                ),
            )
        else:
            self._gathering.arrived(operation.model_id, operation.arrived_s)
            self._wake.set()

    def reset_window(self, model_id: str) -> None:
        """New weights were loaded; what was accumulated, or went wrong, belonged to the old."""
        if (queue := self._queues.get(model_id)) is not None:
            queue.close_window()

    async def run_between(self, action: Callable[[], Awaitable[None]]) -> None:
        """Runs ``action`` while no plan is running: nothing still uses what it takes away."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._between.append((action, done))
        self._wake.set()
        await done

    def num_queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    # ----------------------------------------------------------------- the loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            await self._run_actions()
            self._give_up_gaps()
            ready = [run for queue in self._queues.values() if (run := queue.run_of_ready())]
            metrics.QUEUED_OPERATIONS.set(self.num_queued())
            plan = plan_next(ready, self._unit_tokens)
            if plan is None:
                await self._sleep()
                continue
            models = (run[0].model_id for run in ready)
            if pause_s := self._gathering.pause_s(plan, models, time.monotonic()):
                await self._sleep(pause_s)
                continue
            for operation in plan.operations:
                self._queues[operation.model_id].pop(operation)
            await self._execute(plan)

    async def _run_actions(self) -> None:
        while self._between:
            action, done = self._between[0]
            failure: Exception | None = None
            try:
                await action()
            except Exception as error:
                failure = error
            del self._between[0]
            if done.done():  # whoever asked was cancelled
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    async def _sleep(self, at_most_s: float | None = None) -> None:
        """Until something arrives, a gap is to be given up, or ``at_most_s`` are over."""
        now = time.monotonic()
        deadlines = [since + self._gap_timeout_s for since in self._gap_since_s.values()]
        if at_most_s is not None:
            deadlines.append(now + at_most_s)
        timeout = max(min(deadlines) - now, 0.0) if deadlines else None
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return

    def _give_up_gaps(self) -> None:
        now = time.monotonic()
        for queue in self._queues.values():
            if not queue.has_gap():
                self._gap_since_s.pop(queue.model_id, None)
            elif now - self._gap_since_s.setdefault(queue.model_id, now) >= self._gap_timeout_s:
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
                await self._run_plan(plan)
            self._gathering.ran(plan, now, time.monotonic())
        except BackendDead as error:
            # Windows are spoiled for models of the plan that live on in the engine's successor.
            self._fail(plan.operations, error, plan.kind)
            await self._report_death(str(error))
        except Exception as error:
            # The border of the job: one broken plan must not stop the loop for every tenant.
            log.exception("plan.failed", kind=plan.kind.value)
            internal = BackendError(f"internal error ({type(error).__name__}); see the server log")
            self._fail(plan.operations, internal, plan.kind)

    async def _report_death(self, reason: str) -> None:
        try:
            await self._on_backend_dead(reason)
        except Exception:
            # The border of the job: what could not be written down must not stop the loop.
            log.exception("backend.death_not_handled", reason=reason)

    async def _run_plan(self, plan: Plan) -> None:
        match plan.kind:
            case PlanKind.REFUSE:
                for operation in plan.operations:
                    assert isinstance(operation.work, RefusedWork)
                    self._refuse(operation, operation.work.error)
            case PlanKind.FORWARD | PlanKind.FORWARD_BACKWARD:
                await self._run_train(list(plan.operations), plan.kind)
            case PlanKind.OPTIM_STEP:
                await self._run_optim(plan.operations)
            case PlanKind.CALL:
                await self._run_call(plan.operations[0])

    async def _run_train(self, operations: list[Operation], kind: PlanKind) -> None:
        run = self._backend.forward if kind is PlanKind.FORWARD else self._backend.forward_backward
        while operations:
            try:
                outputs = await run(TrainUnit([_train_op(item) for item in operations]))
            except BackendDead:
                raise
            except UserError as error:
                # One operation is wrong; the unit changed nothing, so the others run without it.
                wrong = operations.pop(error.op_index or 0)
                self._fail([wrong], error, kind)
                continue
            except BackendError as error:
                if len(operations) == 1:
                    self._fail(operations, error, kind)
                    return
                log.warning("unit.retried_one_by_one", num=len(operations), error=str(error))
                for operation in operations:
                    await self._run_train([operation], kind)
                return
            for operation, output in zip(operations, outputs, strict=True):
                metrics.TRAINED_TOKENS.labels(kind.value).inc(operation.num_tokens)
                self._settle(operation, self._encode(output))
            return

    async def _run_optim(self, operations: Sequence[Operation]) -> None:
        params: dict[int, AdamParams] = {}
        stepping: list[tuple[Operation, int]] = []
        for operation in operations:
            assert isinstance(operation.work, OptimWork)
            slot = operation.work.slot()
            queue = self._queues.get(operation.model_id)
            reason = queue.close_window() if queue is not None else None
            if reason is None:
                params[slot] = operation.work.params
                stepping.append((operation, slot))
                continue
            await self._backend.discard_grads(slot)
            error = UserError(
                "no step was taken and the gradients were discarded, because an earlier "
                f"operation of this step failed: {reason}"
            )
            self._settle(operation, failed(error))
        outputs = await self._backend.optim_step(params) if params else {}
        for operation, slot in stepping:
            output = outputs[slot]
            if output.error is not None:
                self._settle(operation, failed(UserError(output.error)))
            else:
                self._settle(operation, self._encode(output))

    async def _run_call(self, operation: Operation) -> None:
        assert isinstance(operation.work, CallWork)
        try:
            result = await operation.work.run()
        except BackendDead:
            raise
        except TinkercloudError as error:
            result = failed(error)
        self._settle(operation, result)

    # ----------------------------------------------------------------- outcomes

    def _refuse(self, operation: Operation, error: TinkercloudError) -> None:
        spoils = operation.kind is FutureKind.FORWARD_BACKWARD
        kind = PlanKind.FORWARD_BACKWARD if spoils else PlanKind.REFUSE
        self._fail([operation], error, kind)

    def _fail(
        self, operations: Sequence[Operation], error: TinkercloudError, kind: PlanKind
    ) -> None:
        for operation in operations:
            queue = self._queues.get(operation.model_id)
            if kind in _SPOILS_WINDOW and queue is not None:
                queue.spoil_window(f"{kind.value} {operation.seq}: {error}")
            self._settle(operation, failed(error))

    def _settle(self, operation: Operation, result: FutureResult) -> None:
        """In the background: the trainer goes on while the outcome is committed."""
        metrics.OPERATIONS.labels(operation.kind.value, result.status.value).inc()
        task = asyncio.create_task(self._settle_future(operation.request_id, result))
        self._settling.add(task)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("future.not_stored", error=str(error))


def _train_op(operation: Operation) -> TrainOp:
    assert isinstance(operation.work, TrainWork)
    return operation.work.op()
