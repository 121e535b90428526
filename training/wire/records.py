"""What a decoded training request is, whichever encoding brought it: nothing is validated yet.

Knows neither losses nor models. Shape legend: N positions, K targets per position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class WireTensor:
    """Numbers as sent. ``values`` is flat, of dtype float32, int64 or int32.

    ``shape`` () means one dimension of as many elements as there are. With ``crow`` and ``col``
    (int64) it is sparse CSR: ``values`` are the listed cells of a dense 2-D ``shape``.
    """

    values: NDArray[Any]
    shape: tuple[int, ...] = ()
    crow: NDArray[np.int64] | None = None
    col: NDArray[np.int64] | None = None


def csr_cells(crow: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row of each listed cell, and its place among the listed cells of that row."""
    rows = np.repeat(np.arange(len(crow) - 1, dtype=np.int64), np.diff(crow))
    return rows, np.arange(len(rows), dtype=np.int64) - crow[rows]


@dataclass(frozen=True, eq=False, slots=True)
class TextChunk:
    """``tokens``: int32 from protobuf, int64 from JSON."""

    tokens: NDArray[Any]


@dataclass(frozen=True, slots=True)
class OtherChunk:
    """An input that is not text (image, audio), known by its wire name alone."""

    kind: str


WireChunk = TextChunk | OtherChunk


@dataclass(frozen=True, eq=False, slots=True)
class WireDatum:
    chunks: Sequence[WireChunk]
    inputs: Mapping[str, WireTensor]


@dataclass(frozen=True, eq=False, slots=True)
class TrainRequest:
    """One forward or forward_backward request."""

    model_id: str
    seq_id: int
    loss_fn: str
    loss_config: Mapping[str, float | str]
    forward_only: bool
    data: Sequence[WireDatum]
