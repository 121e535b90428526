"""The frozen base weights: read from safetensors, checked, and fused for the forward pass.

Linears that share an input are stored as one matrix (q, k, v; gate, up): one product instead of
three or two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from training.core.errors import ConfigError
from training.engine.model_config import ModelConfig

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, eq=False)
class Linear:
    """``weight`` [out, in], ``bias`` [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer; ``q_norm``/``k_norm`` [head_dim] only where the model has them.

    Norms are fp32 whatever the compute dtype: they multiply fp32 values.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """``head`` is ``embedding`` itself where the model ties them."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear


def load_weights(
    path: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> ModelWeights:
    """Reads every ``*.safetensors`` of ``path``; raises ``ConfigError`` where a tensor is missing,
    left over or of the wrong shape."""
    tensors = _read_tensors(path, device, dtype)
    weights = _Builder(tensors, config).build()
    if tensors:
        raise ConfigError(f"{path}: unexpected tensors {sorted(tensors)[:5]}")
    return weights


def _read_tensors(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    index_path = path / "model.safetensors.index.json"
    if index_path.exists():
        weight_map: Mapping[str, str] = json.loads(index_path.read_text())["weight_map"]
        files = sorted({path / name for name in weight_map.values()})
    else:
        files = [path / "model.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.exists():
            raise ConfigError(f"{path} has no {file.name}: only safetensors checkpoints are read")
        with safe_open(file, framework="pt", device=str(device)) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(IGNORED_SUFFIXES):
                    tensors[name] = reader.get_tensor(name).to(dtype)
    return tensors


class _Builder:
    """Takes tensors out of a dict by their Hugging Face names."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: ModelConfig) -> None:
        self.tensors = tensors
        self.config = config

    def build(self) -> ModelWeights:
        config = self.config
        vocab_shape = (config.vocab_size, config.hidden_size)
        embedding = self._take("model.embed_tokens.weight", vocab_shape)
        layers = tuple(self._layer(layer) for layer in range(config.num_layers))
        final_norm = self._norm("model.norm", config.hidden_size)
        if config.tie_word_embeddings:
            self.tensors.pop("lm_head.weight", None)  # some files carry the tied copy too
            head = Linear(embedding, None)
        else:
            head = Linear(self._take("lm_head.weight", vocab_shape), None)
        return ModelWeights(embedding, layers, final_norm, head)

    def _layer(self, layer: int) -> LayerWeights:
        config = self.config
        prefix = f"model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        has_norm = config.qk_norm
        return LayerWeights(
            input_norm=self._norm(f"{prefix}input_layernorm", hidden),
            qkv=self._linear(
                [
                    (f"{attention}q_proj", q_size),
                    (f"{attention}k_proj", kv_size),
                    (f"{attention}v_proj", kv_size),
                ],
                hidden,
            ),
            q_norm=self._norm(f"{attention}q_norm", config.head_dim) if has_norm else None,
            k_norm=self._norm(f"{attention}k_norm", config.head_dim) if has_norm else None,
            o=self._linear([(f"{attention}o_proj", hidden)], q_size),
            mlp_norm=self._norm(f"{prefix}post_attention_layernorm", hidden),
            gate_up=self._linear([(f"{mlp}gate_proj", inner), (f"{mlp}up_proj", inner)], hidden),
            down=self._linear([(f"{mlp}down_proj", hidden)], inner),
        )

    def _norm(self, name: str, size: int) -> torch.Tensor:
        return self._take(f"{name}.weight", (size,)).float()

    def _linear(self, parts: list[tuple[str, int]], in_size: int) -> Linear:
        weights = [self._take(f"{name}.weight", (out, in_size)) for name, out in parts]
        biases = [
            self._take(f"{name}.bias", (out,))
            for name, out in parts
            if f"{name}.bias" in self.tensors
        ]
        if biases and len(biases) != len(parts):
            raise ConfigError(f"only some of {[name for name, _ in parts]} have a bias")
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise ConfigError(f"the checkpoint has no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor
