"""Devices that tests of torch's decoder run on: the CPU, and CUDA where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.engine.model import Transformer
from training.engine.torch_graphs import Step
from training.engine.torch_paths import FastPaths
from training.engine.torch_probe import probed_paths
from training.engine.torch_varlen import plain_varlen

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here"
)
DEVICES = (
    pytest.param(CPU, id="cpu"),
    pytest.param(torch.device("cuda"), id="cuda", marks=NEEDS_CUDA),
)


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """As the engine loads it: on CUDA with the fast paths that work there."""
    model = Transformer.from_directory(path, device, dtype)
    if device.type == "cuda":
        model.paths = probed_paths(model)
    return model


def eager(step: Step) -> Step:
    """``torch_graphs.Capture`` that records nothing: it runs the step at once, as CUDA's warm-up
    does, and anew each time."""
    step()
    return step


def fast_paths(model: Transformer) -> FastPaths:
    """Every path at once; on the CPU with what stands in for the GPU's kernels there."""
    if model.device.type == "cuda":
        return probed_paths(model)
    is_narrow = model.dtype == torch.bfloat16
    return FastPaths(varlen=plain_varlen, grouped=is_narrow, capture=eager, in_order=True)
