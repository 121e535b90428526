"""Weights and configuration of a Llama model in GGUF, as transformers names and orders them.

transformers can read the file too, but only with accelerate installed and in thrice the time; a
test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from training.backends.base import Float32Array
from training.core.errors import ConfigError
from training.engine.gguf_file import GgufFile

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names inside ``blk.N`` -> transformers' inside ``model.layers.N``."""


class Weight(NamedTuple):
    name: str
    values: Float32Array


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of ``config.json``. Raises ``ConfigError`` for another kind of model."""
    if file.architecture != "llama" or "output.weight" in file.tensor_names:
        raise ConfigError(f"{file.name} is not a Llama model with tied embeddings")
    num_heads = file.model_value("attention.head_count")
    hidden_size = file.model_value("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": file.model_value("feed_forward_length"),
        "max_position_embeddings": file.model_value("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": file.model_value("block_count"),
        "num_key_value_heads": file.model_value("attention.head_count_kv"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(file.model_value("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_theta": _shortest(file.model_value("rope.freq_base")),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": file.model_value("vocab_size"),
    }


def _shortest(value: float) -> float:
    """The value as people wrote it: GGUF keeps float32, and 1e-5 comes back as 9.9999997e-06."""
    return float(str(np.float32(value)))


def read_weights(file: GgufFile, config: dict[str, Any]) -> Iterator[Weight]:
    """Every weight once, by its name in transformers. Raises ``ConfigError`` for an unknown one."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER_NAMES.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    if unknown := file.tensor_names - names.keys():
        raise ConfigError(f"{file.name} has unknown tensors: {', '.join(sorted(unknown))}")
    for theirs, ours in names.items():
        values = file.tensor(theirs)
        if num_heads := heads.get(theirs.split(".")[-2]):
            values = half_split_rotary(values, num_heads)
        yield Weight(ours, values)


def half_split_rotary(values_OI: Float32Array, num_heads: int) -> Float32Array:
    """Undoes llama.cpp's order of the rows of q and k. It rotates neighbouring pairs of a head's
    rows; transformers rotates row i with row i + head_dim / 2."""
    num_rows, num_columns = values_OI.shape
    pairs = values_OI.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(num_rows, num_columns)
