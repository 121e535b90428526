"""An engine without work gives its memory back: once, and not before it is time."""

from __future__ import annotations

from training.engine.idle import IdleMemory

AFTER_S = 20.0


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_released_once_after_each_time_of_work() -> None:
    clock, released = Clock(), []
    memory = IdleMemory(lambda: released.append(clock.now_s), AFTER_S, clock)
    assert memory.tidy(busy=False) is None  # nothing was ever taken
    assert memory.is_released
    for worked_at_s in (200.0, 300.0):
        clock.now_s = worked_at_s
        assert memory.tidy(busy=True) == AFTER_S
        clock.now_s = worked_at_s + 15
        assert memory.tidy(busy=False) == 5.0
        assert not memory.is_released
        clock.now_s = worked_at_s + 20
        assert memory.tidy(busy=False) is None
        assert memory.is_released
        clock.now_s = worked_at_s + 50
        assert memory.tidy(busy=False) is None
    assert released == [220.0, 320.0]


def test_work_begins_the_time_anew() -> None:
    clock, released = Clock(), []
    memory = IdleMemory(lambda: released.append(clock.now_s), AFTER_S, clock)
    for _ in range(5):
        clock.now_s += 15
        memory.tidy(busy=True)
    clock.now_s += 15
    assert memory.tidy(busy=False) == 5.0
    assert released == []
