"""Which backends exist: the one table from the name in the configuration to its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from training.backends.base import Backend
from training.backends.fake import FakeBackend
from training.backends.local import LocalBackend
from training.config import ModelConfig, TrainingConfig

BACKENDS: Mapping[str, Callable[[ModelConfig, TrainingConfig], Backend]] = {
    "local": LocalBackend,
    "fake": FakeBackend,
}


def create_backend(model: ModelConfig, config: TrainingConfig) -> Backend:
    """The backend of ``model``, not yet started. Raises ``ConfigError`` where it cannot be made."""
    return BACKENDS[model.backend](model, config)
