"""What the task manager does when engines die: models come back, nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.core.builders import train_work
from tests.core.test_task_manager import FlakyBackend, Harness
from training.config import ModelConfig, TrainingConfig
from training.core.errors import DeathCause, InvalidRequest, ModelLost, StorageError
from training.core.operations import RefusedWork
from training.core.progress import SnapshotPolicy
from training.core.records import FutureKind, FutureStatus


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    backend = FlakyBackend(ModelConfig(name="test/fake", backend="fake"), TrainingConfig())
    harness = Harness(backend)
    await harness.start()
    yield harness
    await harness.tasks.close()
    await backend.close()


async def train_some(harness: Harness, first: int, num_steps: int) -> int:
    """Steps of two passes each; returns the next free sequence number."""
    for seq in range(first, first + 3 * num_steps, 3):
        harness.train("m", seq)
        harness.train("m", seq + 1)
        harness.step("m", seq + 2)
    last = first + 3 * num_steps - 1
    await harness.result(f"m/{last}")
    return last + 1


@pytest.mark.parametrize("num_steps_before", [0, 1, 3])
async def test_after_a_crash_a_model_goes_on_as_if_nothing_had_been(
    harness: Harness, num_steps_before: int
) -> None:
    undisturbed = Harness(
        FlakyBackend(ModelConfig(name="test/fake", backend="fake"), TrainingConfig())
    )
    await undisturbed.start()
    seq = await train_some(harness, 1, num_steps_before) if num_steps_before else 1
    harness.backend.deaths = 1
    await train_some(harness, seq, 2)
    await train_some(undisturbed, 1, num_steps_before + 2)
    assert await harness.loss(0) == await undisturbed.loss(0)
    assert {name: item.body for name, item in harness.settled.items()} == {
        name: item.body for name, item in undisturbed.settled.items()
    }
    assert len(harness.order) == len(set(harness.order)), "no operation was answered twice"
    assert not harness.corrupted
    await undisturbed.tasks.close()


async def test_a_crash_in_the_middle_of_a_window_loses_no_gradient(harness: Harness) -> None:
    before = await harness.loss(0)
    harness.train("m", 1)
    await harness.result("m/1")
    harness.backend.crash()
    harness.step("m", 2)
    first = await harness.result("m/2")
    assert b"'grad_norm': 0.0" not in first.body
    assert await harness.loss(0) < before


async def test_a_model_that_did_nothing_comes_back_when_it_is_asked(harness: Harness) -> None:
    await train_some(harness, 1, 1)
    harness.train("n", 1)
    await harness.result("n/1")
    harness.backend.crash()
    harness.step("n", 2)
    assert (await harness.result("n/2")).status is FutureStatus.DONE
    with pytest.raises(Exception, match="load it again"):
        await harness.loss(0)  # "m" has no work: nobody brought it back
    await train_some(harness, 4, 1)
    assert not harness.corrupted


async def test_failed_operations_are_not_run_again_but_count_again(harness: Harness) -> None:
    harness.train("m", 1)
    harness.train("m", 2, RefusedWork(InvalidRequest("empty data")))
    await harness.result("m/2")
    harness.backend.crash()
    harness.step("m", 3)
    assert "empty data" in (await harness.result("m/3")).error
    harness.backend.crash()
    harness.step("m", 4)
    assert (await harness.result("m/4")).body == b"{'grad_norm': 0.0}"


async def test_an_operation_that_crashes_two_engines_is_failed_and_its_neighbour_is_not(
    harness: Harness,
) -> None:
    harness.backend.fatal_weight = 13.0
    harness.train("n", 1)
    harness.train("m", 1, train_work(weight=13.0))
    harness.step("n", 2)
    harness.step("m", 2)
    poison = await harness.result("m/1")
    assert poison.status is FutureStatus.FAILED
    assert "not tried again" in poison.error
    assert "not tried again" in (await harness.result("m/2")).error
    assert (await harness.result("n/1")).status is FutureStatus.DONE
    assert (await harness.result("n/2")).status is FutureStatus.DONE
    assert harness.deaths.count("m/1") == 2
    assert harness.deaths.count("n/1") <= 1
    await train_some(harness, 3, 1)


async def test_an_engine_that_somebody_killed_is_not_held_against_its_work(
    harness: Harness,
) -> None:
    harness.backend.cause = DeathCause.KILLED
    harness.backend.deaths = 5
    harness.train("m", 1)
    assert (await harness.result("m/1")).status is FutureStatus.DONE


async def test_what_only_waited_in_engines_that_end_is_never_held_against_it(
    harness: Harness,
) -> None:
    harness.backend.cause = DeathCause.BYSTANDER
    harness.backend.deaths = 50
    harness.train("m", 1)
    assert (await harness.result("m/1")).status is FutureStatus.DONE
    assert harness.backend.deaths == 0
    assert not harness.deaths


async def test_but_it_is_not_tried_for_ever(harness: Harness) -> None:
    harness.backend.cause = DeathCause.KILLED
    harness.backend.deaths = 1000
    harness.train("m", 1)
    assert "20 engines were killed" in (await harness.result("m/1")).error
    harness.backend.deaths = 0
    await train_some(harness, 2, 1)


async def test_a_result_that_differs_marks_the_model(harness: Harness) -> None:
    await train_some(harness, 1, 1)
    told = harness.settled["m/1"]
    harness.settled["m/1"] = replace(told, body=told.body + b" ")
    harness.backend.crash()
    harness.train("m", 4)
    await harness.result("m/4")
    await harness.until(lambda: bool(harness.corrupted))
    assert harness.corrupted == ["m/1"]
    assert harness.settled["m/1"].body.endswith(b" "), "what the client got stays"


async def test_a_model_whose_past_cannot_be_repeated_is_lost_and_says_so(harness: Harness) -> None:
    await train_some(harness, 1, 1)
    harness.backend.max_ops = 0
    harness.backend.crash()
    harness.train("m", 4)
    await harness.until(lambda: "m" in harness.lost)
    assert "cannot be run again" in harness.lost["m"]
    assert "out of memory" in (await harness.result("m/4")).error


async def test_trouble_with_the_database_while_a_model_comes_back_loses_nothing(
    harness: Harness,
) -> None:
    await train_some(harness, 1, 1)
    harness.revive_errors = [StorageError("the database is away"), OSError("so is the disk")]
    harness.backend.crash()
    harness.train("m", 4)
    assert (await harness.result("m/4")).status is FutureStatus.DONE
    assert harness.revive_errors == []
    assert not harness.lost


async def test_a_model_that_nothing_can_bring_back_ends(harness: Harness) -> None:
    await train_some(harness, 1, 1)
    harness.revive_errors = [ModelLost("no snapshot")]
    harness.backend.crash()
    harness.train("m", 4)
    assert (await harness.result("m/4")).error == "no snapshot"


async def test_a_model_is_saved_every_few_steps_and_when_it_rests() -> None:
    backend = FlakyBackend(ModelConfig(name="test/fake", backend="fake"), TrainingConfig())
    harness = Harness(backend)
    policy = SnapshotPolicy(steps=2, pause_s=0.0, idle_s=0.05, share=1.0)
    await harness.start(snapshots=policy)
    for seq in range(1, 15, 2):
        harness.train("m", seq)
        harness.step("m", seq + 1)
        await harness.result(f"m/{seq + 1}")
    await harness.until(lambda: harness.snapshots[-1:] == [("m", 14)])
    assert len(harness.snapshots) >= 3
    assert all(seq % 2 == 0 for _, seq in harness.snapshots), "only where nothing is accumulated"
    harness.train("m", 15)
    await harness.result("m/15")
    taken = len(harness.snapshots)
    await asyncio.sleep(0.2)
    assert len(harness.snapshots) == taken, "gradients are no part of a snapshot"
    await harness.tasks.close()


async def test_a_forward_between_the_passes_changes_nothing_of_a_replay(harness: Harness) -> None:
    harness.train("m", 1)
    harness.send("m", 2, FutureKind.FORWARD, train_work())
    harness.train("m", 3)
    await harness.result("m/3")
    harness.backend.crash()
    harness.step("m", 4)
    assert (await harness.result("m/4")).status is FutureStatus.DONE
    assert len(harness.order) == 4
    assert not harness.corrupted
