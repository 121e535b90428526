"""The row-wise functions against plain formulas under autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from training.engine.elementwise import rms_norm, rotate, swiglu


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def compare(
    ours: Callable[[torch.Tensor], torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> None:
    """In fp32 to rounding; in bfloat16 no further from fp32 than two roundings."""
    dy = torch.randn_like(plain(x))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        narrow = x.to(dtype).requires_grad_()
        wide = narrow.detach().float().requires_grad_()
        found, expected = ours(narrow), plain(wide)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
        (dx,) = torch.autograd.grad(found, narrow, dy.to(dtype))
        (expected_dx,) = torch.autograd.grad(expected, wide, dy.to(dtype).float())
        torch.testing.assert_close(dx.float(), expected_dx, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (900, 576), (7, 3, 16), (0, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    """(900, 576) takes several blocks of rows."""
    weight = torch.rand(shape[-1]) + 0.5
    compare(
        lambda x: rms_norm(x, weight, 1e-5), lambda x: _norm(x, weight, 1e-5), torch.randn(shape)
    )


def test_rms_norm_of_a_strided_part() -> None:
    """As the query heads are, inside the fused projection."""
    weight = torch.rand(16) + 0.5
    compare(
        lambda x: rms_norm(x[:, 1:3], weight, 1e-5),
        lambda x: _norm(x[:, 1:3], weight, 1e-5),
        torch.randn(6, 4, 16),
    )


def test_rotate() -> None:
    angles = torch.randn(6, 1, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    compare(
        lambda x: rotate(x[:, 1:3], cos.to(x.dtype), sin.to(x.dtype)),
        lambda x: _rotate(x[:, 1:3], cos, sin),
        torch.randn(6, 4, 16),
    )


def test_swiglu() -> None:
    compare(swiglu, _swiglu, torch.randn(7, 2 * 24))
