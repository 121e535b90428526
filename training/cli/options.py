"""Options that several commands share, and how they change the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from training.config import ModelConfig, TrainingConfig
from training.core.errors import ConfigError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML or JSON file; environment variables win over it."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME[=DIRECTORY]",
        help="Serve this model instead of the configured ones; may be repeated.",
    ),
]


def load_config(
    config_file: Path | None,
    host: str | None = None,
    port: int | None = None,
    models: list[str] | None = None,
) -> TrainingConfig:
    """Arguments, then environment, then ``.env``, then the file. Raises ``ConfigError``."""
    config = TrainingConfig.from_file(config_file) if config_file else TrainingConfig.from_env()
    server = {"host": host, "port": port}
    given = {key: value for key, value in server.items() if value is not None}
    changes: dict[str, object] = {}
    if given:
        changes["server"] = config.server.model_copy(update=given)
    if models:
        changes["supported_models"] = tuple(_parse_model(text) for text in models)
    return config.model_copy(update=changes)


def _parse_model(text: str) -> ModelConfig:
    name, _, directory = text.partition("=")
    try:
        return ModelConfig(name=name, path=Path(directory) if directory else None)
    except ValidationError:
        raise ConfigError(
            f"--model {text!r}: expected NAME or NAME=DIRECTORY, with NAME like organization/model"
        ) from None
