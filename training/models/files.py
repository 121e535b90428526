"""Which files of a model directory are configuration, tokenizer and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.core.errors import ConfigError

CONFIG_FILES = frozenset({"config.json", "generation_config.json"})
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "tiktoken.model",
        "tekken.json",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
    }
)
CHAT_TEMPLATE_DIR = "additional_chat_templates"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A JSON object. ``optional``: a file that is absent reads as empty. Raises ``ConfigError``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def tokenizer_files(directory: Path) -> list[str]:
    """Names relative to ``directory``, in order; named chat templates included."""
    templates = (directory / CHAT_TEMPLATE_DIR).glob("*.jinja")
    names = [path.name for path in directory.iterdir() if path.name in TOKENIZER_FILES]
    return sorted(names + [f"{CHAT_TEMPLATE_DIR}/{path.name}" for path in templates])


def config_files(directory: Path) -> list[str]:
    return sorted(name for name in CONFIG_FILES if (directory / name).is_file())


def weight_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(WEIGHT_SUFFIXES))
