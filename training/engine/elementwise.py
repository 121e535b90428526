"""The row-wise parts of a layer, with backward passes that save little and pass memory seldom.

Sums and products are taken in fp32 and rounded once. Shape legend: T rows, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

BLOCK_VALUES = 2**17
"""Values of a block of rows: 512 KiB each time they are copied in fp32."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension; ``weight`` is fp32."""
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves paired (x_i with x_{i + D/2}), as Hugging Face checkpoints are."""
    y: torch.Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] -> [T, I]: silu(gate) * up."""
    y: torch.Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(*x.shape[:-1], 1, device=x.device)
        for rows in _row_blocks(x):
            wide = _wide(x[rows])
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale[rows] = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            y[rows] = wide.mul_(scale[rows]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in _row_blocks(x):
            dy_wide = _wide(dy[rows]).mul_(weight)
            normed = _wide(x[rows]).mul_(scale[rows])
            along = (dy_wide * normed).mean(-1, keepdim=True)
            dx[rows] = dy_wide.sub_(normed.mul_(along)).mul_(scale[rows])
        return dx, None, None


def _row_blocks(x: torch.Tensor) -> Iterator[slice]:
    """On a CPU, rows whose fp32 copies stay in its cache; elsewhere all of them."""
    num_rows = len(x)
    step = num_rows
    if x.device.type == "cpu":
        step = max(1, BLOCK_VALUES * num_rows // max(1, x.numel()))
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, start + step)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """An fp32 copy, its own even where x is fp32 already."""
    return x.to(torch.float32, copy=True)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """``sign`` -1 turns back. cos and sin repeat their first half."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, -1)
        torch.mul(dy, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dgate_up
