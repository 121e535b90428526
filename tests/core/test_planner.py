"""What runs next: order, sharing, budgets, fairness."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tests.core.builders import operation, optim_work, train_work
from training.core.errors import InvalidRequest
from training.core.operations import CallWork, Finish, Operation, RefusedWork
from training.core.planner import Plan, PlanKind, plan_kind, plan_next
from training.core.records import FutureKind


async def _nothing() -> Finish:
    raise AssertionError("a plan runs nothing")


def train(model: str, seq: int, tokens: int, arrived_s: float = 0.0) -> Operation:
    return operation(model, seq, work=train_work(tokens), arrived_s=arrived_s)


def forward(model: str, seq: int, arrived_s: float = 0.0) -> Operation:
    return operation(model, seq, FutureKind.FORWARD, train_work(), arrived_s)


def optim(model: str, seq: int, arrived_s: float = 0.0) -> Operation:
    return operation(model, seq, FutureKind.OPTIM_STEP, optim_work(), arrived_s)


def names(plan: Plan | None) -> list[str]:
    assert plan is not None
    return [item.request_id for item in plan.operations]


def test_nothing_ready_plans_nothing() -> None:
    assert plan_next([], 100) is None


def test_models_share_a_unit_and_chunks_of_one_model_stay_in_order() -> None:
    plan = plan_next(
        [[train("a", 1, 10), train("a", 2, 10), optim("a", 3)], [train("b", 1, 10, 1.0)]], 100
    )
    assert plan is not None
    assert plan.kind is PlanKind.FORWARD_BACKWARD
    assert names(plan) == ["a/1", "b/1", "a/2"]


def test_forward_and_forward_backward_do_not_mix() -> None:
    plan = plan_next([[forward("a", 1), train("a", 2, 1)], [train("b", 1, 1, 1.0)]], 100)
    assert plan is not None
    assert plan.kind is PlanKind.FORWARD
    assert names(plan) == ["a/1"]


def test_the_token_budget_bounds_a_unit_but_never_blocks_a_large_operation() -> None:
    ready = [[train("a", 1, 500)], [train("b", 1, 60, 1.0)], [train("c", 1, 60, 2.0)]]
    assert names(plan_next(ready, 100)) == ["a/1"]
    assert names(plan_next(ready[1:], 100)) == ["b/1"]
    assert names(plan_next(ready[1:], 120)) == ["b/1", "c/1"]


def test_a_long_queue_does_not_crowd_out_a_short_one() -> None:
    greedy = [train("greedy", seq, 40) for seq in range(1, 50)]
    plan = plan_next([greedy, [train("small", 1, 40, arrived_s=9.0)]], 100)
    assert names(plan) == ["greedy/1", "small/1"]


def test_steps_of_all_models_go_in_one_call() -> None:
    plan = plan_next([[optim("a", 1)], [optim("b", 1, 1.0)], [train("c", 1, 5, 2.0)]], 100)
    assert plan is not None
    assert plan.kind is PlanKind.OPTIM_STEP
    assert names(plan) == ["a/1", "b/1"]


def test_the_oldest_operation_decides_what_kind_of_work_comes_next() -> None:
    call = operation("c", 1, FutureKind.SAVE_WEIGHTS, CallWork(_nothing), arrived_s=0.5)
    ready = [[optim("a", 1, 1.0)], [train("b", 1, 5, 2.0)], [call]]
    plan = plan_next(ready, 100)
    assert plan is not None
    assert plan.kind is PlanKind.CALL
    assert names(plan) == ["c/1"]


def test_refusals_go_first() -> None:
    refused = operation("a", 1, work=RefusedWork(InvalidRequest("no")), arrived_s=9.0)
    plan = plan_next([[train("b", 1, 5)], [refused]], 100)
    assert plan is not None
    assert plan.kind is PlanKind.INSTANT
    assert names(plan) == ["a/1"]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("tfo"), st.integers(1, 60)), min_size=1, max_size=6),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 100),
)
def test_every_plan_is_a_run_of_heads_of_one_kind_within_the_budget(
    shape: Sequence[Sequence[tuple[str, int]]], budget: int
) -> None:
    ready: list[list[Operation]] = []
    for number, letters in enumerate(shape):
        items: list[Operation] = []
        for seq, (letter, tokens) in enumerate(letters, 1):
            match letter:
                case "t":
                    items.append(train(f"m{number}", seq, tokens))
                case "f":
                    items.append(forward(f"m{number}", seq))
                case _:
                    items.append(optim(f"m{number}", seq))
        ready.append(items)
    plan = plan_next(ready, budget)
    assert plan is not None
    assert {plan_kind(item) for item in plan.operations} == {plan.kind}
    for run in ready:
        taken = [item for item in plan.operations if item.model_id == run[0].model_id]
        assert taken == run[: len(taken)]
    if len(plan.operations) > 1 and plan.kind is not PlanKind.OPTIM_STEP:
        assert sum(item.num_tokens for item in plan.operations) <= budget
