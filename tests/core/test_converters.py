from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tinker import types

from tests.wire.strategies import CAPABILITIES
from training.backends.base import AdamParams, LoraSpec
from training.core.converters import to_adam_params, to_lora_spec, to_optimizer_family
from training.core.errors import InvalidRequest, Unsupported
from training.wire.json_base import parse_json
from training.wire.requests import LoraConfigJson, OptimizerConfigJson, OptimizerParamsJson


def test_defaults_are_the_sdk_defaults() -> None:
    ours = to_adam_params(OptimizerParamsJson(), "adamw")
    assert dataclasses.asdict(ours) == types.AdamParams().model_dump()
    assert ours == AdamParams()


def test_adam_params_arrive() -> None:
    theirs = types.AdamParams(
        learning_rate=1, beta1=0, beta2=0.5, eps=0, weight_decay=0.1, grad_clip_norm=2
    )
    read = parse_json(OptimizerParamsJson, theirs.model_dump_json().encode())
    assert to_adam_params(read, "adamw") == AdamParams(1.0, 0.0, 0.5, 0.0, 0.1, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1e-9}, "learning_rate must be a finite number, at least 0"),
        ({"beta1": 1.0}, "beta1 must be .* less than 1, not 1.0"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
    ],
)
def test_adam_params_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        to_adam_params(OptimizerParamsJson(**change), "adamw")


def test_optimizer_families() -> None:
    assert to_optimizer_family(None, CAPABILITIES) == "adamw"
    assert to_optimizer_family(OptimizerConfigJson(), CAPABILITIES) == "adamw"
    with pytest.raises(Unsupported, match="optimizer 'dimuon' is not offered; offered: adamw"):
        to_optimizer_family(OptimizerConfigJson(type="dimuon"), CAPABILITIES)
    with pytest.raises(Unsupported, match="trains with adamw; it cannot take a step of 'dimuon'"):
        to_adam_params(OptimizerParamsJson(type="dimuon"), "adamw")


def test_lora_spec() -> None:
    theirs = types.LoraConfig(rank=8, seed=2**63, train_mlp=False)
    read = parse_json(LoraConfigJson, theirs.model_dump_json(exclude_none=True).encode())
    assert to_lora_spec(read, CAPABILITIES, 7) == LoraSpec(rank=8, seed=1, train_mlp=False)
    assert to_lora_spec(LoraConfigJson(rank=64), CAPABILITIES, 7) == LoraSpec(rank=64, seed=7)


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(InvalidRequest, match=f"lora_config.rank must be 1 to 64, not {rank}"):
        to_lora_spec(LoraConfigJson(rank=rank), CAPABILITIES, 7)


def test_layer_groups() -> None:
    nothing = LoraConfigJson(train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(InvalidRequest, match="at least one of"):
        to_lora_spec(nothing, CAPABILITIES, 7)
    fewer = dataclasses.replace(CAPABILITIES, layer_groups=frozenset({"attn", "mlp"}))
    with pytest.raises(Unsupported, match="train_unembed is not offered for example/model"):
        to_lora_spec(LoraConfigJson(), fewer, 7)
    assert to_lora_spec(LoraConfigJson(train_unembed=False), fewer, 7).train_unembed is False


def test_full_fine_tuning_is_not_offered() -> None:
    with pytest.raises(Unsupported, match="LoRA adapters only"):
        to_lora_spec(None, CAPABILITIES, 7)
