"""The configuration tree: sources, precedence, refusals that name the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.config import EMBEDDED_MODEL, ENVIRONMENT, TrainingConfig
from training.core.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (*ENVIRONMENT, "TRAINING_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_default_serves_the_embedded_model_on_port_8000() -> None:
    config = TrainingConfig.from_env()
    assert config == TrainingConfig()
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert [model.name for model in config.served_models()] == [EMBEDDED_MODEL]
    assert config.storage.resolved_database_url().endswith("data/metadata/futures.db")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_is_read_and_the_environment_wins(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"training.{suffix}"
    path.write_text(
        json.dumps({"server": {"port": 1, "host": "h"}, "engine": {"dtype": "float32"}})
    )
    monkeypatch.setenv("TRAINING_PORT", "2")
    config = TrainingConfig.from_file(path)
    assert (config.server.host, config.server.port, config.engine.dtype) == ("h", 2, "float32")
    monkeypatch.setenv("TRAINING_CONFIG", str(path))
    assert TrainingConfig.from_env() == config


def test_lists_and_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("TINKER_API_KEY=one, two\nMETADATA_DIR=/meta\n")
    monkeypatch.setenv("SUPPORTED_MODELS", '["a/b", {"name": "c/d", "backend": "fake"}]')
    config = TrainingConfig.from_env()
    assert [key.get_secret_value() for key in config.auth.api_keys] == ["one", "two"]
    assert config.storage.metadata_dir == Path("/meta")
    assert [(m.name, m.backend) for m in config.served_models()] == [
        ("a/b", "local"),
        ("c/d", "fake"),
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"sever": {}}', "sever"),
        ('{"server": {"prot": 1}}', "server.prot"),
        ('{"server": {"port": 99999}}', "server.port"),
        ('{"server": {"max_arriving_bytes": 1000}}', "server: .*max_arriving_bytes is below"),
        ('{"supported_models": [{"name": "../../etc"}]}', "supported_models.0.name"),
        ('{"supported_models": [{"name": "a/b", "backend": "magic"}]}', "backend"),
        ("[1]", "mapping"),
        ("{", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=named):
        TrainingConfig.from_file(path)


def test_a_bad_environment_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPPORTED_MODELS", "not json")
    with pytest.raises(ConfigError, match="SUPPORTED_MODELS"):
        TrainingConfig.from_env()


def test_keys_do_not_show_in_the_configuration() -> None:
    assert "slime-dev-key" not in repr(TrainingConfig())
