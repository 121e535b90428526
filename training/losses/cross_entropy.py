"""Weighted negative log-likelihood: ``sum(-logprob * weight)``; also soft targets [N, K]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training.losses.base import Float64Array, LossSpec, LossValue


def cross_entropy(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """A target of weight zero counts nothing, whatever its logprob (a soft target may be -inf)."""
    weights = inputs["weights"]
    used = np.where(weights == 0, 0.0, logprobs)
    return LossValue(float(-(used * weights).sum()), -weights)


SPEC = LossSpec("cross_entropy", cross_entropy, required=("weights",), max_rank=2)
