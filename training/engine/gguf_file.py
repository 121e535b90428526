"""A GGUF file's metadata and tensors, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from training.backends.base import Float32Array
from training.core.errors import ConfigError


class GgufFile:
    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """A metadata value. Raises ``ConfigError`` where there is none."""
        if (field := self._reader.fields.get(key)) is None:
            raise ConfigError(f"{self.name} has no {key}")
        return field.contents()

    def model_value(self, key: str) -> Any:
        """One of the architecture's own values: ``context_length``, ``block_count``, ..."""
        return self.value(f"{self.architecture}.{key}")

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def tensor(self, name: str) -> Float32Array:
        """Unpacked, [rows, columns] (or [columns]). Raises ``ConfigError`` where there is none."""
        if (tensor := self._tensors.get(name)) is None:
            raise ConfigError(f"{self.name} has no tensor {name}")
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
