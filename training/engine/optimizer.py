"""AdamW over one flat parameter buffer, with hyper-parameters given at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from training.backends.base import MAX_STEP_NORM, AdamParams, OptimOutput
from training.engine.adapter import Adapter

CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``."""
NORM_BLOCK = 2**16


@dataclass(eq=False)
class AdamState:
    """``exp_avg`` and ``exp_avg_sq`` fp32 [num_params]; ``step`` counts steps taken."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0

    @classmethod
    def zeros_like(cls, weights: torch.Tensor) -> AdamState:
        return cls(torch.zeros_like(weights), torch.zeros_like(weights))


class AdamArithmetic(Protocol):
    """Who computes on the flat buffers."""

    def norm(self, gradient: torch.Tensor) -> float:
        """Root of the sum of squares; not finite only where a value is not, or the sum of squares
        is beyond fp64."""

    def step(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        state: AdamState,
        params: AdamParams,
        gradient_scale: float,
        adapter: Adapter | None,
    ) -> None:
        """One step of ``torch.optim.AdamW`` in place with ``gradient * gradient_scale``;
        ``gradient`` may be overwritten. Does not count the step. ``adapter`` takes the new weights
        over."""


def adamw_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamState,
    params: AdamParams,
    arithmetic: AdamArithmetic,
    adapter: Adapter | None = None,
) -> OptimOutput:
    """One step, in place; ``gradient`` may be overwritten. ``adapter`` takes the new weights over.

    Refused, changing nothing, where the gradient or a parameter is not usable.
    """
    norm = arithmetic.norm(gradient)
    if not math.isfinite(norm):
        return OptimOutput(error=f"the gradient is not finite (norm {norm}); step refused")
    if problem := _problem(params):
        return OptimOutput(error=f"step refused: {problem}")
    scale = 1.0
    if params.grad_clip_norm > 0:
        scale = min(1.0, params.grad_clip_norm / (norm + CLIP_EPSILON))
    if norm * scale > MAX_STEP_NORM:
        return OptimOutput(
            error=f"the gradient is too large for the optimizer (norm {norm * scale:g} after "
            f"clipping, at most {MAX_STEP_NORM:g}); step refused"
        )
    arithmetic.step(weights, gradient, state, params, scale, adapter)
    state.step += 1
    return OptimOutput(metrics={"grad_norm": norm, "optimizer_step": float(state.step)})


def _problem(params: AdamParams) -> str | None:
    """What ``torch.optim.AdamW`` would refuse."""
    if not params.learning_rate >= 0:
        return f"Invalid learning rate: {params.learning_rate}"
    if not params.eps >= 0:
        return f"Invalid epsilon value: {params.eps}"
    for number, beta in enumerate((params.beta1, params.beta2)):
        if not 0 <= beta < 1:
            return f"Invalid beta parameter at index {number}: {beta}"
    if not params.weight_decay >= 0:
        return f"Invalid weight_decay value: {params.weight_decay}"
    return None


class TorchAdam:
    """``AdamArithmetic`` by torch's fused kernel, on any device. What it remembers is handed to it
    at each step, so that hyper-parameters may change and state lies in our buffers alone."""

    def norm(self, gradient: torch.Tensor) -> float:
        """In fp32 by blocks (ten times faster than in fp64 on a CPU), in fp64 across them; wholly
        in fp64 where an fp32 square overflows."""
        blocks = [torch.linalg.vector_norm(block) for block in torch.split(gradient, NORM_BLOCK)]
        norm: float = torch.linalg.vector_norm(torch.stack(blocks), dtype=torch.float64).item()
        if math.isfinite(norm):
            return norm
        exact: float = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
        return exact

    def step(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        state: AdamState,
        params: AdamParams,
        gradient_scale: float,
        adapter: Adapter | None,
    ) -> None:
        optimizer = torch.optim.AdamW(
            [weights],
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
            fused=True,
        )
        optimizer.state[weights] = {
            "step": torch.tensor(float(state.step), device=weights.device),
            "exp_avg": state.exp_avg,
            "exp_avg_sq": state.exp_avg_sq,
        }
        if gradient_scale != 1:
            gradient.mul_(gradient_scale)
        weights.grad = gradient
        optimizer.step()
        weights.grad = None
        if adapter is not None:
            adapter.update(weights)
