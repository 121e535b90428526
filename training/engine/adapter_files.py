"""Adapters on disk, in PEFT's layout: ``adapter_model.safetensors`` + ``adapter_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.backends.base import LoraSpec
from training.core.errors import UserError
from training.engine.adapter import UNEMBED_LAYER, Adapter, AdapterLayout
from training.engine.model_config import ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBED = ("lm_head",)


def tensor_name(layer: int, projection: str, matrix: str) -> str:
    """PEFT's name of ``lora_A`` or ``lora_B`` of a projection."""
    prefix = "base_model.model."
    if layer == UNEMBED_LAYER:
        return f"{prefix}{projection}.{matrix}.weight"
    block = "self_attn" if projection in ATTENTION else "mlp"
    return f"{prefix}model.layers.{layer}.{block}.{projection}.{matrix}.weight"


def write_adapter(
    directory: Path, layout: AdapterLayout, flat: torch.Tensor, base_model: str
) -> None:
    """Writes both files; ``flat`` is [num_params], usually the fp32 masters."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for (layer, projection), (a, b) in layout.matrices(flat.detach().cpu()).items():
        tensors[tensor_name(layer, projection, "lora_A")] = a.clone()
        tensors[tensor_name(layer, projection, "lora_B")] = b.clone()
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = adapter_config(layout.spec, base_model)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def adapter_config(spec: LoraSpec, base_model: str) -> dict[str, Any]:
    """What PEFT reads back as a ``LoraConfig``."""
    targets = list(ATTENTION) if spec.train_attn else []
    targets += MLP if spec.train_mlp else ()
    targets += UNEMBED if spec.train_unembed else ()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_adapter(
    directory: Path,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    base_model: str | None = None,
) -> Adapter:
    """An adapter ready to compute with; raises ``UserError`` where the files do not fit."""
    layout, flat = read_adapter(directory, model_config, base_model)
    return Adapter(layout, flat.to(device=device, dtype=dtype))


def read_adapter(
    directory: Path, model_config: ModelConfig, base_model: str | None = None
) -> tuple[AdapterLayout, torch.Tensor]:
    """The layout and its fp32 weights [num_params] on the CPU.

    With ``base_model`` given, an adapter made for another one is refused.
    """
    config = _read_config(directory)
    made_for = config.get("base_model_name_or_path")
    if base_model is not None and made_for not in (None, base_model):
        raise UserError(f"the adapter was made for {made_for!r}, not for {base_model!r}")
    layout = AdapterLayout.of(model_config, _spec_of(config))
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {WEIGHTS_FILE}: {error}") from error
    flat = torch.empty(layout.num_params)
    for (layer, projection), pair in layout.matrices(flat).items():
        for matrix, view in zip(("lora_A", "lora_B"), pair, strict=True):
            _copy(tensors, tensor_name(layer, projection, matrix), view)
    if tensors:
        raise UserError(f"the adapter has unexpected tensors: {sorted(tensors)[:3]}")
    return layout, flat


def _copy(tensors: dict[str, torch.Tensor], name: str, into: torch.Tensor) -> None:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise UserError(f"the adapter has no tensor {name}")
    if tensor.shape != into.shape:
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}, this model needs {tuple(into.shape)}"
        )
    into.copy_(tensor)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {CONFIG_FILE}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{CONFIG_FILE} does not describe a LoRA adapter")
    if config.get("use_dora") or config.get("use_rslora") or config.get("rank_pattern"):
        raise UserError("DoRA, rank-stabilised and per-layer-rank adapters are not supported")
    return config


def _spec_of(config: dict[str, Any]) -> LoraSpec:
    """Which groups are adapted, as their target modules say; a group is adapted whole."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        raise UserError(f"{CONFIG_FILE}: target_modules must be a list of names")
    present = {group: [name in targets for name in group] for group in (ATTENTION, MLP, UNEMBED)}
    if any(any(flags) and not all(flags) for flags in present.values()):
        raise UserError(f"target_modules {targets} cover only a part of a layer group")
    if unknown := sorted(set(targets) - {*ATTENTION, *MLP, *UNEMBED}):
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
        train_attn=any(present[ATTENTION]),
        train_mlp=any(present[MLP]),
        train_unembed=any(present[UNEMBED]),
    )
