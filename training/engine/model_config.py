"""Shape of a Llama-family decoder, read from a Hugging Face ``config.json``.

Everything the forward pass does not implement is refused here with a ``ConfigError``: a model is
computed exactly or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from training.core.errors import ConfigError
from training.engine.projections import UNEMBED_LAYER, AdaptedGroup, Group, Part, Projection


class UnsupportedModelError(ConfigError):
    """A sound config of a model that this forward pass does not compute; others may."""


QK_NORM_TYPES = frozenset({"qwen3"})
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency, and how it is stretched.

    ``kind`` is ``default``, ``linear`` (``factor``) or ``llama3`` (all fields; Llama 3.1).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """float32 [head_dim / 2]."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (self.theta**exponents)
        if self.kind == "default":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.factor
        return self._llama3(frequencies)

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Long wavelengths are stretched by ``factor``, short ones kept, the middle blended."""
        wavelengths = 2 * math.pi / frequencies
        longest_kept = self.original_context_length / self.high_freq_factor
        shortest_stretched = self.original_context_length / self.low_freq_factor
        span = self.high_freq_factor - self.low_freq_factor
        kept_share = (self.original_context_length / wavelengths - self.low_freq_factor) / span
        blended = (1 - kept_share) * frequencies / self.factor + kept_share * frequencies
        stretched = torch.where(
            wavelengths > shortest_stretched, frequencies / self.factor, frequencies
        )
        middle = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
        return torch.where(middle, blended, stretched)


@dataclass(frozen=True)
class ModelConfig:
    """``windows[layer]`` is the number of positions a query sees (itself included), or None."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @cached_property
    def adapted_groups(self) -> tuple[AdaptedGroup, ...]:
        """See ``projections.ModelShape``."""
        hidden = self.hidden_size
        layers = [group for layer in range(self.num_layers) for group in self._layer_groups(layer)]
        head = Projection("lm_head", "lm_head", hidden, self.vocab_size)
        return (*layers, AdaptedGroup(UNEMBED_LAYER, Group.UNEMBED, Part.UNEMBED, (head,)))

    @property
    def unadaptable(self) -> Mapping[Part, str]:
        return {}

    def _layer_groups(self, layer: int) -> Iterator[AdaptedGroup]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        groups = [
            (Group.QKV, Part.ATTN, qkv, hidden),
            (Group.O, Part.ATTN, {"o_proj": hidden}, q_size),
            (Group.GATE_UP, Part.MLP, {"gate_proj": inner, "up_proj": inner}, hidden),
            (Group.DOWN, Part.MLP, {"down_proj": hidden}, inner),
        ]
        for group, part, out_sizes, in_size in groups:
            block = "self_attn" if part is Part.ATTN else "mlp"
            prefix = f"model.layers.{layer}.{block}."
            members = [
                Projection(prefix + name, name, in_size, out_size)
                for name, out_size in out_sizes.items()
            ]
            yield AdaptedGroup(layer, group, part, tuple(members))

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Reads ``config.json`` and, for the end tokens, ``generation_config.json``."""
        values = _read_json(path / "config.json")
        generation_path = path / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return cls.from_values(values, generation)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        model_type = values.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"model type {model_type!r} is not supported; supported are {sorted(MODEL_TYPES)}"
            )
        _refuse_unsupported(values)
        try:
            num_heads = int(values["num_attention_heads"])
            hidden_size = int(values["hidden_size"])
            return cls(
                model_type=model_type,
                num_layers=int(values["num_hidden_layers"]),
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
                head_dim=int(values.get("head_dim") or hidden_size // num_heads),
                intermediate_size=int(values["intermediate_size"]),
                vocab_size=int(values["vocab_size"]),
                context_length=int(values["max_position_embeddings"]),
                norm_eps=float(values["rms_norm_eps"]),
                rope=_rope(values),
                windows=_windows(values),
                qk_norm=model_type in QK_NORM_TYPES,
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                eos_token_ids=_eos_token_ids(values, generation),
            )
        except KeyError as error:
            raise ConfigError(f"the model's config.json lacks {error}") from None


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(f"activation {activation!r} is not supported, only 'silu'")
    if values.get("quantization_config") is not None:
        raise ConfigError("quantized checkpoints are not supported; use a bf16 or fp32 one")
    if float(values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial rotary embeddings are not supported")


def _rope(values: Mapping[str, Any]) -> Rope:
    """transformers 5 writes ``rope_parameters``; 4 wrote ``rope_theta`` and ``rope_scaling``."""
    parameters: Mapping[str, Any] = (
        values.get("rope_parameters") or values.get("rope_scaling") or {}
    )
    theta = float(parameters.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(
        f"rope type {kind!r} is not supported; use default, linear or llama3"
    )


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Mistral applies ``sliding_window`` to all layers, Qwen where ``layer_types`` says so."""
    num_layers = int(values["num_hidden_layers"])
    window = values.get("sliding_window")
    if values["model_type"] == "llama" or window is None:
        return (None,) * num_layers
    if values["model_type"] == "mistral":
        return (int(window),) * num_layers
    if not values.get("use_sliding_window", False):
        return (None,) * num_layers
    if (types := values.get("layer_types")) is None:
        first = int(values.get("max_window_layers", num_layers))
        return tuple(int(window) if layer >= first else None for layer in range(num_layers))
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id", values.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return values
