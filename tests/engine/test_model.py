"""Reading checkpoints: what is computed equals transformers, what is not is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.engine.checkpoints import CONFIGS, LLAMA3_ROPE, SHAPE, VOCAB_SIZE, make_checkpoint
from tests.engine.devices import CPU, DEVICES
from training.core.errors import ConfigError
from training.engine.attention import PackedAttention
from training.engine.model import ModelConfig, Transformer
from training.engine.model_config import Rope

VALUES: Mapping[str, Any] = {**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-5}


def load(path: Path, device: torch.device = CPU) -> Transformer:
    return Transformer.from_directory(path, device, torch.float32)


def logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    length = len(tokens)
    attention = PackedAttention([[length]], model.config.windows)
    with torch.no_grad():
        device = model.device
        positions = torch.arange(length, device=device)
        hidden = model.hidden(tokens.to(device), positions, [], attention)
        return model.logits(hidden, []).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_those_of_transformers(name: str, device: torch.device, tmp_path: Path) -> None:
    make_checkpoint(name, tmp_path)
    tokens = torch.randint(VOCAB_SIZE, (70,), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    found = logits(load(tmp_path, device), tokens)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def test_a_sharded_checkpoint_is_the_same(tmp_path: Path) -> None:
    whole = make_checkpoint("llama", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    tokens = torch.arange(20)
    assert torch.equal(logits(load(tmp_path / "sharded"), tokens), logits(load(whole), tokens))


def test_bfloat16_is_as_near_to_fp32_as_transformers_is(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    tokens = torch.arange(30)
    exact = logits(load(tmp_path), tokens)
    ours = logits(Transformer.from_directory(tmp_path, CPU, torch.bfloat16), tokens)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = reference(tokens[None]).logits[0]
    assert ours.dtype == torch.float32
    assert (ours.float() - exact).norm() < 1.2 * (theirs.float() - exact).norm()


def test_missing_unexpected_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.extra.weight": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="unexpected tensors"):
        load(tmp_path)
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match="has shape"):
        load(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="no tensor"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match="only safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rms_norm_eps": None, "hidden_size": None}, "config.json"),
    ],
)
def test_unsupported_configs_are_refused(change: Mapping[str, Any], message: str) -> None:
    values = {key: value for key, value in {**VALUES, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_values(values, {})


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (5, 6)
    assert ModelConfig.from_values({**VALUES, "eos_token_id": None}, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, Rope(10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, Rope(2e4)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
         Rope(1e4, "linear", 2.0)),
        ({"rope_parameters": dict(LLAMA3_ROPE)}, Rope(1e4, "llama3", 8.0, 1.0, 4.0, 32)),
    ],
)  # fmt: skip
def test_rope_in_old_and_new_configs(spelling: Mapping[str, Any], expected: Rope) -> None:
    assert ModelConfig.from_values({**VALUES, **spelling}, {}).rope == expected


@pytest.mark.parametrize("parameters", [{"rope_type": "linear", "factor": 4.0}, LLAMA3_ROPE])
def test_rope_frequencies_are_those_of_transformers(parameters: Mapping[str, Any]) -> None:
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10000.0, **parameters})
    expected, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU)
    rope = ModelConfig.from_values({**config.to_dict()}, {}).rope
    head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    torch.testing.assert_close(rope.inverse_frequencies(head_dim), expected, rtol=1e-6, atol=0)


def test_sliding_windows_by_layer() -> None:
    qwen = {**VALUES, "model_type": "qwen2", "sliding_window": 8, "num_hidden_layers": 3}
    assert ModelConfig.from_values(qwen, {}).windows == (None, None, None)
    qwen |= {"use_sliding_window": True, "max_window_layers": 2}
    assert ModelConfig.from_values(qwen, {}).windows == (None, None, 8)
    qwen |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    assert ModelConfig.from_values(qwen, {}).windows == (8, None, None)
    mistral = {**VALUES, "model_type": "mistral", "sliding_window": 8}
    assert ModelConfig.from_values(mistral, {}).windows == (8, 8)
