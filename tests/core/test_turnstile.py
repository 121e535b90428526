"""Few in each turn of the loop, in order, and whoever leaves the line takes no place."""

from __future__ import annotations

import asyncio

import pytest

from training.core.turnstile import Turnstile

PER_TURN = 3


async def turns_of(callers: list[asyncio.Task[None]]) -> list[int]:
    """In how many turns of the loop so many had passed."""
    passed = []
    while not all(caller.done() for caller in callers):
        await asyncio.sleep(0)
        passed.append(sum(caller.done() for caller in callers))
    return passed


@pytest.mark.parametrize("number", [1, PER_TURN, 10, 100])
async def test_few_pass_in_each_turn_and_all_in_the_end(number: int) -> None:
    turnstile = Turnstile(PER_TURN)
    callers = [asyncio.create_task(turnstile.enter("me")) for _ in range(number)]
    passed = await turns_of(callers)
    steps = [after - before for before, after in zip([0, *passed], passed, strict=False)]
    assert max(steps) <= PER_TURN
    assert len(passed) <= number // PER_TURN + 4


async def test_first_come_first_served_and_those_who_leave_are_passed_over() -> None:
    turnstile = Turnstile(PER_TURN)
    order: list[int] = []

    async def caller(number: int) -> None:
        await turnstile.enter("me")
        order.append(number)

    callers = [asyncio.create_task(caller(number)) for number in range(20)]
    await asyncio.sleep(0)
    for leaving in (5, 6, 7, 19):
        callers[leaving].cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert order == [number for number in range(20) if number not in (5, 6, 7, 19)]


async def test_nobody_waits_at_an_idle_one() -> None:
    turnstile = Turnstile(PER_TURN)
    for _ in range(5):
        entering = asyncio.create_task(turnstile.enter("me"))
        await asyncio.sleep(0)
        assert entering.done()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_a_long_line_of_one_owner_does_not_hold_up_another() -> None:
    turnstile = Turnstile(PER_TURN)
    order: list[str] = []

    async def caller(owner: str) -> None:
        await turnstile.enter(owner)
        order.append(owner)

    callers = [asyncio.create_task(caller("greedy")) for _ in range(100)]
    callers += [asyncio.create_task(caller(owner)) for owner in ("b", "c", "b", "c", "b", "c")]
    await asyncio.gather(*callers)
    assert order.index("c") <= 2 * PER_TURN
    assert sum(owner != "greedy" for owner in order[: 4 * PER_TURN]) == 6
