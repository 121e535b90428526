"""Adapters on disk: what is written is read back, what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.checkpoints import make_checkpoint
from tests.engine.training_cases import ALL, ATTN, BASE_MODEL, CPU, MLP, UNEMBED, make_trainer
from training.backends.base import LoraSpec
from training.core.errors import UserError
from training.engine.adapter import UNEMBED_LAYER, Group
from training.engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from training.engine.projections import ModelShape
from training.engine.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    checkpoint = make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))
    return make_trainer(checkpoint, ALL, ATTN, MLP, UNEMBED)


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(trainer: Trainer, tmp_path: Path, slot: int, dtype: torch.dtype) -> None:
    trainer.capture_adapter(slot).write(tmp_path)
    adapter = load_adapter(tmp_path, trainer.model.config, CPU, dtype, BASE_MODEL)
    held = trainer.slot(slot)
    assert torch.equal(adapter.flat, held.weights.to(dtype))
    assert adapter.layout.places == held.layout.places
    assert (adapter.rank, adapter.scale) == (held.adapter.rank, held.adapter.scale)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_masters_are_written_in_fp32_under_peft_names(trainer: Trainer, tmp_path: Path) -> None:
    trainer.capture_adapter(0).write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    first = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert (first.dtype, tuple(first.shape)) == (torch.float32, (4, 128))
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in tensors
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    assert len(tensors) == 2 * (2 * 7 + 1)


def set_value(key: str, value: object) -> Callable[[Config], None]:
    return lambda config: config.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("target_modules", ["q_proj", "v_proj"]), "only a part of a layer group"),
        (set_value("target_modules", "all-linear"), "must be a list"),
        (set_value("target_modules", ["w1"]), "unknown names"),
        (set_value("peft_type", "IA3"), "does not describe a LoRA"),
        (set_value("use_dora", True), "not supported"),
        (set_value("r", "many"), "bad r or lora_alpha"),
        (set_value("r", 0), "bad r or lora_alpha"),
        (set_value("r", 5), "has shape"),
        (set_value("base_model_name_or_path", "x/y"), "made for 'x/y'"),
    ],
)
def test_unfit_configs_are_refused(
    trainer: Trainer, tmp_path: Path, change: Callable[[Config], None], message: str
) -> None:
    trainer.capture_adapter(0).write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    change(config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path, trainer.model.config, CPU, torch.float32, BASE_MODEL)


def test_missing_extra_and_damaged_tensors_are_refused(trainer: Trainer, tmp_path: Path) -> None:
    def load(config: ModelShape = trainer.model.config) -> None:
        load_adapter(tmp_path, config, CPU, torch.float32)

    trainer.capture_adapter(0).write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="unexpected tensors"):
        load()
    tensors.popitem()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="has no tensor"):
        load()
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read"):
        load()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"cannot read {name}: the file is not there") as gone:
            load()
        assert str(tmp_path) not in str(gone.value)


def test_views_share_the_flat_buffer(trainer: Trainer) -> None:
    adapter = trainer.slot(0).adapter
    a, b, out_sizes = trainer.slot(0).layout.views(adapter.flat)[0, Group.QKV]
    assert tuple(a.shape) == (3 * 4, 128)
    assert tuple(b.shape) == (sum(out_sizes), 4)
    matrices = {each.path: pair for each, *pair in adapter.layout.matrices(adapter.flat)}
    k_proj = matrices["model.layers.0.self_attn.k_proj"]
    assert k_proj[0].data_ptr() == a[4:8].data_ptr()
    assert k_proj[1].data_ptr() == b[out_sizes[0] :].data_ptr()
    sizes = [a.numel() + b.numel() for a, b in matrices.values()]
    assert sum(sizes) == adapter.flat.numel()


def test_an_adapter_has_only_the_groups_it_trains(trainer: Trainer) -> None:
    attn, mlp = trainer.slot(1).adapter, trainer.slot(2).adapter
    assert attn.group(0, Group.O) is not None
    assert attn.group(0, Group.DOWN) is None
    assert mlp.group(1, Group.GATE_UP) is not None
    assert mlp.group(UNEMBED_LAYER, Group.UNEMBED) is None
    assert LoraSpec(4, 0).alpha / 4 == trainer.slot(0).adapter.scale
