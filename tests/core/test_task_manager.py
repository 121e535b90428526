"""The loop over a real (fake-arithmetic) backend: order, isolation of failures, windows, death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from tests.core.builders import datum, operation, optim_work, train_work
from training.backends.base import (
    AdamParams,
    LoraSpec,
    OptimOutput,
    TrainOp,
    TrainOutput,
    TrainUnit,
)
from training.backends.fake import FakeBackend
from training.config import ModelConfig, TrainingConfig
from training.core.errors import (
    BackendDead,
    Busy,
    DeathCause,
    ErrorCategory,
    Gone,
    InvalidRequest,
    TinkercloudError,
    UnitError,
)
from training.core.keeper import FinishSnapshot, Revival
from training.core.operations import (
    CallWork,
    Finish,
    Operation,
    Outcome,
    RefusedWork,
    StoredWork,
    TrainWork,
    Work,
)
from training.core.progress import SnapshotPolicy
from training.core.records import (
    FutureKind,
    FutureResult,
    FutureStatus,
    StoredOperation,
    WindowEffect,
)
from training.core.task_manager import TaskManager, TaskPolicy


class FlakyBackend(FakeBackend):
    """Fails whole units that hold more than ``max_ops`` operations, as a full device would; dies
    with the next ``deaths`` calls, each time from ``cause``."""

    max_ops = 1000
    deaths = 0
    cause = DeathCause.CRASHED
    fatal_weight: float | None = None
    """Whatever weights its tokens like this kills the engine."""
    fail_step = False

    async def forward_backward(self, unit: TrainUnit) -> list[TrainOutput]:
        fatal = any(
            self.fatal_weight in datum.inputs.get("weights", ())
            for op in unit.ops
            for datum in op.data
        )
        if self.deaths or fatal:
            self.deaths = max(self.deaths - 1, 0)
            self.crash()
            raise BackendDead("the engine is gone", self.cause)
        if len(unit.ops) > self.max_ops:
            raise UnitError("out of memory")
        return await super().forward_backward(unit)

    async def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        if self.fail_step:
            raise UnitError("out of memory")
        return await super().optim_step(params)


SPECS = [LoraSpec(4, seed=slot, train_attn=False, train_mlp=False) for slot in range(2)]


@dataclass
class Harness:
    """A task manager with two models, "m" in slot 0 and "n" in slot 1, and its keeper: brings a
    model back from a fresh adapter and everything that was done since."""

    backend: FlakyBackend
    tasks: TaskManager = field(init=False)
    sent: dict[str, Operation] = field(default_factory=dict)
    settled: dict[str, FutureResult] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    corrupted: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    snapshots: list[tuple[str, int]] = field(default_factory=list)
    revive_errors: list[Exception] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(
        self,
        gap_timeout_s: float = 60.0,
        max_pending: int = 100,
        snapshots: SnapshotPolicy | None = None,
    ) -> None:
        await self.backend.start()
        policy = TaskPolicy(
            unit_tokens=1000,
            turn_tokens=1000,
            gap_timeout_s=gap_timeout_s,
            max_pending_per_model=max_pending,
            snapshots=snapshots or SnapshotPolicy(1000),
        )
        self.tasks = TaskManager(self.backend, self, encode, policy)
        await self.tasks.start()
        for slot, model_id in enumerate("mn"):
            await self.backend.load_slot(slot, SPECS[slot])
            self.tasks.open_model(model_id, partial(int, slot), next_seq=1)
            self.tasks.loaded(model_id, 0, self.backend.health().generation)

    # ----------------------------------------------------------------- the keeper

    async def settle(self, operation: Operation, outcome: Outcome) -> None:
        self.settled[operation.request_id] = outcome.result
        self.order.append(operation.request_id)
        self.changed.set()

    async def revive(self, model_id: str, until: int | None) -> Revival:
        if self.revive_errors:
            raise self.revive_errors.pop()
        slot = "mn".index(model_id)
        await self.backend.load_slot(slot, SPECS[slot])
        generation = self.backend.health().generation
        known = sorted(
            (item for item in self.sent.values() if item.model_id == model_id),
            key=lambda item: item.seq,
        )
        stored = [self._stored(item) for item in known if until is None or item.seq < until]
        return Revival(1, stored, generation)

    def _stored(self, operation: Operation) -> Operation:
        outcome = self.settled.get(operation.request_id)
        deaths = self.deaths.count(operation.request_id)
        digest = None if outcome is None else outcome.digest()
        stored = StoredOperation(
            operation.request_id, operation.kind, operation.seq, 4, deaths, outcome, digest
        )

        async def load() -> Work:
            return operation.work

        return replace(operation, stored=stored, work=StoredWork(load, 4))

    async def fill_gap(self, model_id: str, missing: Sequence[int]) -> Sequence[Operation]:
        placed = []
        for seq in missing:
            error = f"operation {seq} never arrived: the server stopped waiting for it"
            outcome = FutureResult(FutureStatus.FAILED, error=error, effect=WindowEffect.SPOILED)
            kind = FutureKind.FORWARD_BACKWARD
            stored = StoredOperation(f"gap/{seq}", kind, seq, 0, 0, outcome, None)
            work = RefusedWork(Gone(error))
            made = operation(model_id, seq, kind, work, arrived_s=float(seq))
            placed.append(replace(made, request_id=f"gap/{seq}", stored=stored))
        return placed

    async def snapshot(self, model_id: str, seq: int) -> FinishSnapshot:
        self.snapshots.append((model_id, seq))
        self.changed.set()

        async def finish() -> bool:
            return True

        return finish

    def note_running(self, engine: str, request_ids: Sequence[str]) -> None:
        self.noted = list(request_ids)

    async def note_deaths(self, request_ids: Sequence[str]) -> None:
        self.deaths += request_ids

    async def mark_corrupted(self, operation: Operation) -> None:
        self.corrupted.append(operation.request_id)
        self.changed.set()

    async def give_up(self, model_id: str, error: TinkercloudError) -> None:
        self.lost[model_id] = str(error)
        self.tasks.close_model(model_id, error)
        self.changed.set()

    # ----------------------------------------------------------------- clients

    def send(self, model_id: str, seq: int, kind: FutureKind, work: Work) -> None:
        sent = operation(model_id, seq, kind, work, arrived_s=float(seq))
        self.sent[sent.request_id] = sent
        self.tasks.submit(sent)

    def train(self, model_id: str, seq: int, work: Work | None = None) -> None:
        slot = "mn".index(model_id)
        chosen = work if work is not None else train_work(slot=slot)
        self.send(model_id, seq, FutureKind.FORWARD_BACKWARD, chosen)

    def step(self, model_id: str, seq: int) -> None:
        self.send(model_id, seq, FutureKind.OPTIM_STEP, optim_work("mn".index(model_id)))

    async def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            self.changed.clear()
            await self.changed.wait()

    async def result(self, name: str) -> FutureResult:
        await self.until(lambda: name in self.settled)
        return self.settled[name]

    async def loss(self, slot: int) -> float:
        op = TrainOp(slot, "cross_entropy", {}, [datum()])
        return (await self.backend.forward(TrainUnit([op])))[0].metrics["loss:sum"]


def encode(output: TrainOutput | OptimOutput) -> FutureResult:
    return FutureResult(FutureStatus.DONE, repr(dict(output.metrics)).encode())


def not_finite(slot: int = 0) -> TrainWork:
    """Finite inputs whose loss overflows, so that only the backend can notice."""
    data = [datum(weight=3e38), datum(weight=3e38)]
    return TrainWork(
        lambda: slot,
        "importance_sampling",
        {},
        [
            type(item)(
                item.tokens,
                item.targets,
                {
                    "logprobs": item.inputs["weights"] * -1,
                    "advantages": item.inputs["weights"],
                },
            )
            for item in data
        ],
        8,
    )


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    backend = FlakyBackend(ModelConfig(name="test/fake", backend="fake"), TrainingConfig())
    harness = Harness(backend)
    await harness.start()
    yield harness
    await harness.tasks.close()
    await backend.close()


async def test_operations_run_in_sequence_whatever_order_they_come_in(harness: Harness) -> None:
    before = await harness.loss(0)
    for seq in (3, 2, 4, 1):
        harness.step("m", seq) if seq == 4 else harness.train("m", seq)
    await harness.result("m/4")
    assert sorted(harness.order) == ["m/1", "m/2", "m/3", "m/4"]
    assert harness.order[-1] == "m/4"
    assert await harness.loss(0) < before


async def test_a_wrong_operation_fails_alone_and_its_window_with_it(harness: Harness) -> None:
    before = await harness.loss(0)
    harness.train("m", 1)
    harness.train("m", 2, not_finite())
    harness.train("n", 1)
    harness.step("m", 3)
    harness.step("n", 2)
    harness.train("m", 4)
    harness.step("m", 5)
    for name in ("m/1", "n/1", "n/2", "m/4", "m/5"):
        assert (await harness.result(name)).status is FutureStatus.DONE, name
    failure = await harness.result("m/2")
    assert (failure.status, failure.category) == (FutureStatus.FAILED, ErrorCategory.USER)
    step = await harness.result("m/3")
    assert step.status is FutureStatus.FAILED
    assert "forward_backward 2" in step.error
    assert await harness.loss(0) < before


async def test_gradients_of_a_spoiled_window_never_reach_the_weights(harness: Harness) -> None:
    before = await harness.loss(0)
    harness.train("m", 1)
    harness.train("m", 2, RefusedWork(InvalidRequest("empty data")))
    harness.step("m", 3)
    assert "empty data" in (await harness.result("m/3")).error
    assert await harness.loss(0) == before
    harness.step("m", 4)
    assert (await harness.result("m/4")).body == b"{'grad_norm': 0.0}"


async def test_a_refused_forward_spoils_nothing(harness: Harness) -> None:
    harness.train("m", 1)
    harness.send("m", 2, FutureKind.FORWARD, RefusedWork(InvalidRequest("no")))
    harness.step("m", 3)
    assert (await harness.result("m/2")).status is FutureStatus.FAILED
    assert (await harness.result("m/3")).status is FutureStatus.DONE


async def test_a_unit_too_large_is_run_one_by_one(harness: Harness) -> None:
    harness.backend.max_ops = 1
    for seq in (1, 2, 3):
        harness.train("m", seq)
        harness.train("n", seq)
    harness.step("m", 4)
    for name in ("m/1", "m/2", "m/3", "n/3", "m/4"):
        assert (await harness.result(name)).status is FutureStatus.DONE


async def test_a_unit_that_fails_alone_spoils_its_window(harness: Harness) -> None:
    harness.backend.max_ops = 0
    harness.train("m", 1)
    harness.step("m", 2)
    failure = await harness.result("m/1")
    assert (failure.status, failure.category) == (FutureStatus.FAILED, ErrorCategory.SERVER)
    assert "out of memory" in (await harness.result("m/2")).error


async def test_a_missing_operation_is_given_up_and_named() -> None:
    backend = FlakyBackend(ModelConfig(name="test/fake", backend="fake"), TrainingConfig())
    harness = Harness(backend)
    await harness.start(gap_timeout_s=0.05)
    harness.train("m", 2)
    harness.step("m", 3)
    assert (await harness.result("m/2")).status is FutureStatus.DONE
    assert "operation 1 never arrived" in (await harness.result("m/3")).error
    harness.train("m", 1)
    late = await harness.result("m/1")
    assert "stopped waiting" in late.error
    await harness.tasks.close()


async def test_a_call_runs_in_its_place_and_may_fail(harness: Harness) -> None:
    seen: list[float] = []

    async def look() -> Finish:
        seen.append(await harness.loss(0))

        async def finish() -> Outcome:
            return Outcome(FutureResult(FutureStatus.DONE, b"saved"))

        return finish

    async def fail() -> Finish:
        raise Gone("not there")

    async def crash() -> Finish:
        raise ZeroDivisionError

    before = await harness.loss(0)
    harness.train("m", 1)
    harness.step("m", 2)
    harness.send("m", 3, FutureKind.SAVE_WEIGHTS, CallWork(look))
    harness.send("m", 4, FutureKind.SAVE_WEIGHTS, CallWork(fail))
    harness.send("m", 5, FutureKind.SAVE_WEIGHTS, CallWork(crash))
    harness.train("m", 6)
    assert (await harness.result("m/3")).body == b"saved"
    assert seen[0] < before
    assert (await harness.result("m/4")).error == "not there"
    crashed = await harness.result("m/5")
    assert crashed.category is ErrorCategory.SERVER
    assert "ZeroDivisionError" in crashed.error
    assert (await harness.result("m/6")).status is FutureStatus.DONE


async def test_a_full_queue_says_so_before_anything_is_stored(harness: Harness) -> None:
    for seq in range(2, 102):
        harness.train("m", seq)
    with pytest.raises(Busy):
        harness.tasks.check_room("m", 200)
    harness.tasks.check_room("m", 1)
    harness.tasks.check_room("n", 200)


async def test_an_action_between_plans_runs_and_its_error_comes_back(harness: Harness) -> None:
    ran: list[str] = []

    async def act() -> None:
        ran.append("acted")

    async def fail() -> None:
        raise Gone("no")

    await harness.tasks.run_between(act)
    assert ran == ["acted"]
    with pytest.raises(Gone):
        await harness.tasks.run_between(fail)
    harness.train("m", 1)
    assert (await harness.result("m/1")).status is FutureStatus.DONE


def test_operations_are_told_apart() -> None:
    first: Operation = operation()
    assert first.num_tokens == 4
    assert operation(work=optim_work(), kind=FutureKind.OPTIM_STEP).num_tokens == 0


async def test_what_a_caller_no_longer_waits_for_does_not_stop_the_loop(harness: Harness) -> None:
    ran = asyncio.Event()

    async def action() -> None:
        ran.set()

    waiting = asyncio.create_task(harness.tasks.run_between(action))
    await asyncio.sleep(0)
    waiting.cancel()
    harness.train("m", 1)
    assert (await harness.result("m/1")).status is FutureStatus.DONE
    assert ran.is_set()


async def test_a_step_that_did_not_run_leaves_no_gradients_to_the_next_window(
    harness: Harness,
) -> None:
    harness.train("m", 1)
    await harness.result("m/1")
    before = await harness.loss(0)
    harness.backend.fail_step = True
    harness.step("m", 2)
    assert (await harness.result("m/2")).status is FutureStatus.FAILED
    harness.backend.fail_step = False
    harness.step("m", 3)
    refused = await harness.result("m/3")
    assert refused.status is FutureStatus.FAILED
    assert "2" in refused.error
    assert await harness.loss(0) == before
    harness.train("m", 4)
    harness.step("m", 5)
    assert (await harness.result("m/5")).status is FutureStatus.DONE
