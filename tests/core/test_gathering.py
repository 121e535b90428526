"""Units wait for their usual company, a little."""

from __future__ import annotations

import pytest

from tests.core.builders import operation, train_work
from training.core.gathering import MAX_SHARE, MEMORY_UNITS, Gathering
from training.core.planner import Plan, PlanKind

UNIT_S = 2.0
PATIENCE_S = MAX_SHARE * UNIT_S


def plan(*models: str, arrived_s: float = 0.0, kind: PlanKind = PlanKind.FORWARD_BACKWARD) -> Plan:
    return Plan(
        kind, [operation(model, 0, work=train_work(8), arrived_s=arrived_s) for model in models]
    )


@pytest.fixture
def gathering() -> Gathering:
    """After a unit of a, b and c that ended at 10."""
    made = Gathering()
    made.ran(plan("a", "b", "c"), 10 - UNIT_S, 10.0)
    return made


def test_who_is_missing_is_waited_for(gathering: Gathering) -> None:
    first = plan("a", arrived_s=10.5)
    assert gathering.pause_s(first, ["a"], 10.5) == pytest.approx(PATIENCE_S)
    assert gathering.pause_s(first, ["a", "b"], 10.54) == pytest.approx(PATIENCE_S - 0.04)
    assert gathering.pause_s(first, ["a", "b", "c"], 10.55) == 0


def test_patience_ends_with_a_share_of_the_last_unit(gathering: Gathering) -> None:
    assert gathering.pause_s(plan("a", arrived_s=10.5), ["a"], 10.5 + PATIENCE_S) == 0
    assert gathering.pause_s(plan("a", arrived_s=9.0), ["a"], 10.0) == 0  # it waited for the engine


def test_who_stays_away_is_forgotten(gathering: Gathering) -> None:
    later = 10.0 + MEMORY_UNITS * UNIT_S + 0.01
    assert gathering.pause_s(plan("a", arrived_s=later), ["a"], later) == 0
    gathering.forget("b")
    gathering.forget("c")
    assert gathering.pause_s(plan("a", arrived_s=10.5), ["a"], 10.5) == 0


def test_one_model_alone_and_other_kinds_never_wait(gathering: Gathering) -> None:
    assert Gathering().pause_s(plan("a"), ["a"], 0.0) == 0
    forward = plan("a", arrived_s=10.5, kind=PlanKind.FORWARD)
    assert gathering.pause_s(forward, ["a"], 10.5) == 0
    gathering.ran(plan("a", "b", kind=PlanKind.OPTIM_STEP), 10.0, 12.0)
    step = plan("a", arrived_s=12.0, kind=PlanKind.OPTIM_STEP)
    assert gathering.pause_s(step, ["a"], 12.0) == 0
