"""``optimizer.AdamArithmetic`` by our own kernels, on all threads."""

from __future__ import annotations

import ctypes

import torch

from training.backends.base import AdamParams
from training.engine.adapter import Adapter
from training.engine.native import library
from training.engine.native.adapters import NativeAdapter
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
        adapter: Adapter | None,
    ) -> None:
        buffers = (weights, state.exp_avg, state.exp_avg_sq, gradient)
        addresses = [library.address(each) for each in buffers]
        step = library.AdamStep(
            step=state.step + 1,
            learning_rate=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            eps=params.eps,
            weight_decay=params.weight_decay,
            gradient_scale=gradient_scale,
        )
        if isinstance(adapter, NativeAdapter):
            adapter.step(addresses, step)
            return
        self._kernels.tc_adamw_step(*addresses, weights.numel(), ctypes.byref(step))
        if adapter is not None:
            adapter.update(weights)
