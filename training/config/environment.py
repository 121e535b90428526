"""What environment variables and ``.env`` say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from dotenv import dotenv_values

from training.core.errors import ConfigError

ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "ENV": ("environment",),
    "TRAINING_HOST": ("server", "host"),
    "TRAINING_PORT": ("server", "port"),
    "TRAINING_PUBLIC_URL": ("server", "public_url"),
    "TINKER_API_KEY": ("auth", "api_keys"),
    "TRAINING_AUTH": ("auth", "enabled"),
    "METADATA_DIR": ("storage", "metadata_dir"),
    "FUTURES_DB_NAME": ("storage", "futures_db_name"),
    "DATABASE_URL": ("storage", "database_url"),
    "CHECKPOINT_DIR": ("storage", "checkpoint_dir"),
    "MODEL_DIR": ("model_dir",),
    "SUPPORTED_MODELS": ("supported_models",),
    "ENGINE_DEVICE": ("engine", "device"),
    "ENGINE_DTYPE": ("engine", "dtype"),
    "ENGINE_THREADS": ("engine", "num_threads"),
    "LOG_FORMAT": ("log_format",),
}
"""Environment variable -> place in the tree. ``TRAINING_CONFIG`` names the file itself."""


_WORDS: Mapping[str, str] = {
    "prod": "production",
    "production": "production",
    "dev": "development",
    "development": "development",
}


def environment() -> Mapping[str, str]:
    dotenv = {key: value for key, value in dotenv_values(".env").items() if value is not None}
    return dotenv | dict(os.environ)


def settings_of(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, place in ENVIRONMENT.items():
        text = environment.get(variable)
        if not text or (value := _PARSERS.get(variable, str)(text)) is None:
            continue
        section = values
        for key in place[:-1]:
            section = section.setdefault(key, {})
        section[place[-1]] = value
    return values


def _parse_environment(text: str) -> str | None:
    """Other programs have uses of their own for ``ENV``: what is not ours says nothing."""
    return _WORDS.get(text.strip().lower())


def unknown_word(environment: Mapping[str, str]) -> str | None:
    """What ``ENV`` says, where it is none of our words: it may be a misspelt ``production``.

    A path is another program's for certain: that of a shell, which reads the file at its start.
    """
    text = environment.get("ENV", "").strip()
    return text if text and "/" not in text and _parse_environment(text) is None else None


def _parse_keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _parse_models(text: str) -> list[dict[str, Any]]:
    """A JSON array of names, or of objects with the fields of ``ModelConfig``."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"SUPPORTED_MODELS is not a JSON array: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError("SUPPORTED_MODELS is not a JSON array")
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


_PARSERS: Mapping[str, Any] = {
    "ENV": _parse_environment,
    "TINKER_API_KEY": _parse_keys,
    "SUPPORTED_MODELS": _parse_models,
}


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged
