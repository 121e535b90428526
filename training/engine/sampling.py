"""Drawing tokens from logits: what the sampler asks, whoever computes it. Rows are independent.

Shape legend: R rows, V vocab, U draws of a row, K targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from training.backends.base import Float32Array, Int32Array, Int64Array, TopK

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]


class Cut(NamedTuple):
    """How one row's distribution is cut: ``temperature`` 0 takes the most probable token,
    ``top_k`` -1 and ``top_p`` 1.0 keep everything. top_p applies to what top_k kept; equal
    probabilities are ordered by token id."""

    temperature: float
    top_k: int
    top_p: float


class Cuts(NamedTuple):
    """Those of R rows, each [R]."""

    temperatures: Float32Array
    top_ks: Int32Array
    top_ps: Float32Array

    @classmethod
    def of(cls, cuts: Sequence[Cut]) -> Cuts:
        temperatures, top_ks, top_ps = zip(*cuts, strict=True)
        return cls(
            np.array(temperatures, np.float32),
            np.array(top_ks, np.int32),
            np.array(top_ps, np.float32),
        )

    def rows(self, index: slice | BoolArray) -> Cuts:
        return Cuts(self.temperatures[index], self.top_ks[index], self.top_ps[index])


class Drawn(NamedTuple):
    """``tokens`` int32 and their ``logprobs`` float32 in the distribution at the row's temperature
    (the unscaled one where that is 0), before top_k and top_p cut it."""

    tokens: Int32Array
    logprobs: Float32Array


class Vocabulary(Protocol):
    """All over fp32 ``logits_RV``. A row with NaN gives valid ids and logprobs of NaN."""

    def sample(self, logits_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> Drawn:
        """One token of each row; ``uniforms_R`` are in [0, 1)."""

    def draw(self, logits_RV: torch.Tensor, temperature: float, uniforms_RU: Float64Array) -> Drawn:
        """[R, U] tokens of the uncut distribution."""

    def top(self, logits_RV: torch.Tensor, temperatures_R: Float32Array, k: int) -> TopK:
        """The ``k`` most probable tokens of each row, best first."""

    def logprobs(self, logits_RV: torch.Tensor, targets_RK: Int64Array) -> Float32Array:
        """[R, K], unscaled."""
