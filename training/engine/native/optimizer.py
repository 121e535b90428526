"""``optimizer.AdamArithmetic`` by our own kernels, on all threads."""

from __future__ import annotations

import torch

from training.backends.base import AdamParams
from training.engine.native import library
from training.engine.optimizer import AdamState


class NativeAdam:
    """For contiguous fp32 tensors on the CPU. No result depends on the number of threads."""

    def __init__(self) -> None:
        """Raises ``BuildError`` for a machine without the kernels."""
        self._kernels = library.load()

    def norm(self, gradient: torch.Tensor) -> float:
        norm: float = self._kernels.tc_global_norm(library.address(gradient), gradient.numel())
        return norm

    def step(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        state: AdamState,
        params: AdamParams,
        gradient_scale: float,
    ) -> None:
        self._kernels.tc_adamw_step(
            library.address(weights),
            library.address(state.exp_avg),
            library.address(state.exp_avg_sq),
            library.address(gradient),
            weights.numel(),
            state.step + 1,
            params.learning_rate,
            params.beta1,
            params.beta2,
            params.eps,
            params.weight_decay,
            gradient_scale,
        )
