"""Architectures that run as modules of transformers: trained against transformers + PEFT."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from tests.engine.checkpoints import FOREIGN_CONFIGS, make_checkpoint
from tests.engine.peft_cases import assert_gradients_are_those_of_peft
from tests.engine.training_cases import (
    ALL,
    ATTN,
    BASE_MODEL,
    CPU,
    MLP,
    UNEMBED,
    finish,
    gradient,
    make_trainer,
    relative_error,
    sft_op,
    unit,
)
from training.backends.base import AdamParams, LoraSpec
from training.config import EngineConfig
from training.core.errors import ConfigError, UserError
from training.engine.adapter import AdapterLayout
from training.engine.adapter_files import load_adapter
from training.engine.foreign import ForeignDecoder
from training.engine.load import load_decoder
from training.engine.model import Transformer
from training.engine.projections import Part
from training.engine.trainer import Trainer

LENGTHS = (20, 33, 20, 7, 40)
EXPERTS = "mixtral"


def foreign_trainer(
    checkpoint: Path,
    *specs: LoraSpec,
    micro_batch_tokens: int = 2048,
    join: bool = False,
    activation_memory_bytes: int | None = None,
) -> Trainer:
    return make_trainer(
        checkpoint,
        *specs,
        micro_batch_tokens=micro_batch_tokens,
        join_operations=join,
        activation_memory_bytes=activation_memory_bytes,
        kind=ForeignDecoder,
    )


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT's, about GPT-2's linears
@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, ALL) for name in FOREIGN_CONFIGS]
    + [(EXPERTS, spec) for spec in (ATTN, MLP, UNEMBED)]
    + [("gemma2", UNEMBED)],
)
def test_logprobs_and_gradients(name: str, spec: LoraSpec, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name, tmp_path)
    trainer = foreign_trainer(checkpoint, spec, micro_batch_tokens=64)
    assert_gradients_are_those_of_peft(trainer, checkpoint, sft_op(0, LENGTHS))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3-tied"])
def test_both_paths_agree(name: str, tmp_path: Path) -> None:
    """The architectures that we compute ourselves, on the general path: the same files fit both."""
    checkpoint = make_checkpoint(name, tmp_path)
    ours, general = make_trainer(checkpoint, ALL), foreign_trainer(checkpoint, ALL)
    found = [finish(each.forward_backward(unit(sft_op(0, LENGTHS)))) for each in (ours, general)]
    for a, b in zip(found[0][0].logprobs, found[1][0].logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    paths = [
        {member.path: pair for member, *pair in each.slot(0).layout.matrices(gradient(each))}
        for each in (ours, general)
    ]
    assert paths[0].keys() == paths[1].keys()


# --------------------------------------------------------------------------- the trainer


def test_adapters_of_all_shapes_in_one_pass(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(EXPERTS, tmp_path)
    specs = (ALL, ATTN, MLP, UNEMBED, LoraSpec(16, 8, train_unembed=False))
    ops = [sft_op(slot, (11 + slot, 30, 30), slot) for slot in range(len(specs))]
    joined = foreign_trainer(checkpoint, *specs, join=True)
    outputs = finish(joined.forward_backward(unit(*ops)))
    for slot, op in enumerate(ops):
        alone = foreign_trainer(checkpoint, *specs)
        (output,) = finish(alone.forward_backward(unit(op)))
        assert relative_error(gradient(joined, slot), gradient(alone, slot)) < 2e-6
        for found, expected in zip(outputs[slot].logprobs, output.logprobs, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", EXPERTS])
def test_a_long_sequence_alone_and_checkpointed(name: str, tmp_path: Path) -> None:
    """Slot 1's rows are computed last, so a layer computed again must find slot 0's adapter."""
    checkpoint = make_checkpoint(name, tmp_path)
    whole = foreign_trainer(checkpoint, ALL, MLP)
    cut = foreign_trainer(checkpoint, ALL, MLP, micro_batch_tokens=64, activation_memory_bytes=1)
    for trainer in (whole, cut):
        finish(trainer.forward_backward(unit(sft_op(0, (200,)), sft_op(1, (90,)))))
    for slot in (0, 1):
        assert torch.equal(gradient(whole, slot), gradient(cut, slot))


def test_state_and_adapter_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("gpt-oss", tmp_path)
    trainer = foreign_trainer(checkpoint, ALL)
    finish(trainer.forward_backward(unit(sft_op(0, LENGTHS))))
    trainer.optim_step({0: AdamParams(1e-2)})
    weights = trainer.slot(0).weights.clone()
    trainer.capture_state(0).write(tmp_path / "state")
    trainer.capture_adapter(0).write(tmp_path / "exported")
    restored = foreign_trainer(checkpoint)
    restored.load_slot(0, ALL, tmp_path / "state")
    assert torch.equal(restored.slot(0).weights, weights)
    shape = trainer.model.config
    adapter = load_adapter(tmp_path / "exported", shape, CPU, torch.float32, BASE_MODEL)
    assert torch.equal(adapter.flat, weights)


# --------------------------------------------------------------------------- choice and refusals


def test_who_computes_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama = make_checkpoint("llama", tmp_path / "llama")
    gemma = make_checkpoint("gemma", tmp_path / "gemma")
    with caplog.at_level(logging.WARNING, logger="training"):
        assert isinstance(load_decoder(llama, EngineConfig(), CPU, torch.float32), Transformer)
        assert not caplog.records
        assert isinstance(load_decoder(gemma, EngineConfig(), CPU, torch.float32), ForeignDecoder)
    (record,) = caplog.records
    assert "GemmaForCausalLM" in record.getMessage()
    assert "slower" in record.getMessage()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no-such"}, "cannot load"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"num_hidden_layers": 3}, "lacks"),
    ],
)
def test_unusable_checkpoints_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("gemma", tmp_path)
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=message):
        load_decoder(checkpoint, EngineConfig(), CPU, torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=50), "no linears"),
        (BloomConfig(n_layer=2, hidden_size=32, n_head=2, vocab_size=50), "none of"),
    ],
)
def test_unusable_architectures_are_refused(config: object, message: str) -> None:
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=message):
        ForeignDecoder(model)


class _StrangeExperts(torch.nn.Module):
    """Experts in a parameter, outside of transformers' interface for them."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mixing = torch.nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def test_mlp_of_an_unknown_kind_is_refused_and_the_rest_is_not(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("gemma", tmp_path))
    for layer in model.model.layers:
        layer.mlp = _StrangeExperts(layer.mlp)
    shape = ForeignDecoder(model).config
    assert set(shape.unadaptable) == {Part.MLP}
    with pytest.raises(UserError, match="train_mlp must be off"):
        AdapterLayout.of(shape, ALL)
    assert AdapterLayout.of(shape, ATTN).num_params > 0
