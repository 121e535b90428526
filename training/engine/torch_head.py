"""Rows through the head by torch operations: logprobs of targets, and the gradient they send back.

The logits of at most ``HEAD_ROWS`` rows exist at once, in the compute dtype; fp32 ones only for
``BLOCK_ROWS`` rows, which stay in the processor's cache. No autograd history is kept.

Shape legend: R rows, H hidden, V vocab, K targets of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from training.backends.base import Float32Array, Int32Array
from training.engine.adapter import Segment

HEAD_ROWS = 512
BLOCK_ROWS = 16


class HeadProduct(Protocol):
    """The head and the unembed adapter of one segment, which covers all rows given."""

    def head_logits(self, hidden_RH: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Logits [R, V] in the compute dtype, which the caller may overwrite."""

    def head_backward(
        self, hidden_RH: torch.Tensor, dlogits_RV: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Returns d loss / d hidden [R, H]; adds the unembed adapter's gradient to the sink."""


class TorchHeadPass:
    """``decoder.HeadPass``. ``segment`` covers rows [0, R).

    ``keep`` holds the logits for the backward pass, where they are no more than ``HEAD_ROWS`` rows;
    without it they are computed again there.
    """

    @torch.no_grad()
    def __init__(
        self,
        product: HeadProduct,
        hidden_RH: torch.Tensor,
        targets_RK: Int32Array,
        segment: Segment,
        keep: bool,
    ) -> None:
        self._product = product
        self._hidden_RH = hidden_RH
        self._segment = segment
        # Copied: the array may be a read-only view, which torch does not take.
        self._targets_RK = torch.tensor(targets_RK, device=hidden_RH.device, dtype=torch.int64)
        self._kept_RV: torch.Tensor | None = None
        lse_parts, logprob_parts = [], []
        for start, stop in _spans(len(hidden_RH), HEAD_ROWS):
            logits_RV = self._logits(hidden_RH[start:stop])
            lse, logprobs = _logprobs(logits_RV, self._targets_RK[start:stop])
            lse_parts.append(lse)
            logprob_parts.append(logprobs)
            if keep and len(hidden_RH) <= HEAD_ROWS:
                self._kept_RV = logits_RV
        self._lse_R = torch.cat(lse_parts)
        self._logprobs_RK: Float32Array = torch.cat(logprob_parts).cpu().numpy()

    @property
    def logprobs_RK(self) -> Float32Array:
        return self._logprobs_RK

    @torch.no_grad()
    def backward(self, dlogprobs_RK: Float32Array, dhidden_RH: torch.Tensor) -> None:
        hidden_RH, kept_RV = self._hidden_RH, self._kept_RV
        self._kept_RV = None  # overwritten below
        used = torch.from_numpy(np.flatnonzero(dlogprobs_RK.any(1))).to(hidden_RH.device)
        gradient_RK = torch.from_numpy(dlogprobs_RK).to(hidden_RH.device)
        for start, stop in _spans(len(used), HEAD_ROWS):
            part = used[start:stop]
            whole = len(part) == len(hidden_RH)
            part_hidden = hidden_RH if whole else hidden_RH[part]
            if kept_RV is None:
                logits_RV = self._logits(part_hidden)
            else:
                logits_RV = kept_RV if whole else kept_RV[part]
            _to_gradient(logits_RV, self._targets_RK[part], self._lse_R[part], gradient_RK[part])
            segment = self._segment._replace(start=0, stop=len(part))
            dx_RH = self._product.head_backward(part_hidden, logits_RV, segment)
            if whole:
                dhidden_RH.copy_(dx_RH)
            else:
                dhidden_RH[part] = dx_RH

    def _logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        segment = self._segment._replace(start=0, stop=len(hidden_RH))
        return self._product.head_logits(hidden_RH, segment)


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _logprobs(
    logits_RV: torch.Tensor, targets_RK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logsumexp [R] and logprobs [R, K] of the targets."""
    lse_R = torch.empty(len(logits_RV), dtype=torch.float32, device=logits_RV.device)
    for start, stop in _spans(len(logits_RV), BLOCK_ROWS):
        torch.logsumexp(logits_RV[start:stop].float(), 1, out=lse_R[start:stop])
    return lse_R, logits_RV.gather(1, targets_RK).float() - lse_R[:, None]


def _to_gradient(
    logits_RV: torch.Tensor,
    targets_RK: torch.Tensor,
    lse_R: torch.Tensor,
    dlogprobs_RK: torch.Tensor,
) -> None:
    """Overwrites logits with d loss / d logits = scattered g - softmax * (sum of g)."""
    totals_R1 = dlogprobs_RK.sum(1, keepdim=True)
    for start, stop in _spans(len(logits_RV), BLOCK_ROWS):
        rows = slice(start, stop)
        gradient = logits_RV[rows].float().sub_(lse_R[rows, None]).exp_()
        gradient.mul_(-totals_R1[rows])
        gradient.scatter_add_(1, targets_RK[rows], dlogprobs_RK[rows])
        logits_RV[rows] = gradient
