"""Tiny random checkpoints of every supported architecture, and PEFT models to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 300
SHAPE: Mapping[str, Any] = {  # a multiple of 32 in each head, as the native kernels want
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE: Mapping[str, Any] = {
    **SHAPE,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "initializer_range": 0.05,
}
CONFIGS: Mapping[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA3_ROPE)),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "wide": LlamaConfig(**WIDE),
}
"""What ``model.Transformer`` computes."""
FOREIGN_SHAPE: Mapping[str, Any] = {
    **SHAPE,
    "hidden_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
YARN: Mapping[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
FOREIGN_CONFIGS: Mapping[str, PretrainedConfig] = {
    "gemma": GemmaConfig(**FOREIGN_SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**FOREIGN_SHAPE, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**FOREIGN_SHAPE, head_dim=16, sliding_window=8),
    "mixtral": MixtralConfig(**FOREIGN_SHAPE, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **FOREIGN_SHAPE,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**FOREIGN_SHAPE, "num_key_value_heads": 4},
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "gpt-oss": GptOssConfig(
        **FOREIGN_SHAPE,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt-neox": GPTNeoXConfig(**FOREIGN_SHAPE),
    "gpt2": GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=VOCAB_SIZE, n_positions=256,
        bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    ),
    "phi": PhiConfig(**FOREIGN_SHAPE),
    "llama-yarn": LlamaConfig(**FOREIGN_SHAPE, rope_parameters=dict(YARN)),
}  # fmt: skip
"""What runs as modules of transformers."""


def make_checkpoint(name: str, directory: Path) -> Path:
    """Writes a random fp32 checkpoint, the same one for the same name; norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **FOREIGN_CONFIGS}[name])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory
