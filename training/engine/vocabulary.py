"""Which implementation of ``sampling.Vocabulary`` serves a device."""

from __future__ import annotations

import logging

import torch

from training.config import EngineConfig
from training.engine.native.build import BuildError
from training.engine.native.vocabulary import NativeVocabulary
from training.engine.sampling import Vocabulary
from training.engine.torch_vocabulary import TorchVocabulary

_log = logging.getLogger(__name__)


def choose_vocabulary(engine: EngineConfig, device: torch.device) -> Vocabulary:
    """The fastest for logits on ``device`` that the machine and ``engine.kernels`` allow."""
    if device.type != "cpu" or engine.kernels == "torch":
        return TorchVocabulary()
    try:
        return NativeVocabulary()
    except BuildError as error:
        _log.warning("drawing tokens with torch, slower than our own kernels: %s", error)
        return TorchVocabulary()
