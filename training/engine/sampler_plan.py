"""Which rows one sampler step computes: a pure function of the running sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from training.engine.sampler_state import Sequence


class Work(NamedTuple):
    """The next ``num_rows`` rows of a sequence."""

    sequence: Sequence
    num_rows: int


def plan_step(
    running: Iterable[Sequence], prefill_rows: int, max_rows: int | None = None
) -> list[Work]:
    """Every sequence that misses one row gets it; the others share ``prefill_rows``, first come
    first served; all together at most ``max_rows``. So decoding never waits for a prompt, and a
    step stays short.

    The result is packed for the model: sequences of one adapter side by side, inside it in the
    order of their cache extents, as attention reads them.
    """
    ordered = sorted(running, key=lambda each: each.order)
    works = [Work(sequence, 1) for sequence in ordered if sequence.num_missing == 1]
    if max_rows is not None:
        works = works[:max_rows]
        prefill_rows = min(prefill_rows, max_rows - len(works))
    for sequence in ordered:
        num_rows = min(sequence.num_missing, prefill_rows)
        if sequence.num_missing > 1 and num_rows > 0:
            works.append(Work(sequence, num_rows))
            prefill_rows -= num_rows
    return sorted(works, key=_packing)


def _packing(work: Work) -> tuple[int, bool, int, int]:
    extent = work.sequence.extent
    if extent is None:
        raise RuntimeError("a running sequence has no cache extent")
    return (work.sequence.job.version, work.num_rows > 1, extent.size, extent.start)
