"""How operations are cut: by a rule of their own, within the budget, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.backends.base import Datum, TrainOp, TrainUnit
from training.engine.packing import equal_length_runs, plan_micro_batches

Lengths = list[list[int]]


def make_unit(lengths: Lengths) -> TrainUnit:
    def datum(length: int) -> Datum:
        return Datum(np.zeros(length, np.int32), np.zeros(length, np.int64), {})

    return TrainUnit(
        [TrainOp(0, "cross_entropy", {}, [datum(length) for length in op]) for op in lengths]
    )


UNITS = st.lists(st.lists(st.integers(1, 30), max_size=8), max_size=5)


@settings(deadline=None)
@given(lengths=UNITS, budget=st.integers(1, 40), join=st.booleans())
def test_every_datum_once_and_within_the_budget(lengths: Lengths, budget: int, join: bool) -> None:
    unit = make_unit(lengths)
    batches = plan_micro_batches(unit, budget, join)
    chunks = [chunk for batch in batches for chunk in batch.chunks]
    places = sorted((chunk.op_index, place) for chunk in chunks for place in chunk.places)
    assert places == [(op, place) for op, data in enumerate(lengths) for place in range(len(data))]
    assert [chunk.op_index for chunk in chunks] == sorted(chunk.op_index for chunk in chunks)
    for batch in batches:
        num_tokens = sum(chunk.num_tokens for chunk in batch.chunks)
        num_data = sum(len(chunk.places) for chunk in batch.chunks)
        assert batch.oversized == (num_tokens > budget)
        assert num_tokens <= budget or num_data == 1
        assert join or len(batch.chunks) == 1


@settings(deadline=None)
@given(lengths=UNITS, budget=st.integers(1, 40), join=st.booleans())
def test_an_operation_is_cut_as_if_it_were_alone(lengths: Lengths, budget: int, join: bool) -> None:
    found: dict[int, list[tuple[tuple[int, ...], bool]]] = {}
    for batch in plan_micro_batches(make_unit(lengths), budget, join):
        for chunk in batch.chunks:
            found.setdefault(chunk.op_index, []).append((chunk.places, chunk.last))
    for op_index, data in enumerate(lengths):
        alone = plan_micro_batches(make_unit([data]), budget, join)
        expected = [(chunk.places, chunk.last) for batch in alone for chunk in batch.chunks]
        assert found.get(op_index, []) == expected
        assert [last for _, last in expected] == [False] * (len(expected) - 1) + [True] * bool(data)


def test_chunks_of_several_operations_are_joined() -> None:
    unit = make_unit([[5, 4], [6], [20], [1], [1]])
    joined = plan_micro_batches(unit, 16, True)
    assert [[chunk.op_index for chunk in batch.chunks] for batch in joined] == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    ("lengths", "runs"), [([], []), ([3], [(3, 1)]), ([3, 3, 5, 3], [(3, 2), (5, 1), (3, 1)])]
)
def test_equal_length_runs(lengths: list[int], runs: list[tuple[int, int]]) -> None:
    assert equal_length_runs(lengths) == runs
