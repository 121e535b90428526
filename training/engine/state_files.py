"""A slot's training state on disk: the adapter in PEFT's layout, the moments, and the step count.

Writing is not atomic: the caller gives an empty directory and moves it into place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.backends.base import LoraSpec
from training.backends.state_files import reason, write_json, write_tensors
from training.core.errors import UserError
from training.engine.adapter import AdapterLayout
from training.engine.adapter_files import read_adapter, write_adapter
from training.engine.optimizer import AdamState
from training.engine.projections import ModelShape

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
VERSION = 1


@dataclass(frozen=True, eq=False)
class SavedState:
    """fp32 ``weights`` [num_params] and, where asked for, the optimizer's state; on the CPU."""

    weights: torch.Tensor
    adam: AdamState | None

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes * (1 if self.adam is None else 3)


def write_state(
    directory: Path,
    layout: AdapterLayout,
    weights: torch.Tensor,
    adam: AdamState,
    base_model: str,
) -> None:
    write_adapter(directory, layout, weights, base_model)
    # Contiguous: moments before the first step are one zero, expanded.
    moments = {
        "exp_avg": adam.exp_avg.cpu().contiguous().numpy(),
        "exp_avg_sq": adam.exp_avg_sq.cpu().contiguous().numpy(),
    }
    write_tensors(directory / OPTIMIZER_FILE, moments)
    state = {
        "version": VERSION,
        "step": adam.step,
        "base_model": base_model,
        "lora": asdict(layout.spec),
    }
    write_json(directory / STATE_FILE, state)


def read_state(
    directory: Path,
    layout: AdapterLayout,
    model: ModelShape,
    base_model: str,
    with_optimizer: bool,
) -> SavedState:
    """Raises ``UserError`` where the files are damaged or belong to another model or shape."""
    found, weights = read_adapter(directory, model, base_model)
    if differences := _differences(found.spec, layout.spec):
        raise UserError(f"the saved adapter does not fit this model: {differences}")
    adam = _read_adam(directory, layout.num_params) if with_optimizer else None
    return SavedState(weights, adam)


def _differences(saved: LoraSpec, wanted: LoraSpec) -> str:
    """Where the shapes differ; the seed only matters for a fresh adapter."""
    names = ("rank", "alpha", "train_attn", "train_mlp", "train_unembed")
    old, new = asdict(saved), asdict(wanted)
    return ", ".join(
        f"{name} is {old[name]}, expected {new[name]}" for name in names if old[name] != new[name]
    )


def _read_adam(directory: Path, num_params: int) -> AdamState:
    try:
        state: dict[str, Any] = json.loads((directory / STATE_FILE).read_text())
        moments = load_file(directory / OPTIMIZER_FILE)
        adam = AdamState(moments["exp_avg"], moments["exp_avg_sq"], int(state["step"]))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"no usable optimizer state in the checkpoint: {reason(error)}") from error
    if adam.exp_avg.shape != (num_params,) or adam.exp_avg_sq.shape != (num_params,):
        raise UserError("the optimizer state does not have the adapter's size")
    return adam
