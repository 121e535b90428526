"""One adapter in memory, and the named buffers that are its whole state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from training.engine.adapter import Adapter, AdapterLayout
from training.engine.buffers import new_flat
from training.engine.optimizer import AdamState

WEIGHTS = "weights"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
GRADIENT = "gradient"
PENDING = "pending"


@dataclass(eq=False)
class Slot:
    """``weights``: fp32 masters; ``adapter``: the form of them that the decoder computes with, of
    ``adapter_bytes`` of its own (none where it computes on the masters);
    ``gradient``: the sum since the last step, None for zero; ``pending``: what it becomes if the
    running unit succeeds. All flat [num_params], in the layout of ``adapter``.

    Before the first step the moments of ``adam`` are zeros without memory of their own, which
    ``start_moments`` replaces.
    """

    layout: AdapterLayout
    weights: torch.Tensor
    adapter: Adapter
    adapter_bytes: int
    adam: AdamState
    has_moments: bool
    gradient: torch.Tensor | None = None
    pending: torch.Tensor | None = None

    @classmethod
    def of(
        cls, buffers: Mapping[str, torch.Tensor], step: int, adapter: Adapter, adapter_bytes: int
    ) -> Slot:
        """The reverse of ``buffers``."""
        weights = buffers[WEIGHTS]
        has_moments = EXP_AVG in buffers
        if has_moments:
            moments = (buffers[EXP_AVG], buffers[EXP_AVG_SQ])
        else:
            zero = torch.zeros(1, device=weights.device).expand(weights.numel())
            moments = (zero, zero)
        return cls(
            adapter.layout,
            weights,
            adapter,
            adapter_bytes,
            AdamState(*moments, step),
            has_moments,
            buffers.get(GRADIENT),
            buffers.get(PENDING),
        )

    def buffers(self) -> dict[str, torch.Tensor]:
        """All but the adapter, which is made from the weights."""
        found = {WEIGHTS: self.weights}
        if self.has_moments:
            found |= {EXP_AVG: self.adam.exp_avg, EXP_AVG_SQ: self.adam.exp_avg_sq}
        if self.gradient is not None:
            found[GRADIENT] = self.gradient
        if self.pending is not None:
            found[PENDING] = self.pending
        return found

    def start_moments(self) -> None:
        size, device = self.weights.numel(), self.weights.device
        self.adam.exp_avg, self.adam.exp_avg_sq = new_flat(size, device), new_flat(size, device)
        self.has_moments = True

    def drop(self, name: str) -> torch.Tensor | None:
        """Takes the gradient or the pending one away."""
        if name == GRADIENT:
            dropped, self.gradient = self.gradient, None
        else:
            assert name == PENDING
            dropped, self.pending = self.pending, None
        return dropped

    @property
    def num_bytes(self) -> int:
        return self.adapter_bytes + sum(buffer.nbytes for buffer in self.buffers().values())
