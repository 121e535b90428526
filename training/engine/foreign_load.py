"""A causal language model of transformers from a local directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from training.core.errors import ConfigError


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Raises ``ConfigError`` where transformers has no such model, or the checkpoint is quantized,
    incomplete, or needs code of its own."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError("quantized checkpoints are not supported; use a bf16 or fp32 one")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConfigError(f"transformers cannot load {path}: {reason}") from error
    model, loading = loaded  # typed as the model alone
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"the checkpoint lacks {len(missing)} tensors: {missing[:3]}")
    placed: PreTrainedModel = model.to(device)
    return placed
