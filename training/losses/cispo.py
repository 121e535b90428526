"""CISPO (arXiv 2506.13585): the clipped ratio is a constant weight of the log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training.losses.base import Float64Array, LossSpec, LossValue
from training.losses.ratio import (
    CLIP_HIGH,
    CLIP_INPUTS,
    CLIP_LOW,
    RL_INPUTS,
    bounds,
    token_ratio,
)


def cispo(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """``-sum(constant(clamp(r, low, high)) * logprob * A)``: no token loses its gradient."""
    low, high = bounds(inputs, config)
    clamped = np.minimum(np.maximum(token_ratio(logprobs, inputs), low), high)
    dlogprobs = -clamped * inputs["advantages"]
    return LossValue(float((dlogprobs * logprobs).sum()), dlogprobs)


SPEC = LossSpec("cispo", cispo, RL_INPUTS, CLIP_INPUTS, {CLIP_LOW: 0.0, CLIP_HIGH: 4.0})
