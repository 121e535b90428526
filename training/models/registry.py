"""Where a served model's files are, and what its config says. No torch, no network.

``resolve_model_path`` is the one place that turns a ``ModelConfig`` into a directory.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from tokenizers import Tokenizer

from training.config import EMBEDDED_MODEL, ModelConfig, TrainingConfig
from training.core.errors import ConfigError
from training.models.files import read_json, tokenizer_files
from training.models.prepared import is_usable

PREPARE_COMMAND = "tinkercloud models prepare"

CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""Where architectures write their context length in ``config.json``."""
FAKE_VOCAB_SIZE = 512
FAKE_CONTEXT_LENGTH = 4096
FAKE_EOS_TOKEN_IDS = (2,)
"""The fake backend's own figures, told before it is started (a test compares them)."""


@dataclass(frozen=True)
class ServedModelInfo:
    """One served model, as clients are told. ``directory`` is None only for a fake without files.

    ``tokenizer_files`` are names inside ``directory``; empty means that clients bring their own.
    """

    name: str
    directory: Path | None
    architecture: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    tokenizer_files: tuple[str, ...]


def embedded_model_path(config: TrainingConfig) -> Path:
    """Where the converted embedded model belongs, whether or not it is there."""
    return config.model_dir / EMBEDDED_MODEL


def resolve_model_path(model: ModelConfig, config: TrainingConfig) -> Path:
    """The directory with the model's ``config.json`` and weights: the configured path, else
    ``model_dir / name``, else the Hugging Face cache. Raises ``ConfigError`` saying what to do.
    """
    if model.path is not None:
        if not (model.path / "config.json").is_file():
            raise ConfigError(f"{model.name}: {model.path} has no config.json")
        return model.path
    local = config.model_dir / model.name
    if is_usable(local):
        return local
    if (snapshot := find_snapshot(model.name)) and any(snapshot.glob("*.safetensors")):
        return snapshot
    if model.name == EMBEDDED_MODEL:
        raise ConfigError(f"{model.name} is not prepared yet: run `{PREPARE_COMMAND}`")
    raise ConfigError(
        f"{model.name} is neither in {local} nor in the Hugging Face cache: set its `path`, "
        f"or run `{PREPARE_COMMAND} {model.name}` where the hub can be reached"
    )


def find_snapshot(name: str, cache_dir: Path = Path(HF_HUB_CACHE)) -> Path | None:
    """The snapshot of ``main`` in a Hugging Face cache, or None. Never asks the network."""
    repository = cache_dir / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def ensure_embedded_model(config: TrainingConfig) -> Path:
    """Converts the embedded model if that was not done yet, in a process of its own (so that the
    caller needs no torch); its progress goes to our stderr. Raises ``ConfigError``."""
    destination = embedded_model_path(config)
    if is_usable(destination):
        return destination
    command = [sys.executable, "-m", "training.engine.prepare", str(destination.absolute())]
    if code := subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        raise ConfigError(f"preparing {EMBEDDED_MODEL} failed with exit code {code}; see above")
    return destination


def served_model_info(model: ModelConfig, config: TrainingConfig) -> ServedModelInfo:
    """Reads the model's JSON files. A fake needs none. Raises ``ConfigError``."""
    if model.backend == "fake":
        return _fake_model_info(model)
    directory = resolve_model_path(model, config)
    hf_config = read_json(directory / "config.json")
    text_config = hf_config.get("text_config", hf_config)
    architectures = hf_config.get("architectures") or ["unknown"]
    key = next((key for key in CONTEXT_LENGTH_KEYS if key in text_config), CONTEXT_LENGTH_KEYS[0])
    longest = _positive(text_config, key, directory)
    if model.context_length is not None and model.context_length > longest:
        raise ConfigError(
            f"{model.name}: context_length {model.context_length} is over the model's own {longest}"
        )
    return ServedModelInfo(
        name=model.name,
        directory=directory,
        architecture=str(architectures[0]),
        vocab_size=_positive(text_config, "vocab_size", directory),
        context_length=model.context_length or longest,
        eos_token_ids=_eos_token_ids(directory, text_config),
        tokenizer_files=tuple(tokenizer_files(directory)),
    )


def _fake_model_info(model: ModelConfig) -> ServedModelInfo:
    """With a ``tokenizer.json`` the fake speaks that vocabulary; nothing else is read."""
    vocab_size = FAKE_VOCAB_SIZE
    if model.path is not None and (model.path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
        vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    return ServedModelInfo(
        name=model.name,
        directory=model.path,
        architecture="fake",
        vocab_size=vocab_size,
        context_length=model.context_length or FAKE_CONTEXT_LENGTH,
        eos_token_ids=FAKE_EOS_TOKEN_IDS,
        tokenizer_files=tuple(tokenizer_files(model.path)) if model.path else (),
    )


def _positive(hf_config: dict[str, Any], key: str, directory: Path) -> int:
    value = hf_config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{directory / 'config.json'} has no usable {key}: {value!r}")
    return value


def _eos_token_ids(directory: Path, text_config: dict[str, Any]) -> tuple[int, ...]:
    """Of the first source that names any: generation config, config, tokenizer. Chat models list
    several in the generation config (end of turn and end of text)."""
    for source in (read_json(directory / "generation_config.json", optional=True), text_config):
        value = source.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list) and value:
            return tuple(int(token_id) for token_id in value)
    return _tokenizer_eos(directory)


def _tokenizer_eos(directory: Path) -> tuple[int, ...]:
    token = read_json(directory / "tokenizer_config.json", optional=True).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = read_json(directory / "tokenizer.json", optional=True).get("added_tokens", ())
    return tuple(int(entry["id"]) for entry in added if entry["content"] == text)
