"""Who is blamed when an engine ends: what it was at work on, and nothing that only waited.

With real engine processes, each made to stand still where it is to end.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.backends.conftest import local_config
from tests.backends.ending import at_work, end
from tests.backends.harness import datum, op, request, spec, unit
from tests.backends.test_conformance_saving import slow_disk
from tests.backends.test_local import PROMPT, long_unit, on_uvloop, running, stalling_files
from tests.backends.tiny import CONTEXT_LENGTH, VOCAB_SIZE
from training.backends.base import Datum
from training.backends.death import count_oom_kills
from training.backends.local import LocalBackend
from training.core.errors import BackendDead, DeathCause

NUM_RUNNING = 8  # max_running_sequences of the tests' configuration
NUM_WAITING = 200
BY_KILL = DeathCause.CRASHED if count_oom_kills() is None else DeathCause.KILLED
"""Where nothing tells the kernel's kills from others', each counts as the kernel's."""


def has_no_room(calls: frozenset[int]) -> bool:
    return len(calls) == NUM_RUNNING


def start_samples(backend: LocalBackend, num: int) -> list[asyncio.Task[Any]]:
    """Longer than any test, with no room to run more than ``NUM_RUNNING`` of them at once."""
    return [
        asyncio.create_task(backend.sample(request(PROMPT, max_tokens=CONTEXT_LENGTH)))
        for _ in range(num)
    ]


async def cause(call: Awaitable[Any]) -> DeathCause:
    with pytest.raises(BackendDead) as death:
        await call
    return death.value.cause


async def causes(calls: Iterable[Awaitable[Any]]) -> Counter[DeathCause]:
    return Counter([await cause(call) for call in calls])


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (signal.SIGABRT, DeathCause.CRASHED),
        (signal.SIGKILL, BY_KILL),
        (None, DeathCause.STALLED),
    ],
    ids=["crash", "kill", "stall"],
)
@on_uvloop
async def test_a_training_call_that_ends_the_engine_is_blamed_alone(
    tiny_llama: Path, tmp_path: Path, by: signal.Signals | None, expected: DeathCause
) -> None:
    """While samples run and wait, and a unit waits behind it."""
    stall_timeout_s = 0.5 if by is None else 900.0
    async with running(tiny_llama, local_config(stall_timeout_s=stall_timeout_s)) as backend:
        await backend.load_slot(0, spec())
        samples = start_samples(backend, NUM_RUNNING + NUM_WAITING)
        while not has_no_room(at_work(backend)):  # noqa: ASYNC110  it is only seen from outside
            await asyncio.sleep(0.001)
        with stalling_files(tmp_path / "adapter"):
            culprit = asyncio.create_task(backend.load_slot(1, spec(), tmp_path / "adapter"))
            behind = asyncio.create_task(backend.forward(long_unit()))
            if by is not None:
                await end(backend, {2 + len(samples)}.__eq__, by)
            assert await cause(culprit) is expected
        assert await cause(behind) is DeathCause.BYSTANDER
        assert await causes(samples) == {DeathCause.BYSTANDER: len(samples)}


@on_uvloop
async def test_a_sampler_step_that_ends_the_engine_is_blamed_with_all_it_computes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The requests that have no place yet are not, nor is training that waits for the disk."""
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        with slow_disk(tmp_path / "first"):
            savings = [await backend.save_state(0, tmp_path / str(num)) for num in ("first", 2)]
            saves = asyncio.create_task(backend.save_state(0, tmp_path / "third"))
            trains = asyncio.create_task(backend.forward_backward(long_unit()))
            samples = start_samples(backend, NUM_RUNNING + NUM_WAITING)
            await end(backend, has_no_room)
            ended = await causes(samples)
        assert ended == {DeathCause.CRASHED: NUM_RUNNING, DeathCause.BYSTANDER: NUM_WAITING}
        waited = [saves, trains, *(saving.written() for saving in savings)]
        assert await causes(waited) == {DeathCause.BYSTANDER: 4}


@pytest.mark.parametrize("seed", range(3))
@on_uvloop
async def test_of_training_and_sampling_in_turns_only_one_side_is_blamed(
    tiny_llama: Path, seed: int
) -> None:
    """An engine that ends in the middle of whatever it is doing: both sides have work."""
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        trains = asyncio.create_task(backend.forward_backward(long_unit()))
        samples = start_samples(backend, 3)
        await asyncio.sleep(np.random.default_rng(seed).uniform(0.05, 0.2))
        named = await end(backend, lambda calls: calls and calls <= {2, 3, 4, 5})
        found = {2: await cause(trains)}
        found |= {
            number: await cause(each) for number, each in zip((3, 4, 5), samples, strict=True)
        }
        assert {number for number, each in found.items() if each is DeathCause.CRASHED} == named
        assert named == {2} or named <= {3, 4, 5}


# --------------------------------------------------------------------------- outside of the work


@on_uvloop
async def test_a_call_that_is_being_received_is_blamed(tiny_llama: Path) -> None:
    """As where there is no memory for it; the units before it are, only while they run."""
    rows = np.zeros(40_000_000, np.float32)
    huge = Datum(rows.astype(np.int32), rows.astype(np.int64), {"weights": rows})
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        call = asyncio.create_task(backend.forward(unit(op(0, huge))))
        waits = asyncio.create_task(backend.optim_step({}))
        await end(backend, {2}.__eq__)
        assert await cause(call) is DeathCause.CRASHED
        assert await cause(waits) is DeathCause.BYSTANDER


@on_uvloop
async def test_a_call_that_cannot_be_sent_is_blamed(tiny_llama: Path) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        (sample,) = start_samples(backend, 1)
        wrong = cast(float, (letter for letter in "no pickle holds this"))
        broken = unit(op(0, datum(VOCAB_SIZE, 5, 0), beta=wrong))
        assert await cause(backend.forward(broken)) is DeathCause.CRASHED
        assert await cause(sample) is DeathCause.BYSTANDER


@pytest.mark.parametrize("by", [signal.SIGABRT, signal.SIGKILL])
@on_uvloop
async def test_where_nothing_was_computed_the_state_being_written_is_suspect(
    tiny_llama: Path, tmp_path: Path, by: signal.Signals
) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        with slow_disk(tmp_path / "0"):
            savings = [await backend.save_state(0, tmp_path / num) for num in "01"]
            await end(backend, frozenset().__eq__, by)
            found = [await cause(saving.written()) for saving in savings]
        crashed = by is signal.SIGABRT or BY_KILL is DeathCause.CRASHED
        first = DeathCause.CRASHED if crashed else DeathCause.BYSTANDER
        assert found == [first, DeathCause.BYSTANDER]
