"""A frozen linear plus the LoRA products of each segment's adapter, forward and backward.

The backward pass writes adapter gradients straight into each segment's sink: they are no autograd
leaves, and no tensor the size of an adapter is ever allocated for them.

Shape legend: T rows of the packed batch, I inputs, O outputs (of the whole group), R = g * r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from training.engine.adapter import Adapter, Group, LoraMatrices, Segment
from training.engine.weights import Linear


def lora_linear(
    x_TI: torch.Tensor, linear: Linear, segments: Sequence[Segment], layer: int, group: Group
) -> torch.Tensor:
    """``x W^T + bias + scale * x A^T B^T`` of each segment -> [T, O]."""
    if not torch.is_grad_enabled():
        return _forward(x_TI, linear, segments, layer, group)[0]
    anchor = _anchor(x_TI, segments, layer, group)
    y_TO: torch.Tensor = _LoraLinear.apply(x_TI, anchor, linear, segments, layer, group)  # type: ignore[no-untyped-call]
    return y_TO


def _anchor(
    x_TI: torch.Tensor, segments: Sequence[Segment], layer: int, group: Group
) -> torch.Tensor | None:
    """An empty leaf that makes autograd visit this node though its input needs no gradient."""
    if x_TI.requires_grad:
        return None
    if any(segment.sink and segment.sink.group(layer, group) for segment in segments):
        return torch.empty(0, requires_grad=True)
    return None


def _forward(
    x_TI: torch.Tensor, linear: Linear, segments: Sequence[Segment], layer: int, group: Group
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Returns y and, per segment, the scaled ``x A^T`` that the backward pass needs."""
    y_TO = F.linear(x_TI, linear.weight, linear.bias)
    reduced: list[torch.Tensor | None] = []
    for adapter, start, stop, _ in segments:
        pair = adapter.group(layer, group) if adapter else None
        if adapter is None or pair is None:
            reduced.append(None)
            continue
        z_TR = F.linear(x_TI[start:stop], pair.a).mul_(adapter.scale)
        _add_product(y_TO[start:stop], z_TR, pair, adapter.rank)
        reduced.append(z_TR)
    return y_TO, reduced


def _add_product(y_TO: torch.Tensor, z_TR: torch.Tensor, pair: LoraMatrices, rank: int) -> None:
    """Adds ``z_i B_i^T`` of each projection i to its columns of y."""
    column = 0
    for index, size in enumerate(pair.out_sizes):
        b = pair.b[column : column + size]
        z = z_TR[:, index * rank : (index + 1) * rank]
        y_TO[:, column : column + size] += z @ b.T
        column += size


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        anchor: torch.Tensor | None,
        linear: Linear,
        segments: Sequence[Segment],
        layer: int,
        group: Group,
    ) -> torch.Tensor:
        y_TO, reduced = _forward(x_TI, linear, segments, layer, group)
        ctx.save_for_backward(x_TI, *reduced)
        ctx.call = (linear, segments, layer, group)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor) -> Any:
        x_TI, *reduced = ctx.saved_tensors
        linear, segments, layer, group = ctx.call
        dx_TI = dy_TO @ linear.weight if ctx.needs_input_grad[0] else None
        for segment, z_TR in zip(segments, reduced, strict=True):
            if z_TR is None:
                continue
            rows = slice(segment.start, segment.stop)
            dz_TR = _reduced_gradient(dy_TO[rows], segment.adapter, layer, group)
            if segment.sink is not None:
                into = segment.sink.group(layer, group)
                add_gradients(into, x_TI[rows], z_TR, dy_TO[rows], dz_TR, segment.adapter.rank)
            if dx_TI is not None:
                dx_TI[rows].addmm_(dz_TR, segment.adapter.group(layer, group).a)
        return dx_TI, None, None, None, None, None


def _reduced_gradient(
    dy_TO: torch.Tensor, adapter: Adapter, layer: int, group: Group
) -> torch.Tensor:
    """Gradient of ``x A^T`` [T, R]."""
    pair = adapter.group(layer, group)
    assert pair is not None
    parts = [
        dy @ b
        for dy, b in zip(
            torch.split(dy_TO, pair.out_sizes, 1), torch.split(pair.b, pair.out_sizes), strict=True
        )
    ]
    return torch.cat(parts, 1).mul_(adapter.scale)


def add_gradients(
    into: LoraMatrices,
    x_TI: torch.Tensor,
    z_TR: torch.Tensor,
    dy_TO: torch.Tensor,
    dz_TR: torch.Tensor,
    rank: int,
) -> None:
    """Adds this segment's dA and dB to its sink, in fp32."""
    into.a.add_(dz_TR.T @ x_TI)
    dys = torch.split(dy_TO, into.out_sizes, 1)
    bs = torch.split(into.b, into.out_sizes)
    for dy, z, b in zip(dys, torch.split(z_TR, rank, 1), bs, strict=True):
        b.add_(dy.T @ z)
