"""Runs one plan on the trainer: outcomes of its operations, and what they do to the windows.

A wrong operation fails alone; the others of its unit are run again without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
from training.core.errors import BackendDead, BackendError, Gone, TinkercloudError, UserError
from training.core.model_queues import ModelQueues
from training.core.operations import Operation, OptimWork, Outcome, RefusedWork, TrainWork
from training.core.planner import PlanKind
from training.core.records import FutureKind, FutureResult, FutureStatus, WindowEffect
from training.core.settling import Settling

log = structlog.get_logger(__name__)

Encode = Callable[[TrainOutput | OptimOutput], FutureResult]
ReplayFailed = Callable[[Operation, TinkercloudError], None]


def failed(error: TinkercloudError, effect: WindowEffect | None = None) -> FutureResult:
    return FutureResult(
        FutureStatus.FAILED, error=str(error), category=error.category, effect=effect
    )


class UnitRunner:
    """``unsettled`` are the operations of the running plan that have no outcome yet."""

    def __init__(
        self,
        backend: TrainerBackend,
        settling: Settling,
        encode: Encode,
        on_replay_failed: ReplayFailed,
    ) -> None:
        self._backend = backend
        self._settling = settling
        self._encode = encode
        self._on_replay_failed = on_replay_failed
        self.unsettled: list[Operation] = []

    async def run(
        self, kind: PlanKind, operations: Sequence[Operation], queues: ModelQueues
    ) -> None:
        """``queues`` are those of the operations' models that have not ended meanwhile."""
        self._queues = queues
        self.unsettled = list(operations)
        if kind is PlanKind.INSTANT:
            for operation in operations:
                if operation.is_passed_over:
                    await self._pass_over(operation)
                    self.unsettled.remove(operation)
                else:
                    self._refused(operation)
            return
        # What came from the database is only now seen to be wrong.
        running = [item for item in operations if not self._refused(item)]
        match kind:
            case PlanKind.FORWARD | PlanKind.FORWARD_BACKWARD:
                await self._run_train(running, kind)
            case PlanKind.OPTIM_STEP:
                await self._run_optim(running)
            case PlanKind.INSTANT | PlanKind.CALL:
                raise AssertionError(f"{kind} does not run in units")

    # ----------------------------------------------------------------- kinds

    async def _run_train(self, operations: list[Operation], kind: PlanKind) -> None:
        run = self._backend.forward if kind is PlanKind.FORWARD else self._backend.forward_backward
        while operations:
            try:
                outputs = await run(TrainUnit([_train_op(item) for item in operations]))
            except BackendDead:
                raise
            except UserError as error:
                # One operation is wrong; the unit changed nothing, so the others run without it.
                self.fail([operations.pop(error.op_index or 0)], error)
                continue
            except BackendError as error:
                if len(operations) == 1:
                    self.fail(operations, error)
                    return
                log.warning("unit.retried_one_by_one", num=len(operations), error=str(error))
                for operation in operations:
                    await self._run_train([operation], kind)
                return
            for operation, output in zip(operations, outputs, strict=True):
                metrics.TRAINED_TOKENS.labels(kind.value).inc(operation.num_tokens)
                queue = self._queues.get(operation.model_id)
                if kind is PlanKind.FORWARD_BACKWARD and queue is not None:
                    queue.progress.accumulated(operation.num_tokens, time.monotonic())
                self._done(operation, self._encode(output))
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
            self._discarded(
                operation,
                "no step was taken and the gradients were discarded, because an earlier "
                f"operation of this step failed: {reason}",
            )
        outputs = await self._backend.optim_step(params) if params else {}
        for operation, slot in stepping:
            output = outputs[slot]
            if output.error is not None:
                self._discarded(operation, output.error)
                continue
            if (queue := self._queues.get(operation.model_id)) is not None:
                queue.progress.stepped(operation.seq, time.monotonic())
            self._done(operation, self._encode(output))

    async def _pass_over(self, operation: Operation) -> None:
        """An operation that was settled and is not run again: what its failure did to the window,
        it does again."""
        assert operation.stored is not None
        outcome = operation.stored.outcome
        queue = self._queues.get(operation.model_id)
        if outcome is None or queue is None:
            return
        if outcome.effect is WindowEffect.SPOILED:
            queue.spoil_window(f"{_name(operation)} {operation.seq}: {outcome.error}")
            queue.progress.accumulated(0, time.monotonic())
        elif outcome.effect is WindowEffect.DISCARDED:
            await self._backend.discard_grads(queue.slot())
            queue.close_window()
            queue.progress.discarded(operation.seq)

    def _refused(self, operation: Operation) -> bool:
        if isinstance(operation.work, RefusedWork):
            self.fail([operation], operation.work.error)
            return True
        return False

    # ----------------------------------------------------------------- outcomes

    def _discarded(self, operation: Operation, reason: str) -> None:
        """A step that was not taken; its window is over."""
        if (queue := self._queues.get(operation.model_id)) is not None:
            queue.progress.discarded(operation.seq)
        self._settle(operation, failed(UserError(reason), WindowEffect.DISCARDED))

    def fail(self, operations: Sequence[Operation], error: TinkercloudError) -> None:
        for operation in operations:
            self._settle(operation, failed(error, self._spoil(operation, error)))

    def _spoil(self, operation: Operation, error: TinkercloudError) -> WindowEffect | None:
        effect = effect_of_failure(operation)
        if effect is None:
            return None
        if (queue := self._queues.get(operation.model_id)) is not None:
            queue.spoil_window(f"{_name(operation)} {operation.seq}: {error}")
            queue.progress.accumulated(0, time.monotonic())
        return effect

    def _done(self, operation: Operation, result: FutureResult) -> None:
        self._settle(operation, result)

    def _settle(self, operation: Operation, result: FutureResult) -> None:
        self.unsettled.remove(operation)
        if not operation.is_settled:
            self._settling.put(operation, Outcome(result))
        elif result.status is FutureStatus.DONE:
            self._settling.compare(operation, result)
        else:
            self._on_replay_failed(operation, BackendError(result.error))


def effect_of_failure(operation: Operation) -> WindowEffect | None:
    """After a pass or a step that broke, nobody knows which gradients the slot holds. A step that
    was refused for its parameters left them as they were."""
    match operation.kind:
        case FutureKind.FORWARD_BACKWARD:
            return WindowEffect.SPOILED
        case FutureKind.OPTIM_STEP if not isinstance(operation.work, RefusedWork):
            return WindowEffect.SPOILED
        case _:
            return None


def came_too_late(operation: Operation) -> FutureResult:
    """The gap it left behind spoiled a window, and must do so again in a replay."""
    error = Gone(f"operation {operation.seq} came after the server stopped waiting for it")
    return failed(error, WindowEffect.SPOILED)


def _name(operation: Operation) -> str:
    """As the user's program calls it."""
    is_step = operation.kind is FutureKind.OPTIM_STEP
    return "optim_step" if is_step else "forward_backward"


def _train_op(operation: Operation) -> TrainOp:
    assert isinstance(operation.work, TrainWork)
    return operation.work.op()
