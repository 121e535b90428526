"""Which sequences are computed together: operations are cut into chunks, chunks fill micro-batches.

A chunk depends on its own operation alone, and gradients are summed chunk by chunk, so the cut is
the same whoever else is in the unit. Joining chunks in one micro-batch is another matter: a matrix
product rounds differently for another number of rows (measured: oneDNN's bfloat16 kernels below
1024 rows, MKL's fp32 ones below 256), so with torch's products a joined result is not bit for bit
that of the operation alone. Alone, every number is the same function of the operation and the
adapter; so it is, joined or not, where the decoder ``is_batch_invariant``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training.backends.base import Datum, TrainOp, TrainUnit


@dataclass(frozen=True)
class Chunk:
    """Datums of one operation, shortest first; ``last`` of its operation or not.

    ``places`` are their indices in ``TrainOp.data``.
    """

    op_index: int
    places: tuple[int, ...]
    num_tokens: int
    last: bool

    def data(self, unit: TrainUnit) -> list[Datum]:
        data = unit.ops[self.op_index].data
        return [data[place] for place in self.places]


@dataclass(frozen=True)
class MicroBatch:
    """Chunks that share one forward and backward pass; ``oversized``: one datum over the budget."""

    chunks: tuple[Chunk, ...]
    oversized: bool


def plan_micro_batches(unit: TrainUnit, budget_tokens: int, join: bool) -> list[MicroBatch]:
    """Chunks in order of operations: each alone, or joined while they fit the budget."""
    batches: list[MicroBatch] = []
    waiting: list[Chunk] = []
    waiting_tokens = 0
    for chunk in _chunks(unit, budget_tokens):
        if waiting and not (join and waiting_tokens + chunk.num_tokens <= budget_tokens):
            batches.append(MicroBatch(tuple(waiting), waiting_tokens > budget_tokens))
            waiting, waiting_tokens = [], 0
        waiting.append(chunk)
        waiting_tokens += chunk.num_tokens
    if waiting:
        batches.append(MicroBatch(tuple(waiting), waiting_tokens > budget_tokens))
    return batches


def _chunks(unit: TrainUnit, budget_tokens: int) -> Iterator[Chunk]:
    for op_index, op in enumerate(unit.ops):
        groups = _cut(op, budget_tokens)
        for number, places in enumerate(groups):
            shortest_first = sorted(places, key=lambda place: op.data[place].num_tokens)
            num_tokens = sum(op.data[place].num_tokens for place in places)
            yield Chunk(op_index, tuple(shortest_first), num_tokens, number == len(groups) - 1)


def _cut(op: TrainOp, budget_tokens: int) -> list[list[int]]:
    """Places of ``op.data`` in order, in groups of at most the budget (or one datum)."""
    groups: list[list[int]] = []
    room = 0
    for place, datum in enumerate(op.data):
        if not groups or datum.num_tokens > room:
            groups.append([])
            room = budget_tokens
        groups[-1].append(place)
        room -= datum.num_tokens
    return groups


def equal_length_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """[(length, count), ...] of neighbours of one length."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs
