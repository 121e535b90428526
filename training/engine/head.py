"""From hidden states to logprobs, losses and the gradient of the hidden states.

Knows losses and datums; the arithmetic of the head is the decoder's.

Shape legend: R rows of one group, H hidden, V vocab, N positions of a datum, K its targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.backends.base import Datum, Float32Array, Int32Array
from training.core.errors import UserError
from training.engine.adapter import Segment
from training.engine.decoder import Decoder
from training.losses.base import Float64Array, LossSpec

GROUP_ROWS = 512
"""Rows of small datums that go through the head together: enough for its products to run at full
speed, and few enough that their logits may be kept for the backward pass."""


@dataclass(frozen=True, eq=False)
class HeadResult:
    """Of one chunk: logprobs by datum, the summed loss, whether ``dhidden`` was written."""

    logprobs: list[Float32Array]
    loss: float
    has_gradient: bool


class Head:
    """One chunk's pass through the head: ``hidden_RH`` its rows, ``dhidden_RH`` where to write
    their gradient (None: forward only)."""

    def __init__(
        self,
        decoder: Decoder,
        segment: Segment,
        loss: LossSpec,
        loss_config: Mapping[str, float],
        hidden_RH: torch.Tensor,
        dhidden_RH: torch.Tensor | None,
    ) -> None:
        self.decoder = decoder
        self.segment = segment
        self.loss = loss
        self.loss_config = {**loss.config, **loss_config}
        self.hidden_RH = hidden_RH
        self.dhidden_RH = dhidden_RH
        self.has_gradient = False
        self.total_loss = 0.0

    def run(self, data: Sequence[Datum]) -> HeadResult:
        """Raises ``UserError`` where a loss or its derivative is not finite."""
        logprobs: list[Float32Array] = []
        row = 0
        for group in _groups(data):
            num_rows = sum(datum.num_tokens for datum in group)
            logprobs += self._group(group, slice(row, row + num_rows))
            row += num_rows
        return HeadResult(logprobs, self.total_loss, self.has_gradient)

    def _group(self, data: Sequence[Datum], rows: slice) -> list[Float32Array]:
        """A group of small datums keeps its logits for the backward pass; one long datum computes
        them again there, since its loss needs all of its logprobs first."""
        hidden_RH = self.hidden_RH[rows]
        segment = self.segment._replace(start=0, stop=len(hidden_RH))
        keep = self.dhidden_RH is not None and len(hidden_RH) <= GROUP_ROWS
        head = self.decoder.head_pass(hidden_RH, _pad_targets(data), segment, keep)
        outputs, dlogprobs_RK = self._losses(data, head.logprobs_RK)
        if self.dhidden_RH is not None and dlogprobs_RK.any():
            self.has_gradient = True
            head.backward(dlogprobs_RK, self.dhidden_RH[rows])
        return outputs

    def _losses(
        self, data: Sequence[Datum], logprobs_RK: Float32Array
    ) -> tuple[list[Float32Array], Float32Array]:
        """Each datum's logprobs in the shape of its targets, and d loss / d logprobs [R, K]."""
        outputs = []
        dlogprobs_RK = np.zeros_like(logprobs_RK)
        row = 0
        for datum in data:
            stop = row + datum.num_tokens
            num_targets = 1 if datum.targets.ndim == 1 else datum.targets.shape[1]
            mine = logprobs_RK[row:stop, :num_targets].reshape(datum.targets.shape)
            outputs.append(np.array(mine))  # not a view: the pass may own the memory
            gradient = self._loss(datum, mine.astype(np.float64))
            dlogprobs_RK[row:stop, :num_targets] = gradient.reshape(-1, num_targets)
            row = stop
        return outputs, dlogprobs_RK

    def _loss(self, datum: Datum, logprobs: Float64Array) -> Float64Array:
        inputs = {
            name: datum.inputs[name].astype(np.float64)
            for name in (*self.loss.required, *self.loss.optional)
            if name in datum.inputs
        }
        value = self.loss.fn(logprobs, inputs, self.loss_config)
        if not np.isfinite(value.loss) or not np.isfinite(value.dlogprobs).all():
            raise UserError(f"the {self.loss.name} loss or its derivative is not finite")
        self.total_loss += value.loss
        return value.dlogprobs


def _groups(data: Sequence[Datum]) -> Iterator[list[Datum]]:
    """Neighbours of at most ``GROUP_ROWS`` rows together, or one longer datum."""
    group: list[Datum] = []
    num_rows = 0
    for datum in data:
        if group and num_rows + datum.num_tokens > GROUP_ROWS:
            yield group
            group, num_rows = [], 0
        group.append(datum)
        num_rows += datum.num_tokens
    if group:
        yield group


def _pad_targets(data: Sequence[Datum]) -> Int32Array:
    """Targets of all rows [R, K]; a datum with fewer targets repeats token 0, never read."""
    columns = [
        datum.targets[:, None] if datum.targets.ndim == 1 else datum.targets for datum in data
    ]
    width = max(column.shape[1] for column in columns)
    padded = np.zeros((sum(map(len, columns)), width), np.int32)
    row = 0
    for column in columns:
        padded[row : row + len(column), : column.shape[1]] = column
        row += len(column)
    return padded
