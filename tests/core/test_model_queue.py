"""Order, gaps and gradient windows of one model's queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.builders import operation
from training.core.model_queue import LONGEST_RUN, ModelQueue


@given(st.permutations(range(1, 12)))
def test_whatever_the_order_of_arrival_operations_run_in_sequence(arrival: list[int]) -> None:
    queue = ModelQueue("m", lambda: 0, next_seq=1)
    ran = []
    for seq in arrival:
        assert queue.push(operation(seq=seq))
        while (head := queue.head()) is not None:
            queue.pop(head)
            ran.append(head.seq)
    assert ran == list(range(1, 12))
    assert len(queue) == 0


def test_a_gap_holds_back_what_follows_until_it_is_given_up() -> None:
    queue = ModelQueue("m", lambda: 0, next_seq=1)
    assert not queue.has_gap()
    queue.push(operation(seq=4))
    assert queue.has_gap()
    assert queue.run_of_ready() == []
    assert queue.skip_gap() == range(1, 4)
    assert [item.seq for item in queue.run_of_ready()] == [4]
    assert not queue.has_gap()
    reason = queue.close_window()
    assert reason is not None
    assert "1 to 3 never arrived" in reason
    assert queue.close_window() is None
    assert not queue.push(operation(seq=2))


def test_the_first_reason_for_a_spoiled_window_is_kept() -> None:
    queue = ModelQueue("m", lambda: 0)
    queue.spoil_window("first")
    queue.spoil_window("second")
    assert queue.close_window() == "first"


def test_only_the_head_can_be_taken() -> None:
    queue = ModelQueue("m", lambda: 0, next_seq=1)
    first, second = operation(seq=1), operation(seq=2)
    queue.push(first)
    queue.push(second)
    with pytest.raises(AssertionError):
        queue.pop(second)
    queue.pop(first)
    assert [item.seq for item in queue.drain()] == [2]
    assert len(queue) == 0


def test_a_long_queue_is_looked_at_in_pieces() -> None:
    queue = ModelQueue("m", lambda: 0, next_seq=1)
    for seq in range(1, 2 * LONGEST_RUN):
        queue.push(operation(seq=seq))
    ran = []
    while ready := queue.run_of_ready():
        assert len(ready) <= LONGEST_RUN
        for item in ready:
            queue.pop(item)
            ran.append(item.seq)
    assert ran == list(range(1, 2 * LONGEST_RUN))
