"""Which decoder computes a model: the first of these that can."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from training.config import EngineConfig
from training.core.errors import ConfigError
from training.engine.decoder import Decoder
from training.engine.model import Transformer
from training.engine.model_config import ModelConfig, UnsupportedModelError
from training.engine.native.build import BuildError
from training.engine.native.proof import load_proved
from training.engine.native.weights import UnsupportedShapeError
from training.engine.torch_probe import probed_paths

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
    if engine.kernels != "torch" and (native := _native(path, engine, device, dtype)):
        return native
    model = Transformer.from_directory(path, device, dtype)
    if device.type == "cuda":
        model.paths = probed_paths(model)
    return model


def _native(
    path: Path, engine: EngineConfig, device: torch.device, dtype: torch.dtype
) -> Decoder | None:
    """None where our kernels cannot compute this model here and ``auto`` lets torch do so."""
    if engine.kernels == "auto" and (device.type != "cpu" or dtype != torch.bfloat16):
        return None
    try:
        if device.type != "cpu" or dtype != torch.bfloat16:
            raise ConfigError(f"they compute in bfloat16 on the CPU, not {dtype} on {device}")
        decoder = load_proved(path, engine.num_threads)
    except (BuildError, UnsupportedShapeError, ConfigError) as error:
        if engine.kernels == "native":
            raise ConfigError(f"engine.kernels is native, but: {error}") from error
        if not isinstance(error, BuildError | UnsupportedShapeError):
            raise
        _log.warning("computing with torch, several times slower than our own kernels: %s", error)
        return None
    # What is left to torch is small; the threads of its loops would spin in the way of ours.
    torch.set_num_threads(1)
    return decoder


def _foreign(path: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    # Imported only here: transformers' model code takes seconds and some 100 MB.
    from training.engine.foreign import ForeignDecoder

    return ForeignDecoder.from_directory(path, device, dtype)
