"""Which rows one sampler step computes: a pure function of the running sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from training.engine.sampler_state import Sequence


class Work(NamedTuple):
    """The next ``num_rows`` rows of a sequence."""

    sequence: Sequence
    num_rows: int


def plan_step(running: Iterable[Sequence], prefill_rows: int) -> list[Work]:
    """Every sequence that misses one row gets it; the others share ``prefill_rows``, first come
    first served. So decoding never waits for a prompt, and a step stays short.

    The result is packed for the model: sequences of one adapter side by side, inside it in the
    order of their cache extents, as attention reads them.
    """
    works: list[Work] = []
    for sequence in sorted(running, key=lambda each: each.order):
        missing = sequence.num_missing
        num_rows = missing if missing <= 1 else min(missing, prefill_rows)
        if num_rows == 0:
            continue
        if missing > 1:
            prefill_rows -= num_rows
        works.append(Work(sequence, num_rows))
    return sorted(works, key=_packing)


def _packing(work: Work) -> tuple[int, bool, int, int]:
    extent = work.sequence.extent
    if extent is None:
        raise RuntimeError("a running sequence has no cache extent")
    return (work.sequence.job.version, work.num_rows > 1, extent.size, extent.start)
