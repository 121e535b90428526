"""The console command, run as a user does; and the files that users copy from."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import yaml
from dotenv import dotenv_values
from pydantic import BaseModel
from rich.console import Console

from tests.servers import REPOSITORY, clean_environment
from training import cli
from training.cli import output
from training.cli.options import load_config
from training.cli.serve import banner, listening_socket
from training.config import EMBEDDED_MODEL, ENVIRONMENT, ModelConfig, TrainingConfig

FAKE = {"name": "tests/fake", "backend": "fake"}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Cli:
    """Runs the command in this process, in a directory and environment of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["tinkercloud", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        printed = self._capsys.readouterr()
        assert isinstance(code, int)
        return Ran(code, printed.out, printed.err)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: empty, and with no setting in the environment."""
    for variable in (*ENVIRONMENT, "TRAINING_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    return Cli(monkeypatch, capsys)


def write_config(directory: Path, **settings: object) -> str:
    path = directory / "training.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


# --------------------------------------------------------------------------- configuration


def test_arguments_win_over_environment_over_dotenv_over_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write_config(directory, server={"port": 1001, "host": "10.0.0.1"}))
    assert load_config(file).server.port == 1001
    (directory / ".env").write_text("TRAINING_PORT=1002\n")
    assert load_config(file).server.port == 1002
    monkeypatch.setenv("TRAINING_PORT", "1003")
    assert load_config(file).server.port == 1003
    config = load_config(file, port=1004, models=["tests/one", f"tests/two={directory}"])
    assert (config.server.port, config.server.host) == (1004, "10.0.0.1")
    assert config.supported_models == (
        ModelConfig(name="tests/one"),
        ModelConfig(name="tests/two", path=directory),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--config", "absent.yaml"], "cannot read configuration absent.yaml"),
        (["serve", "--config", "training.yaml"], "server.prot: Extra inputs are not permitted"),
        (["serve", "--model", "no-organization"], "expected NAME or NAME=DIRECTORY"),
        (["serve", "--port", "0", "--no-prepare"], "run `tinkercloud models prepare`"),
        (["serve", "--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1:0"),
        (["models", "prepare", "tests/nowhere"], "tests/nowhere cannot be downloaded"),
    ],
)
def test_a_bad_configuration_is_one_line_and_exit_code_2(
    run: Cli, directory: Path, arguments: Sequence[str], message: str
) -> None:
    write_config(directory, server={"prot": 1})
    ran = run(*arguments)
    assert ran.code == 2
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in ran.err


def test_wrong_usage_is_exit_code_2(run: Cli) -> None:
    assert run("serve", "--port", "70000").code == 2
    assert run("nonsense").code == 2


# --------------------------------------------------------------------------- serve


@pytest.fixture
def taken_port() -> Iterator[int]:
    with listening_socket("127.0.0.1", 0) as listener:
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_told_before_anything_else(run: Cli, taken_port: int) -> None:
    ran = run("serve", "--host", "127.0.0.1", "--port", str(taken_port))
    assert ran.code == 2
    assert f"port {taken_port} is taken" in ran.err
    assert EMBEDDED_MODEL not in ran.err


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_prints_where_it_is_and_ends_cleanly(directory: Path, stop: signal.Signals) -> None:
    config = write_config(
        directory,
        supported_models=[FAKE],
        storage={"metadata_dir": "meta", "checkpoint_dir": "checkpoints"},
    )
    command = [sys.executable, "-m", "training.cli", "serve", "--config", config]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0"],
        env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        url = None
        for line in server.stderr:
            if found := re.search(r"export TINKER_BASE_URL=(\S+)", line):
                url = found.group(1)
                break
        assert url is not None
        assert httpx.get(f"{url}/api/v1/health").status_code == 200
        server.send_signal(stop)
        rest = server.stderr.read()
    assert server.returncode == 0, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("auth", "shown", "hidden"),
    [
        ({}, "export TINKER_API_KEY=tml-slime-dev-key", "configured"),
        ({"api_keys": ["tml-slime-dev-key"]}, "export TINKER_API_KEY=tml-slime-dev-key", "1 "),
        ({"api_keys": ["tml-secret", "b"]}, "key     2 configured", "secret"),
        ({"enabled": False}, "authentication is off", "slime-dev-key"),
    ],
)
def test_the_banner_shows_no_secret(
    auth: dict[str, object], shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainingConfig.model_validate(
        {"auth": auth, "supported_models": [FAKE], "server": {"host": "0.0.0.0"}}
    )
    banner(config, 8123)
    printed = capsys.readouterr().err
    assert "export TINKER_BASE_URL=http://localhost:8123" in printed
    assert "tests/fake (4,096 tokens of context)" in printed
    assert shown in printed
    assert hidden not in printed


# --------------------------------------------------------------------------- the others


def test_models_list_tells_what_is_ready(run: Cli, directory: Path, embedded_model: Path) -> None:
    served = [FAKE, {"name": EMBEDDED_MODEL, "path": str(embedded_model)}, {"name": "tests/absent"}]
    ran = run("models", "list", "--config", write_config(directory, supported_models=served))
    assert ran.code == 0
    assert "ready: needs no files" in ran.out
    assert "LlamaForCausalLM, vocabulary of 49,152, 8,192 tokens of context" in ran.out
    assert "not ready: tests/absent is neither in data/models/tests/absent" in ran.out


def test_models_prepare_leaves_a_ready_model_and_seeds_the_cache(
    run: Cli, directory: Path, embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[tuple[str, Path]] = []
    monkeypatch.setattr(cli.models, "seed", lambda name, path: seeded.append((name, path)))
    served = [FAKE, {"name": EMBEDDED_MODEL, "path": str(embedded_model)}]
    config = write_config(directory, supported_models=served)
    assert run("models", "prepare", "--config", config, "--no-client-cache").code == 0
    assert seeded == []
    ran = run("models", "prepare", EMBEDDED_MODEL, "--config", config)
    assert ran.out == f"{EMBEDDED_MODEL}: ready in {embedded_model}\n"
    assert seeded == [(EMBEDDED_MODEL, embedded_model)]


def test_doctor_is_content_with_a_good_configuration(
    run: Cli, directory: Path, embedded_model: Path
) -> None:
    served = [{"name": EMBEDDED_MODEL, "path": str(embedded_model)}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    config = write_config(directory, supported_models=served, server=server)
    ran = run("doctor", "--config", config)
    assert ran.code == 0, ran.out
    assert re.search(r"torch .* 2\.", ran.out)
    assert f"{EMBEDDED_MODEL}" in ran.out


def test_doctor_finds_what_is_wrong(run: Cli, directory: Path, taken_port: int) -> None:
    (directory / "file").write_text("not a directory")
    config = write_config(
        directory,
        supported_models=[{"name": "tests/absent"}],
        server={"host": "127.0.0.1", "port": taken_port},
        storage={"metadata_dir": "file/metadata"},
    )
    ran = run("doctor", "--config", config)
    assert ran.code == 1
    bad = {line.split("│")[1].strip() for line in ran.out.splitlines() if "│ bad" in line}
    assert bad == {"port", "model", "database"}


def test_version_names_what_it_computes_with(run: Cli) -> None:
    lines = dict(line.split(" ", 1) for line in run("version").out.splitlines())
    assert lines["python"].startswith("3.")
    assert lines.keys() == {"tinkercloud", "python", "torch", "transformers", "tinker"}


def test_errors_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "err", Console(stderr=True, highlight=False, soft_wrap=True))
    output.print_error("[bold] is no markup here, nor is [/x]")
    assert capsys.readouterr().err == "error: [bold] is no markup here, nor is [/x]\n"


# --------------------------------------------------------------------------- files to copy from


def setting_names(model: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from setting_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def written_names(values: object, prefix: str = "") -> Iterator[str]:
    assert isinstance(values, dict)
    for name, value in values.items():
        if isinstance(value, dict):
            yield from written_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_example_configuration_names_every_setting_with_its_default(directory: Path) -> None:
    path = REPOSITORY / "config" / "training.yaml"
    assert TrainingConfig.from_file(path) == TrainingConfig()
    assert set(written_names(yaml.safe_load(path.read_text()))) == set(
        setting_names(TrainingConfig())
    )


def test_the_example_environment_names_every_variable(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / ".env.example"
    named = set(re.findall(r"^#?([A-Z][A-Z_]+)=", path.read_text(), re.MULTILINE))
    assert named == {*ENVIRONMENT, "TRAINING_CONFIG"}
    for variable, value in dotenv_values(path).items():
        assert value is not None
        monkeypatch.setenv(variable, value)
    assert TrainingConfig.from_env() == TrainingConfig()


def requirement_lines(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def normalized(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_requirements_are_pinned_and_cover_the_package() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in requirement_lines(name):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = {normalized(line) for line in requirement_lines("requirements.txt")}
    assert {normalized(line) for line in project["dependencies"]} <= pinned
