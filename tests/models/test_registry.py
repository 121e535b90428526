"""Finding served models and describing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.backends.fake import FakeBackend
from training.config import EMBEDDED_MODEL, ModelConfig, TrainingConfig
from training.core.errors import ConfigError
from training.models import registry
from training.models.registry import find_snapshot, resolve_model_path, served_model_info

NAME = "tests/model"
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "eos_token_id": 7,
}


def write_model(directory: Path, **files: dict[str, Any]) -> Path:
    """Files by name without ``.json``, around a good ``config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config": HF_CONFIG} | files).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(model_dir=tmp_path / "models")


def write_snapshot(cache: Path, commit: str = "c" * 40) -> Path:
    repository = cache / "models--tests--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return write_model(repository / "snapshots" / commit)


def test_a_context_length_under_another_name(config: TrainingConfig, tmp_path: Path) -> None:
    values = {key: value for key, value in HF_CONFIG.items() if key != "max_position_embeddings"}
    model = ModelConfig(name=NAME, path=write_model(tmp_path, config=values | {"n_positions": 64}))
    assert served_model_info(model, config).context_length == 64


def test_an_explicit_path_wins(config: TrainingConfig, tmp_path: Path) -> None:
    write_model(config.model_dir / NAME)
    mine = write_model(tmp_path / "mine")
    assert resolve_model_path(ModelConfig(name=NAME, path=mine), config) == mine


def test_an_explicit_path_without_a_model_is_an_error(
    config: TrainingConfig, tmp_path: Path
) -> None:
    write_model(config.model_dir / NAME)
    with pytest.raises(ConfigError, match=r"nothing has no config\.json"):
        resolve_model_path(ModelConfig(name=NAME, path=tmp_path / "nothing"), config)


def test_the_model_directory_comes_before_the_cache(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_snapshot(tmp_path / "hub")
    monkeypatch.setattr(find_snapshot, "__defaults__", (tmp_path / "hub",))
    assert resolve_model_path(ModelConfig(name=NAME), config) == snapshot
    local = write_model(config.model_dir / NAME)
    assert resolve_model_path(ModelConfig(name=NAME), config) == local


def test_a_snapshot_without_weights_is_not_a_model(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_snapshot(tmp_path / "hub") / "model.safetensors").unlink()
    monkeypatch.setattr(find_snapshot, "__defaults__", (tmp_path / "hub",))
    with pytest.raises(ConfigError, match=f"run `tinkercloud models prepare {NAME}`"):
        resolve_model_path(ModelConfig(name=NAME), config)


def test_the_embedded_model_says_how_it_is_prepared(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="not prepared yet: run `tinkercloud models prepare`"):
        resolve_model_path(ModelConfig(name=EMBEDDED_MODEL), config)


def test_the_embedded_model_is_described_without_torch(embedded_model: Path) -> None:
    config = TrainingConfig(model_dir=embedded_model.parent.parent)
    info = served_model_info(config.served_models()[0], config)
    assert info.directory == embedded_model
    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.context_length, info.eos_token_ids) == (49_152, 8192, (2,))
    assert info.tokenizer_files == (
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"generation_config": {"eos_token_id": 3}}, (3,)),
        ({"generation_config": {}}, (7,)),
        ({}, (7,)),
        (
            {
                "config": HF_CONFIG | {"eos_token_id": None},
                "tokenizer_config": {"eos_token": {"content": "<end>"}},
                "tokenizer": {
                    "added_tokens": [
                        {"id": 8, "content": "<start>"},
                        {"id": 9, "content": "<end>"},
                    ]
                },
            },
            (9,),
        ),
    ],
)
def test_end_tokens_come_from_the_first_source_that_names_any(
    config: TrainingConfig,
    tmp_path: Path,
    files: dict[str, dict[str, Any]],
    expected: tuple[int, ...],
) -> None:
    directory = write_model(tmp_path / "model", **files)
    info = served_model_info(ModelConfig(name=NAME, path=directory), config)
    assert info.eos_token_ids == expected


def test_context_length_may_be_lowered_but_not_raised(
    config: TrainingConfig, tmp_path: Path
) -> None:
    directory = write_model(tmp_path / "model")
    lower = ModelConfig(name=NAME, path=directory, context_length=512)
    assert served_model_info(lower, config).context_length == 512
    higher = ModelConfig(name=NAME, path=directory, context_length=4096)
    with pytest.raises(ConfigError, match="4096 is over the model's own 2048"):
        served_model_info(higher, config)


@pytest.mark.parametrize("vocab_size", [None, 0, "many"])
def test_a_config_that_says_nothing_usable_is_refused(
    config: TrainingConfig, tmp_path: Path, vocab_size: object
) -> None:
    directory = write_model(tmp_path / "model", config=HF_CONFIG | {"vocab_size": vocab_size})
    with pytest.raises(ConfigError, match=r"config\.json has no usable vocab_size"):
        served_model_info(ModelConfig(name=NAME, path=directory), config)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_fake_is_described_as_it_describes_itself(
    config: TrainingConfig, embedded_model: Path, with_tokenizer: bool
) -> None:
    path = embedded_model if with_tokenizer else None
    model = ModelConfig(name=NAME, backend="fake", path=path)
    info = served_model_info(model, config)
    own = FakeBackend(model, config).capabilities()
    assert info.directory == path
    assert (info.vocab_size, info.context_length, info.eos_token_ids) == (
        own.vocab_size,
        own.context_length,
        own.eos_token_ids,
    )


def test_a_failed_preparation_is_a_configuration_error(
    config: TrainingConfig, tmp_path: Path
) -> None:
    (tmp_path / "models").write_text("a file where a directory belongs")
    with pytest.raises(ConfigError, match="failed with exit code"):
        registry.ensure_embedded_model(config)
