"""The row-wise kernels against plain formulas in double, differentiated by autograd."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

WIDTHS = [1, 16, 17, 63, 64, 100, 576]
ROWS = 5
POSITIONS = 40
EPS = 1e-5
HALF_UNIT = 2.0**-8  # of a rounding to bfloat16, relative to the value


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(torch.bfloat16)


def weight_of(width: int, seed: int = 9) -> torch.Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) + 0.5


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, noise: float = 2e-6) -> None:
    """``noise``: of fp32 sums whose terms cancel, relative to the largest value."""
    bound = exact.abs() * HALF_UNIT * 1.001 + noise * (1 + exact.abs().max())
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


def gradient(
    formula: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor
) -> torch.Tensor:
    wide = x.double().requires_grad_()
    (dx,) = torch.autograd.grad(formula(wide), wide, dy.double())
    return dx


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(kernels: ctypes.CDLL, width: int) -> None:
    x, weight = random(ROWS, width, scale=3), weight_of(width)
    y = torch.full_like(x, 7)
    kernels.tc_rms_norm(at(x), at(weight), ctypes.c_float(EPS), at(y), width, 1, 4)
    assert_rounded_once(y[1:4], normed(x.double(), weight)[1:4])
    assert (y[[0, 4]] == 7).all()
    kernels.tc_rms_norm(at(x), at(weight), ctypes.c_float(EPS), at(x), width, 1, 4)
    assert torch.equal(x[1:4], y[1:4])


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_backward_adds(kernels: ctypes.CDLL, width: int) -> None:
    x, weight = random(ROWS, width), weight_of(width)
    dy, dx = random(ROWS, width, seed=1), random(ROWS, width, seed=2)
    before = dx.clone()
    kernels.tc_rms_norm_backward(
        at(x), at(weight), ctypes.c_float(EPS), at(dy), at(dx), width, 1, 4
    )
    exact = before.double() + gradient(lambda wide: normed(wide, weight), x, dy)
    assert_rounded_once(dx[1:4], exact[1:4])
    assert torch.equal(dx[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rows(kernels: ctypes.CDLL, width: int) -> None:
    x, y = random(ROWS, width), random(ROWS, width, seed=1)
    expected = x + y
    kernels.tc_add_rows(at(x), at(y), width, 0, ROWS)
    assert torch.equal(x, expected)


def turned(
    qkv: torch.Tensor, lines: torch.Tensor, q_norm: torch.Tensor | None, num_heads: int
) -> torch.Tensor:
    """The query heads of [T, N, D], normed with ``q_norm`` and turned, and value heads as is."""
    heads = qkv[:, :num_heads]
    if q_norm is not None:
        heads = normed(heads, q_norm)
    half = heads.shape[-1] // 2
    cos, sin = lines[:, None, :half].double(), lines[:, None, half:].double()
    low, high = heads[..., :half], heads[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Heads:
    """3 query heads, 2 key heads, 2 value heads and some columns that belong to nobody."""

    def __init__(self, head_dim: int, with_norms: bool) -> None:
        self.dim = head_dim
        angles = torch.rand(POSITIONS, head_dim // 2) * 6.28
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1).contiguous()
        self.positions = torch.tensor([0, 39, 7, 7, 20], dtype=torch.int32)
        self.q_norm = weight_of(head_dim, 5) if with_norms else None
        self.k_norm = weight_of(head_dim, 6) if with_norms else None
        self.ld = 7 * head_dim + 3

    def arguments(self) -> tuple[object, ...]:
        norms = (at(self.q_norm), at(self.k_norm), ctypes.c_float(EPS))
        return (3, 2, self.dim, at(self.cos_sin), at(self.positions), *norms)

    def formula(self, qkv: torch.Tensor) -> torch.Tensor:
        lines = self.cos_sin[self.positions.long()]
        heads = qkv[:, : 7 * self.dim].reshape(len(qkv), 7, self.dim)
        q = turned(heads, lines, self.q_norm, 3)
        k = turned(heads[:, 3:], lines, self.k_norm, 2)
        turned_heads = torch.cat((q, k, heads[:, 5:]), 1).flatten(1)
        return torch.cat((turned_heads, qkv[:, 7 * self.dim :]), 1)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rotate(kernels: ctypes.CDLL, head_dim: int, with_norms: bool) -> None:
    case = Heads(head_dim, with_norms)
    qkv = random(ROWS, case.ld)
    before = qkv.clone()
    kernels.tc_rotate(at(qkv), ctypes.c_ssize_t(case.ld), *case.arguments(), 1, 4)
    assert_rounded_once(qkv[1:4], case.formula(before.double())[1:4])
    assert torch.equal(qkv[[0, 4]], before[[0, 4]])
    assert torch.equal(qkv[:, 5 * head_dim :], before[:, 5 * head_dim :])


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rotate_backward(kernels: ctypes.CDLL, head_dim: int, with_norms: bool) -> None:
    case = Heads(head_dim, with_norms)
    qkv, dqkv = random(ROWS, case.ld), random(ROWS, case.ld, seed=1)
    before = dqkv.clone()
    ld = ctypes.c_ssize_t(case.ld)
    saved = at(qkv if with_norms else None)
    kernels.tc_rotate_backward(at(dqkv), ld, saved, ld, *case.arguments(), 1, 4)
    assert_rounded_once(dqkv[1:4], gradient(case.formula, qkv, before)[1:4])
    assert torch.equal(dqkv[[0, 4]], before[[0, 4]])
    assert torch.equal(dqkv[:, 5 * head_dim :], before[:, 5 * head_dim :])


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(kernels: ctypes.CDLL, width: int) -> None:
    gate_up = random(ROWS, 2 * width, scale=4)
    gate_up[1, 0] = -200.0
    gate_up[2, 0] = 200.0
    act = torch.full((ROWS, width), 7, dtype=torch.bfloat16)
    kernels.tc_swiglu(at(gate_up), at(act), width, 1, 4)
    assert_rounded_once(act[1:4], swiglu(gate_up.double())[1:4], noise=1e-8)
    assert (act[[0, 4]] == 7).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_backward(kernels: ctypes.CDLL, width: int) -> None:
    gate_up, dact = random(ROWS, 2 * width, scale=4), random(ROWS, width, seed=1)
    gate_up[1, 0] = -200.0
    exact = gradient(swiglu, gate_up, dact)
    activated = torch.empty_like(dact)
    kernels.tc_swiglu(at(gate_up), at(activated), width, 0, ROWS)
    dgate_up, again = torch.empty_like(gate_up), torch.empty_like(dact)
    sizes = (width, 0, ROWS)
    kernels.tc_swiglu_backward(at(gate_up), at(dact), at(dgate_up), at(again), *sizes)
    assert_rounded_once(dgate_up, exact, noise=1e-7)
    assert torch.equal(again, activated)
    kernels.tc_swiglu_backward(at(gate_up), at(dact), at(gate_up), at(None), *sizes)
    assert torch.equal(gate_up, dgate_up)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(kernels: ctypes.CDLL, value: float) -> None:
    width = 100
    x, weight = random(ROWS, width), weight_of(width)
    x[2, 70] = value
    y = torch.empty_like(x)
    kernels.tc_rms_norm(at(x), at(weight), ctypes.c_float(EPS), at(y), width, 0, ROWS)
    assert not y[2, 70].isfinite()
    act = torch.empty(ROWS, 50, dtype=torch.bfloat16)
    kernels.tc_swiglu(at(x), at(act), 50, 0, ROWS)
    assert not act[2, 20].isfinite()
    assert act[:2].isfinite().all()
