"""Adapters on disk, in PEFT's layout: ``adapter_model.safetensors`` + ``adapter_config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.backends.base import LoraSpec
from training.backends.state_files import reason, write_json, write_tensors
from training.core.errors import UserError
from training.engine.adapter import Adapter, AdapterLayout
from training.engine.projections import ModelShape, Part

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MATRICES = ("lora_A", "lora_B")


def tensor_name(path: str, matrix: str) -> str:
    """PEFT's name of ``lora_A`` or ``lora_B`` of the projection at ``path``."""
    return f"base_model.model.{path}.{matrix}.weight"


def named_tensors(layout: AdapterLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """``flat`` [num_params] by PEFT's names. Linears are views, experts of one parameter copies."""
    return {
        name: parts[0] if len(parts) == 1 else _join_experts(parts, name)
        for name, parts in _views_by_name(layout, flat).items()
    }


def _views_by_name(layout: AdapterLayout, flat: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Name -> one matrix, or those of all experts of a parameter."""
    views: dict[str, list[torch.Tensor]] = {}
    for projection, *pair in layout.matrices(flat):
        for matrix, view in zip(MATRICES, pair, strict=True):
            views.setdefault(tensor_name(projection.path, matrix), []).append(view)
    return views


def _join_experts(parts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """PEFT lays experts' A's below each other; in its B [out, r * E] the expert counts fastest."""
    if MATRICES[0] in name:
        return torch.cat(tuple(parts))
    return torch.stack(tuple(parts), 2).flatten(1)


def _split_experts(tensor: torch.Tensor, num_experts: int, name: str) -> Sequence[torch.Tensor]:
    if MATRICES[0] in name:
        return tensor.chunk(num_experts)
    return tensor.view(len(tensor), -1, num_experts).unbind(2)


def write_adapter(
    directory: Path, layout: AdapterLayout, flat: torch.Tensor, base_model: str
) -> None:
    """Writes and syncs both files; ``flat`` is [num_params], usually the fp32 masters."""
    directory.mkdir(parents=True, exist_ok=True)
    named = named_tensors(layout, flat.detach().cpu())
    tensors = {name: tensor.contiguous().numpy() for name, tensor in named.items()}
    write_tensors(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(directory / CONFIG_FILE, adapter_config(layout, base_model))


def adapter_config(layout: AdapterLayout, base_model: str) -> dict[str, Any]:
    """What PEFT reads back as a ``LoraConfig``."""
    spec = layout.spec
    members = [each for place in layout.places.values() for each in place.projections]
    modules = dict.fromkeys(each.target for each in members if not each.is_parameter)
    parameters = dict.fromkeys(each.target for each in members if each.is_parameter)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return config | ({"target_parameters": list(parameters)} if parameters else {})


def load_adapter(
    directory: Path,
    model: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    base_model: str | None = None,
) -> Adapter:
    """An adapter ready to compute with; raises ``UserError`` where the files do not fit."""
    layout, flat = read_adapter(directory, model, base_model)
    return Adapter(layout, flat.to(device=device, dtype=dtype))


def read_adapter(
    directory: Path, model: ModelShape, base_model: str | None = None
) -> tuple[AdapterLayout, torch.Tensor]:
    """The layout and its fp32 weights [num_params] on the CPU.

    With ``base_model`` given, an adapter made for another one is refused.
    """
    config = _read_config(directory)
    made_for = config.get("base_model_name_or_path")
    if base_model is not None and made_for not in (None, base_model):
        raise UserError(f"the adapter was made for {made_for!r}, not for {base_model!r}")
    layout = AdapterLayout.of(model, _spec_of(config, model))
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {WEIGHTS_FILE}: {reason(error)}") from error
    flat = torch.empty(layout.num_params)
    shapes = {name: tensor.shape for name, tensor in named_tensors(layout, flat).items()}
    for name, views in _views_by_name(layout, flat).items():
        tensor = _take(tensors, name, shapes[name])
        parts = [tensor] if len(views) == 1 else _split_experts(tensor, len(views), name)
        for view, part in zip(views, parts, strict=True):
            view.copy_(part)
    if tensors:
        raise UserError(f"the adapter has unexpected tensors: {sorted(tensors)[:3]}")
    return layout, flat


def _take(tensors: dict[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise UserError(f"the adapter has no tensor {name}")
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, this model needs {tuple(shape)}")
    return tensor


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {CONFIG_FILE}: {reason(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{CONFIG_FILE} does not describe a LoRA adapter")
    if config.get("use_dora") or config.get("use_rslora") or config.get("rank_pattern"):
        raise UserError("DoRA, rank-stabilised and per-layer-rank adapters are not supported")
    return config


def _spec_of(config: dict[str, Any], model: ModelShape) -> LoraSpec:
    """Which parts are adapted, as its targets say; a part is adapted whole."""
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
    if not isinstance(targets, list) or not isinstance(parameters, list):
        raise UserError(f"{CONFIG_FILE}: target_modules must be a list of names")
    found = {*targets, *parameters}
    known: dict[Part, set[str]] = {part: set() for part in Part}
    for group in model.adapted_groups:
        known[group.part].update(each.target for each in group.projections)
    if any(names & found and not names <= found for names in known.values()):
        raise UserError(f"target_modules {targets} cover only a part of a layer group")
    if unknown := sorted(found.difference(*known.values())):
        raise UserError(f"target_modules has unknown names {unknown}")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1:
            raise ValueError(f"rank {rank}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{CONFIG_FILE}: bad r or lora_alpha: {error}") from None
    return LoraSpec(
        rank=rank,
        seed=0,
        alpha=alpha,
        train_attn=bool(known[Part.ATTN] & found),
        train_mlp=bool(known[Part.MLP] & found),
        train_unembed=bool(known[Part.UNEMBED] & found),
    )
