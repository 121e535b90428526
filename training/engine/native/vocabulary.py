"""``sampling.Vocabulary`` by our own kernels: one call for all rows of a step, on all threads.

Takes logprobs the way the trainer's head does, so theirs agree to the last bit. A row's results
depend on its own logits and parameters alone. Of equal probabilities the lower id comes first, here
in the ``top`` tokens too.

Shape legend: R rows, V vocab, U draws of a row, K targets of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training.backends.base import Float32Array, Int64Array, TopK
from training.engine.native import library
from training.engine.sampling import Cuts, Drawn, Float64Array


class NativeVocabulary:
    """For the fp32 logits of any decoder on the CPU; one caller at a time."""

    def __init__(self) -> None:
        """Raises ``BuildError`` for a machine without the kernels."""
        self._kernels = library.load()

    def sample(self, logits_RV: torch.Tensor, cuts: Cuts, uniforms_R: Float64Array) -> Drawn:
        num_rows = len(logits_RV)
        given = (
            _array(cuts.temperatures, np.float32, (num_rows,)),
            _array(cuts.top_ks, np.int32, (num_rows,)),
            _array(cuts.top_ps, np.float32, (num_rows,)),
            _array(uniforms_R, np.float64, (num_rows,)),
        )
        drawn = Drawn(np.empty(num_rows, np.int32), np.empty(num_rows, np.float32))
        self._kernels.tc_sample_rows(*_rows(logits_RV), *map(_at, given), *map(_at, drawn))
        return drawn

    def draw(self, logits_RV: torch.Tensor, temperature: float, uniforms_RU: Float64Array) -> Drawn:
        num_rows, num_draws = uniforms_RU.shape
        temperatures_R = np.full(num_rows, temperature, np.float32)
        uniforms_RU = _array(uniforms_RU, np.float64, (len(logits_RV), num_draws))
        drawn = Drawn(
            np.empty(uniforms_RU.shape, np.int32), np.empty(uniforms_RU.shape, np.float32)
        )
        given = (_at(temperatures_R), _at(uniforms_RU), num_draws)
        self._kernels.tc_draw_rows(*_rows(logits_RV), *given, *map(_at, drawn))
        return drawn

    def top(self, logits_RV: torch.Tensor, temperatures_R: Float32Array, k: int) -> TopK:
        num_rows, vocab_size = logits_RV.shape
        k = min(k, vocab_size)
        temperatures_R = _array(temperatures_R, np.float32, (num_rows,))
        best = TopK(np.empty((num_rows, k), np.int32), np.empty((num_rows, k), np.float32))
        outputs = (_at(best.token_ids), _at(best.logprobs))
        self._kernels.tc_top_rows(*_rows(logits_RV), _at(temperatures_R), k, *outputs)
        return best

    def logprobs(self, logits_RV: torch.Tensor, targets_RK: Int64Array) -> Float32Array:
        """Raises ``IndexError`` for a target that is no token."""
        num_rows, vocab_size = logits_RV.shape
        if targets_RK.size and not 0 <= targets_RK.min() <= targets_RK.max() < vocab_size:
            raise IndexError(f"targets must lie in [0, {vocab_size})")
        num_targets = targets_RK.shape[1]
        targets = _array(targets_RK.astype(np.int32), np.int32, (num_rows, num_targets))
        lse_R = np.empty(num_rows, np.float64)
        logprobs_RK = np.empty((num_rows, num_targets), np.float32)
        outputs = (_at(lse_R), _at(logprobs_RK))
        self._kernels.tc_target_rows(*_rows(logits_RV), _at(targets), num_targets, *outputs)
        return logprobs_RK


def _rows(logits_RV: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, row stride and shape, as the kernels take them."""
    if logits_RV.dtype != torch.float32 or logits_RV.device.type != "cpu":
        raise TypeError(f"logits are {logits_RV.dtype} on {logits_RV.device}, not fp32 on the CPU")
    if logits_RV.stride(1) != 1:
        raise TypeError("the logits of a row must lie side by side")
    return (logits_RV.data_ptr(), logits_RV.stride(0), *logits_RV.shape)


def _array(values: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """What a kernel reads without a check of its own."""
    if values.shape != shape:
        raise ValueError(f"shape {values.shape} instead of {shape}")
    return np.ascontiguousarray(values, dtype)


def _at(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)
