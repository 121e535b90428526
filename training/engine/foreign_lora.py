"""LoRA around the modules of transformers: what is added to the outputs of linears and experts.

The modules do not know of adapters. Whoever runs the model says whose rows it runs (``use``), one
segment at a time; gradients go from the backward pass straight into the segment's sink.

Shape legend: T rows, I inputs, O outputs, R rank, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from training.engine.adapter import GroupKey, LoraMatrices, Segment
from training.engine.foreign_shape import ExpertParameters

NO_ADAPTER = Segment(None, 0, 0)


class ForeignLora:
    """Everything wrapped by one instance computes for the segment that is in use."""

    def __init__(self) -> None:
        self.segment = NO_ADAPTER

    @contextmanager
    def use(self, segment: Segment) -> Iterator[None]:
        before, self.segment = self.segment, segment
        try:
            yield
        finally:
            self.segment = before

    def wrap_linear(self, module: nn.Module, key: GroupKey) -> None:
        def add(_: nn.Module, inputs: Sequence[Any], y: torch.Tensor) -> torch.Tensor:
            return self._add(y, inputs[0], key)

        module.register_forward_hook(add)

    def wrap_experts(
        self, module: nn.Module, layer: int, path: str, names: ExpertParameters
    ) -> None:
        """Replaces the module's forward, which would multiply by the parameters unseen by us."""

        def forward(
            hidden_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
        ) -> torch.Tensor:
            return self._experts(module, layer, path, names, hidden_TH, experts_TK, weights_TK)

        module.forward = forward

    def _add(self, y: torch.Tensor, x: torch.Tensor, key: GroupKey) -> torch.Tensor:
        """y + scale * x A^T B^T of the segment in use."""
        adapter = self.segment.adapter
        pair = adapter.group(*key) if adapter else None
        if adapter is None or pair is None:
            return y
        x_TI = x.to(pair.a.dtype).flatten(0, -2)
        anchor = None
        if torch.is_grad_enabled() and self.segment.sink is not None and not x_TI.requires_grad:
            # Makes autograd visit the node though its input needs no gradient.
            anchor = torch.empty(0, requires_grad=True)
        delta: torch.Tensor = _Delta.apply(  # type: ignore[no-untyped-call]
            x_TI, anchor, pair, adapter.scale, self.segment, key
        )
        return y + delta.view(y.shape).to(y.dtype)

    def _experts(
        self,
        module: Any,  # the experts' classes have an interface, but no common type
        layer: int,
        path: str,
        names: ExpertParameters,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """As transformers' own, expert by expert: the rows that chose it, its two products, the
        rows' weights; a token's experts are summed in the order in which it chose them."""
        num_choices = experts_TK.shape[1]
        chosen = experts_TK.flatten()
        y = hidden_TH.new_zeros(len(chosen), hidden_TH.shape[1])
        for expert in torch.unique(chosen).tolist():
            rows = (chosen == expert).nonzero()[:, 0]
            x = hidden_TH[rows // num_choices]
            first = self._expert(module, (layer, f"{path}.{names.first}.{expert}"), x)
            inner = module._apply_gate(first) if module.has_gate else module.act_fn(first)
            last = self._expert(module, (layer, f"{path}.{names.last}.{expert}"), inner)
            if module.has_post_expert_norm:
                last = module.post_expert_norm(last)
            y = y.index_copy(0, rows, last)
        weighted = y.view(-1, num_choices, y.shape[1]) * weights_TK[..., None]
        return weighted.sum(1).to(hidden_TH.dtype)

    def _expert(self, module: Any, key: GroupKey, x: torch.Tensor) -> torch.Tensor:
        name, number = key[1].split(".")[-2:]
        weight = getattr(module, name)[int(number)]
        y: torch.Tensor = x @ weight if module.is_transposed else F.linear(x, weight)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias")[int(number)]
        return self._add(y, x, key)


class _Delta(torch.autograd.Function):
    """scale * x A^T B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        anchor: torch.Tensor | None,
        pair: LoraMatrices,
        scale: float,
        segment: Segment,
        key: GroupKey,
    ) -> torch.Tensor:
        z_TR = F.linear(x_TI, pair.a).mul_(scale)
        ctx.save_for_backward(x_TI, z_TR)
        ctx.pair, ctx.scale, ctx.segment, ctx.key = pair, scale, segment, key
        return F.linear(z_TR, pair.b)

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor) -> Any:
        x_TI, z_TR = ctx.saved_tensors
        dz_TR = (dy_TO @ ctx.pair.b).mul_(ctx.scale)
        if ctx.segment.sink is not None:
            ctx.segment.sink.add(*ctx.key, dz_TR.T @ x_TI, [dy_TO.T @ z_TR])
        dx_TI = dz_TR @ ctx.pair.a if ctx.needs_input_grad[0] else None
        return dx_TI, None, None, None, None, None
