"""From hidden states to logprobs, losses and the gradient of the hidden states, without autograd.

The logits of at most ``HEAD_ROWS`` rows exist at once, in the compute dtype; fp32 ones only for
``BLOCK_ROWS`` rows, which stay in the processor's cache.

Shape legend: R rows of one group, H hidden, V vocab, N positions of a datum, K its targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.backends.base import Datum, Float32Array
from training.core.errors import UserError
from training.engine.adapter import UNEMBED_LAYER, Group, Segment
from training.engine.lora_linear import lora_linear_backward
from training.engine.model import Transformer
from training.losses.base import Float64Array, LossSpec

HEAD_ROWS = 512
BLOCK_ROWS = 16


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
        model: Transformer,
        segment: Segment,
        loss: LossSpec,
        loss_config: Mapping[str, float],
        hidden_RH: torch.Tensor,
        dhidden_RH: torch.Tensor | None,
    ) -> None:
        self.model = model
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
        device = hidden_RH.device
        # Copied: they are read-only views of the request, which torch does not take.
        targets = [torch.tensor(datum.targets, device=device) for datum in data]
        kept: list[torch.Tensor] = []
        lse_parts, logprob_parts = [], []
        targets_RK = _pad_targets(targets)
        for start, stop in _spans(len(hidden_RH), HEAD_ROWS):
            logits_RV = self._logits(hidden_RH[start:stop])
            lse, logprobs = _logprobs(logits_RV, targets_RK[start:stop])
            lse_parts.append(lse)
            logprob_parts.append(logprobs)
            if len(hidden_RH) <= HEAD_ROWS:
                kept.append(logits_RV)
        logprobs_RK = torch.cat(logprob_parts).cpu().numpy()
        outputs, dlogprobs_RK = self._losses(data, logprobs_RK)
        if self.dhidden_RH is not None and dlogprobs_RK.any():
            self._backward(rows, targets_RK, torch.cat(lse_parts), dlogprobs_RK, kept)
        return outputs

    def _logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        segment = self.segment._replace(start=0, stop=len(hidden_RH))
        return self.model.logits(hidden_RH, [segment])

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
            outputs.append(np.ascontiguousarray(mine))
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

    def _backward(
        self,
        rows: slice,
        targets_RK: torch.Tensor,
        lse_R: torch.Tensor,
        dlogprobs_RK: Float32Array,
        kept: Sequence[torch.Tensor],
    ) -> None:
        """Writes the hidden gradient of rows with a derivative; adds the unembed adapter's."""
        assert self.dhidden_RH is not None
        self.has_gradient = True
        hidden_RH, dhidden_RH = self.hidden_RH[rows], self.dhidden_RH[rows]
        used = torch.from_numpy(np.flatnonzero(dlogprobs_RK.any(1))).to(hidden_RH.device)
        gradient_RK = torch.from_numpy(dlogprobs_RK).to(hidden_RH.device)
        for start, stop in _spans(len(used), HEAD_ROWS):
            part = used[start:stop]
            whole = len(part) == len(hidden_RH)
            part_hidden = hidden_RH if whole else hidden_RH[part]
            if not kept:
                logits_RV = self._logits(part_hidden)
            else:
                logits_RV = kept[0] if whole else kept[0][part]
            _to_gradient(logits_RV, targets_RK[part], lse_R[part], gradient_RK[part])
            segment = self.segment._replace(start=0, stop=len(part))
            dx = lora_linear_backward(
                part_hidden,
                logits_RV,
                self.model.weights.head,
                [segment],
                UNEMBED_LAYER,
                Group.UNEMBED,
            )
            if whole:
                dhidden_RH.copy_(dx)
            else:
                dhidden_RH[part] = dx


def _groups(data: Sequence[Datum]) -> Iterator[list[Datum]]:
    """Neighbours of at most ``HEAD_ROWS`` rows together, or one longer datum."""
    group: list[Datum] = []
    num_rows = 0
    for datum in data:
        if group and num_rows + datum.num_tokens > HEAD_ROWS:
            yield group
            group, num_rows = [], 0
        group.append(datum)
        num_rows += datum.num_tokens
    if group:
        yield group


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _pad_targets(targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Targets of all rows [R, K]; a datum with fewer targets repeats token 0, never read."""
    columns = [target[:, None] if target.ndim == 1 else target for target in targets]
    width = max(column.shape[1] for column in columns)
    padded = [torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in columns]
    return torch.cat(padded)


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
