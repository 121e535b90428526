"""The watchdog's counting; that it ends a real engine is shown in ``tests/backends/test_local``."""

from __future__ import annotations

from collections.abc import Sequence

from training.engine.watchdog import LONGEST_TICK_S, TICKS, Watchdog


def ticks_until_the_end(pieces: Sequence[int | None]) -> int | None:
    """How many ticks it takes, each seeing the next of ``pieces``; None if they end first."""
    rest = iter(pieces)
    watchdog = Watchdog(lambda: next(rest), timeout_s=1.0)
    for num in range(len(pieces)):
        if watchdog.tick():
            return num
    return None


def test_one_piece_of_work_has_its_time_and_no_more() -> None:
    assert ticks_until_the_end([7] * 100) == TICKS
    assert ticks_until_the_end([1] * TICKS + [2] * TICKS) is None
    assert ticks_until_the_end([1] * TICKS + [2] * 100) == 2 * TICKS


def test_waiting_for_work_is_no_work() -> None:
    assert ticks_until_the_end([None] * 1000) is None
    assert ticks_until_the_end([3] * TICKS + [None] + [3] * TICKS) is None


def test_a_long_timeout_is_looked_at_often_enough_and_not_too_often() -> None:
    assert Watchdog(lambda: None, 900.0).tick_s == LONGEST_TICK_S
    assert Watchdog(lambda: None, 1.0).tick_s == 1.0 / TICKS
