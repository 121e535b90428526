"""Open doors: told loudly on a network, and not opened at all in production."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import REPOSITORY, clean_environment, running_server
from training.api import create_app
from training.cli.options import load_config
from training.cli.serve import banner
from training.config import DEVELOPMENT_KEY, AuthConfig, ModelConfig, ServerConfig, TrainingConfig
from training.core.errors import ConfigError

GOOD = "0123456789abcdef"
FAKE = ModelConfig(name="tests/fake", backend="fake")

BAD: dict[str, dict[str, Any]] = {
    "authentication is off": {"enabled": False, "api_keys": [GOOD]},
    "built-in development key": {"api_keys": [DEVELOPMENT_KEY]},
    "everybody knows": {"api_keys": [GOOD, f"tml-{DEVELOPMENT_KEY}"]},
    "fewer than 16 characters": {"api_keys": [GOOD, GOOD[:-1]]},
    "a key has fewer than 16": {"api_keys": ["tml-" + GOOD[:-1]]},
}


def settings(auth: dict[str, Any], **more: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"auth": auth, "supported_models": [FAKE], **more})


@pytest.mark.parametrize("reason", BAD)
def test_production_refuses_what_strangers_could_use(reason: str) -> None:
    config = settings(BAD[reason], environment="production")
    with pytest.raises(ConfigError, match=reason) as caught:
        create_app(config)
    assert "TINKER_API_KEY" in str(caught.value)
    assert GOOD not in str(caught.value)
    create_app(settings(BAD[reason]))


def test_production_starts_with_good_keys(tmp_path: Path) -> None:
    auth = {"api_keys": [f"tml-{GOOD}"]}
    with running_server(tmp_path, {"environment": "production", "auth": auth}) as server:
        assert "auth.open" not in server.log_file.read_text()


@pytest.mark.parametrize("word", ["production", "PRODUCTION", "prod"])
@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_command_refuses_with_one_line_and_exit_code_2(
    tmp_path: Path, word: str, place: str
) -> None:
    """Whatever it listens to: a proxy in front makes loopback public."""
    in_file = {"environment": "production"} if place == "file" else {}
    path = tmp_path / "training.yaml"
    path.write_text(yaml.safe_dump({"supported_models": [FAKE.model_dump()], **in_file}))
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "training.cli", "serve", "--config", str(path)),
            *("--host", "127.0.0.1", "--port", "0"),
        ],
        env=clean_environment()
        | {"PYTHONPATH": str(REPOSITORY)}
        | ({"ENV": word} if place == "environment" else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "refusing to start in production" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", ["/root/.shrc", "staging", "", "test"])
def test_what_env_means_to_others_means_nothing_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENV", value)
    assert TrainingConfig.from_env().environment == "development"


@pytest.mark.parametrize("word", ["development", "dev", "", "staging"])
def test_no_variable_lowers_what_a_file_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENV", word)
    path = tmp_path / "training.yaml"
    path.write_text("environment: production")
    assert TrainingConfig.from_file(path).environment == "production"
    path.write_text("environment: development")
    monkeypatch.setenv("ENV", "production")
    assert TrainingConfig.from_file(path).environment == "production"


@pytest.mark.parametrize(
    ("word", "warned"),
    [
        ("produciton", True),
        ("live", True),
        (" [bold]staging ", True),
        ("/root/.shrc", False),
        ("dev", False),
        ("PRODUCTION", False),
        ("", False),
    ],
)
def test_a_word_that_counts_for_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    word: str,
    warned: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENV", word)
    config = load_config(None, host="127.0.0.1", models=[FAKE.name])
    assert config.unknown_env() == (word.strip() if warned else None)
    banner(config.model_copy(update={"supported_models": (FAKE,)}), 8000)
    assert (f"WARNING: ENV='{word.strip()}'" in capsys.readouterr().err) == warned


def test_the_log_tells_an_unknown_word_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENV", "produciton")
    with running_server(tmp_path, {"auth": {"api_keys": [GOOD]}}) as server:
        (line,) = [x for x in server.log_file.read_text().splitlines() if "environment.unk" in x]
    assert '"level": "warning"' in line
    assert '"env": "produciton"' in line


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.5", False),
        ("localhost.example.org", False),
    ],
)
def test_what_listens_to_a_network(host: str, local: bool) -> None:
    assert ServerConfig(host=host).is_loopback() == local


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    ("auth", "reason"),
    [
        ({"enabled": False}, "authentication is off"),
        ({}, "built-in development key"),
        ({"api_keys": [GOOD]}, None),
    ],
)
def test_the_banner_warns_loudly_on_a_network(
    capsys: pytest.CaptureFixture[str], host: str, auth: dict[str, Any], reason: str | None
) -> None:
    banner(settings(auth, server={"host": host}), 8000)
    printed = capsys.readouterr().err
    warned = reason is not None and host == "0.0.0.0"
    assert ("WARNING: this server listens to the network" in printed) == warned
    if warned:
        assert reason is not None
        assert reason in printed.split("WARNING")[1]


def test_the_log_warns_too(tmp_path: Path) -> None:
    with running_server(tmp_path, {"auth": {"api_keys": [DEVELOPMENT_KEY]}}) as server:
        (line,) = [line for line in server.log_file.read_text().splitlines() if "auth.open" in line]
    assert '"level": "warning"' in line
    assert "development key" in line


@pytest.mark.parametrize("key", ["", "tml-", " ", "tml- "])
def test_an_empty_key_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="a key is empty"):
        AuthConfig.model_validate({"api_keys": [GOOD, key]})
