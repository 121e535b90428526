"""Which decoder computes a model: the first of these that can."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from training.config import EngineConfig
from training.engine.decoder import Decoder
from training.engine.model import Transformer
from training.engine.model_config import ModelConfig, UnsupportedModelError

_log = logging.getLogger(__name__)


def load_decoder(
    path: Path, engine: EngineConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Raises ``ConfigError`` for a model that none can compute."""
    try:
        ModelConfig.from_directory(path)
    except UnsupportedModelError as error:
        _log.info("%s; trying the modules of transformers", error)
        return _foreign(path, device, dtype)
    # Here, in front: the native kernels, where processor, device and dtype allow them.
    return Transformer.from_directory(path, device, dtype)


def _foreign(path: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    # Imported only here: transformers' model code takes seconds and some 100 MB.
    from training.engine.foreign import ForeignDecoder

    return ForeignDecoder.from_directory(path, device, dtype)
