"""Fast paths that raise or disagree are switched off, and the log says which and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from tests.engine.devices import CPU, fast_paths
from training.engine.model import Transformer
from training.engine.torch_graphs import Step
from training.engine.torch_paths import FastPaths
from training.engine.torch_probe import (
    MODEL_TOLERANCE,
    PRODUCT_TOLERANCE,
    Candidate,
    graphs_error,
    repeated_error,
    varlen_error,
    working_paths,
    works,
)
from training.engine.torch_training import TorchTrainingPass, fixed_order
from training.engine.torch_varlen import Jagged, VarlenKernel, flash_varlen, plain_varlen

HEADS = (4, 2, 16)


def wrong_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, jagged: Jagged, window: int | None
) -> torch.Tensor:
    """One position too many: how flash attention counts."""
    return plain_varlen(q, k, v, jagged, None if window is None else window + 1)


def from_the_start(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, jagged: Jagged, window: int | None
) -> torch.Tensor:
    """Takes the first query for the first position, whatever came before."""
    cut_k, cut_v = (
        torch.cat(
            [
                part[:num]
                for part, num in zip(
                    torch.split(each, jagged.num_keys), jagged.num_queries, strict=True
                )
            ]
        )
        for each in (k, v)
    )
    return plain_varlen(
        q, cut_k, cut_v, Jagged(jagged.num_queries, jagged.num_queries, q.device), window
    )


def no_gradient_of_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, jagged: Jagged, window: int | None
) -> torch.Tensor:
    return plain_varlen(q, k.detach() + 0 * k, v, jagged, window)


def test_a_right_kernel_passes() -> None:
    assert varlen_error(plain_varlen, HEADS, CPU) < PRODUCT_TOLERANCE / 2


@pytest.mark.parametrize("kernel", [wrong_window, from_the_start, no_gradient_of_keys])
def test_a_wrong_kernel_is_found_out(
    kernel: VarlenKernel, caplog: pytest.LogCaptureFixture
) -> None:
    candidate = Candidate("attention", lambda: varlen_error(kernel, HEADS, CPU), PRODUCT_TOLERANCE)
    with caplog.at_level(logging.WARNING):
        assert not works(candidate)
    assert "fast path attention is off: it differs" in caplog.text


def test_the_kernel_of_a_gpu_is_refused_without_one(caplog: pytest.LogCaptureFixture) -> None:
    """Not a kernel that a CPU has: the probe reports what torch says of it."""
    candidate = Candidate("flash", lambda: varlen_error(flash_varlen, HEADS, CPU), 1.0)
    with caplog.at_level(logging.WARNING):
        assert not works(candidate)
    assert "fast path flash is off: NotImplementedError: " in caplog.text


def failing(error: Exception) -> Callable[[], float]:
    def run() -> float:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (failing(RuntimeError("no kernel\nimage")), "path x is off: RuntimeError: no kernel"),
        (failing(ImportError()), "path x is off: ImportError: "),
        (lambda: float("nan"), "path x is off: it differs from the plain path by nan, over 0.1"),
        (lambda: 0.2, "path x is off: it differs from the plain path by 0.2, over 0.1"),
    ],
)
def test_why_a_path_is_off(
    error: Callable[[], float], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not works(Candidate("x", error, 0.1))
    (record,) = caplog.records
    assert record.getMessage().endswith(message)


def test_what_works_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert works(Candidate("x", lambda: 0.1, 0.1))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_does_not_read_its_inputs_is_found_out(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def stuck(step: Step) -> Step:
        output = step()
        return lambda: output

    model = Transformer.from_directory(make_checkpoint("llama", tmp_path), CPU, dtype)
    tolerance = MODEL_TOLERANCE[dtype]
    assert works(Candidate("graphs", lambda: graphs_error(model, lambda step: step), tolerance))
    assert not works(Candidate("graphs", lambda: graphs_error(model, stuck), tolerance))


def test_the_same_operation_twice_has_no_error_at_all(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mistral-window", tmp_path)
    model = Transformer.from_directory(checkpoint, CPU, torch.float32)
    model.paths = FastPaths(in_order=True)
    assert works(Candidate("repeatable", lambda: repeated_error(model), 0.0))
    calls: list[None] = []

    def wavering(
        q_TND: torch.Tensor,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        jagged: Jagged,
        window: int | None,
    ) -> torch.Tensor:
        calls.append(None)
        return plain_varlen(q_TND, k_SKD, v_SKD * (1 + 1e-6 * len(calls)), jagged, window)

    model.paths = FastPaths(varlen=wavering, in_order=True)
    assert not works(Candidate("repeatable", lambda: repeated_error(model), 0.0))


def test_a_fixed_order_is_asked_for_in_the_backward_pass_alone() -> None:
    seen: list[bool] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return dy

    for in_order in (True, False):
        y = Watched.apply(torch.ones(1, 1, requires_grad=True))  # type: ignore[no-untyped-call]
        TorchTrainingPass(y, in_order).backward(torch.ones(1, 1))
    assert seen == [True, False]


def fail_in_order() -> None:
    with fixed_order():
        raise ZeroDivisionError


def test_nothing_of_it_stays_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError):
        fail_in_order()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    checkpoint = make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return Transformer.from_directory(checkpoint, CPU, torch.bfloat16)


def test_paths_that_work_stay_and_are_named(
    narrow: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = fast_paths(narrow)
    with caplog.at_level(logging.INFO):
        assert working_paths(narrow, wanted) == wanted
    (record,) = caplog.records
    assert record.getMessage() == (
        "fast paths on cpu: packed attention, grouped LoRA, recorded decoding, repeatable training"
    )


def test_each_path_falls_alone(narrow: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    def no_graphs(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    wanted = fast_paths(narrow)
    with caplog.at_level(logging.WARNING):
        assert working_paths(narrow, replace(wanted, varlen=flash_varlen)) == replace(
            wanted, varlen=None
        )
        assert working_paths(narrow, replace(wanted, capture=no_graphs)) == replace(
            wanted, capture=None
        )
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("fast path packed attention is off: NotImplementedError: ")
    assert second == (
        "fast path recorded decoding is off: RuntimeError: "
        "operation not permitted when stream is capturing"
    )
