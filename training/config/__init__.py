"""The one configuration tree: read once, frozen, unknown keys refused with their name.

Order of precedence: arguments, environment, ``.env``, file, defaults. Only production, where the
file says so, stays production.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import PrivateAttr, ValidationError

from training.config.environment import (
    ENVIRONMENT,
    environment,
    merge,
    settings_of,
    unknown_word,
)
from training.config.sections import (
    DEVELOPMENT_KEY,
    EMBEDDED_MODEL,
    KEY_PREFIX,
    MIN_PRODUCTION_KEY_CHARS,
    AuthConfig,
    ClientConfig,
    DurabilityConfig,
    EngineConfig,
    HubConfig,
    ModelConfig,
    QuotaConfig,
    SchedulerConfig,
    Section,
    ServerConfig,
    SessionConfig,
    StorageConfig,
)
from training.core.errors import ConfigError

__all__ = [
    "DEVELOPMENT_KEY",
    "EMBEDDED_MODEL",
    "ENVIRONMENT",
    "KEY_PREFIX",
    "AuthConfig",
    "ClientConfig",
    "DurabilityConfig",
    "EngineConfig",
    "HubConfig",
    "ModelConfig",
    "QuotaConfig",
    "SchedulerConfig",
    "ServerConfig",
    "SessionConfig",
    "StorageConfig",
    "TrainingConfig",
]


class TrainingConfig(Section):
    """Everything the server can be told. ``TrainingConfig()`` serves the embedded model."""

    environment: Literal["development", "production"] = "development"
    """``production`` does not start with authentication off, the development key or short keys."""
    _unknown_env: str | None = PrivateAttr(None)
    server: ServerConfig = ServerConfig()
    auth: AuthConfig = AuthConfig()
    storage: StorageConfig = StorageConfig()
    model_dir: Path = Path("data/models")
    supported_models: tuple[ModelConfig, ...] = ()
    """Empty: the embedded model alone."""
    engine: EngineConfig = EngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    durability: DurabilityConfig = DurabilityConfig()
    quota: QuotaConfig = QuotaConfig()
    session: SessionConfig = SessionConfig()
    client: ClientConfig = ClientConfig()
    hub: HubConfig = HubConfig()
    log_format: Literal["auto", "console", "json"] = "auto"

    def resolved_engine(self) -> EngineConfig:
        """The engine's part, complete without the others."""
        spill_dir = self.engine.spill_dir or self.storage.metadata_dir / "spill"
        return self.engine.model_copy(update={"spill_dir": spill_dir.absolute()})

    def unknown_env(self) -> str | None:
        """What the variable ``ENV`` said, where that is no word of ours and counted for nothing."""
        return self._unknown_env

    def check_exposure(self) -> None:
        """Raises ``ConfigError`` for what must never face a network in production."""
        if self.environment == "production" and (weakness := self.auth.weakness()):
            raise ConfigError(
                f"refusing to start in production: {weakness}. Set TINKER_API_KEY to secrets of "
                f"{MIN_PRODUCTION_KEY_CHARS} or more random characters, such as those of "
                "`openssl rand -hex 24`"
            )

    def served_models(self) -> tuple[ModelConfig, ...]:
        return self.supported_models or (ModelConfig(name=EMBEDDED_MODEL),)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """Reads YAML or JSON; environment variables win, but none makes development of production.
        Raises ``ConfigError``."""
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read configuration {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"configuration {path} must be a mapping of settings")
        variables = environment()
        settings = settings_of(variables)
        if values.get("environment") == "production":
            settings.pop("environment", None)
        return cls._build(merge(values, settings), str(path), unknown_word(variables))

    @classmethod
    def from_env(cls) -> TrainingConfig:
        """``TRAINING_CONFIG`` names a file; the variables of ``ENVIRONMENT`` win over it."""
        variables = environment()
        if config_file := variables.get("TRAINING_CONFIG"):
            return cls.from_file(config_file)
        return cls._build(settings_of(variables), "environment", unknown_word(variables))

    @classmethod
    def _build(cls, values: dict[str, Any], source: str, unknown_env: str | None) -> TrainingConfig:
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
                for item in error.errors(include_input=False, include_url=False)
            )
            raise ConfigError(f"bad configuration ({source}): {problems}") from None
        config._unknown_env = unknown_env
        return config
