"""Units wait a moment for models that are about to come back."""

from __future__ import annotations

import pytest

from tests.core.builders import operation, optim_work, train_work
from training.core.gathering import MAX_PAUSE_S, MAX_SHARE, Gathering
from training.core.planner import Plan, PlanKind

UNIT_S = 0.6
TOKENS = 8
"""Of each operation."""


def plan(*models: str, arrived_s: float = 0.0, kind: PlanKind = PlanKind.FORWARD_BACKWARD) -> Plan:
    work = optim_work() if kind is PlanKind.OPTIM_STEP else train_work(TOKENS)
    return Plan(kind, [operation(model, work=work, arrived_s=arrived_s) for model in models])


def returned(gathering: Gathering, after_s: dict[str, float], ended_s: float = 10.0) -> None:
    """One unit of all these models, after which they came back so late; and one more just like it,
    which ends at ``ended_s``."""
    before_s = ended_s - 2 * UNIT_S - max(after_s.values())
    gathering.ran(plan(*after_s), before_s - UNIT_S, before_s)
    for model_id, late_s in after_s.items():
        gathering.arrived(model_id, before_s + late_s)
    gathering.ran(plan(*after_s), ended_s - UNIT_S, ended_s)


@pytest.fixture
def gathering() -> Gathering:
    """After a unit of a, b and c that ended at 10; they come back after 10, 20 and 30 ms."""
    made = Gathering()
    returned(made, {"a": 0.01, "b": 0.02, "c": 0.03})
    return made


def test_who_comes_back_in_a_moment_is_waited_for(gathering: Gathering) -> None:
    first = plan("a", arrived_s=10.01)
    deadline_s = 10.01 + MAX_SHARE * UNIT_S
    assert gathering.pause_s(first, ["a"], 10.01) == pytest.approx(deadline_s - 10.01)
    assert gathering.pause_s(first, ["a", "b"], 10.02) == pytest.approx(deadline_s - 10.02)
    assert gathering.pause_s(first, ["a", "b", "c"], 10.03) == 0


def test_patience_ends_with_a_share_of_the_unit(gathering: Gathering) -> None:
    late_s = 10.01 + MAX_SHARE * UNIT_S
    assert gathering.pause_s(plan("a", arrived_s=10.01), ["a"], late_s) == 0


def test_halves_out_of_step_find_together(gathering: Gathering) -> None:
    """d has waited for the unit of the others to end, longer than any patience."""
    waiting = plan("d", arrived_s=9.5)
    assert gathering.pause_s(waiting, ["d"], 10.0) > 0.03
    assert gathering.pause_s(waiting, ["a", "b", "c", "d"], 10.03) == 0


@pytest.mark.parametrize("late_s", [0.2, 5.0])
def test_who_takes_long_is_not_waited_for(late_s: float) -> None:
    gathering = Gathering()
    returned(gathering, {"a": 0.01, "slow": late_s})
    assert gathering.pause_s(plan("a", arrived_s=10.01), ["a"], 10.01) == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.005, 30.0])
def test_who_left_together_comes_back_together(gathering: Gathering, pause_s: float) -> None:
    """After a pause of all, and in the step after it."""
    now_s = 10.0 + pause_s
    gathering.arrived("a", now_s + 0.01)
    first = plan("a", arrived_s=now_s + 0.01)
    assert gathering.pause_s(first, ["a"], now_s + 0.01) > 0.02
    gathering.arrived("b", now_s + 0.02)
    gathering.arrived("c", now_s + 0.03)
    ended_s = now_s + 0.03 + UNIT_S
    gathering.ran(plan("a", "b", "c"), now_s + 0.03, ended_s)
    gathering.arrived("a", ended_s + 0.01)
    first = plan("a", arrived_s=ended_s + 0.01)
    assert gathering.pause_s(first, ["a"], ended_s + 0.01) > 0.02


def test_each_may_have_a_pace_of_its_own() -> None:
    gathering = Gathering()
    returned(gathering, {"slow": 3.0, "fast": 1.0})
    gathering.arrived("fast", 11.0)
    assert gathering.pause_s(plan("fast", arrived_s=11.0), ["fast"], 11.0) == 0
    gathering.ran(plan("fast", arrived_s=11.0), 11.0, 11.6)
    gathering.arrived("fast", 12.6)
    assert gathering.pause_s(plan("fast", arrived_s=12.6), ["fast"], 12.6) == 0


def test_who_does_not_come_costs_one_wait(gathering: Gathering) -> None:
    assert gathering.pause_s(plan("a", arrived_s=10.01), ["a"], 10.01) > 0
    gathering.ran(plan("a", arrived_s=10.01), 10.1, 10.4)
    assert gathering.pause_s(plan("a", arrived_s=10.41), ["a"], 10.41) == 0


def test_a_model_that_is_gone_is_forgotten(gathering: Gathering) -> None:
    gathering.forget("b")
    gathering.forget("c")
    assert gathering.pause_s(plan("a", arrived_s=10.01), ["a"], 10.01) == 0


def test_an_optimizer_step_is_where_a_model_comes_back_from(gathering: Gathering) -> None:
    for model_id in "abc":
        gathering.arrived(model_id, 10.0)
    gathering.ran(plan("a", "b", "c", kind=PlanKind.OPTIM_STEP), 10.0, 12.0)
    assert gathering.pause_s(plan("a", arrived_s=12.01), ["a"], 12.01) > 0


def test_a_unit_waits_as_long_as_all_who_come_are_worth() -> None:
    """However short the last unit was, and though the first of them alone would be too late."""
    gathering = Gathering()
    returned(gathering, {"m0": 0.0} | {f"m{number}": 0.03 for number in range(1, 8)})
    gathering.ran(plan("short"), 9.9, 9.9 + UNIT_S / 8)
    gathering.forget("short")
    pause_s = gathering.pause_s(plan("m0", arrived_s=10.0), ["m0"], 10.0)
    assert pause_s == pytest.approx(MAX_SHARE * UNIT_S)
    for number in range(3, 8):
        gathering.forget(f"m{number}")
    assert gathering.pause_s(plan("m0", arrived_s=10.0), ["m0"], 10.0) == 0


def test_nobody_waits_long_for_long_units() -> None:
    gathering = Gathering()
    gathering.ran(plan("a", "b"), 0.0, 100.0)
    assert gathering.pause_s(plan("a", arrived_s=100.0), ["a"], 100.0) == pytest.approx(MAX_PAUSE_S)


def test_one_model_alone_and_other_kinds_never_wait(gathering: Gathering) -> None:
    assert Gathering().pause_s(plan("a"), ["a"], 0.0) == 0
    forward = plan("a", arrived_s=10.01, kind=PlanKind.FORWARD)
    assert gathering.pause_s(forward, ["a"], 10.01) == 0
    gathering.ran(plan("a", "b", kind=PlanKind.OPTIM_STEP), 10.0, 12.0)
    step = plan("a", arrived_s=12.0, kind=PlanKind.OPTIM_STEP)
    assert gathering.pause_s(step, ["a"], 12.0) == 0
