"""GSPO-token (arXiv 2507.18071): one ratio per sequence, each token with its own gradient."""

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
    clipped_objective,
)

MASK = "sequence_ratio_mask"


def gspo(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """PPO's objective with r = exp(mean of logprob - sampling logprob over the masked tokens).

    A mask that selects nothing has no mean: the loss is NaN, as torch's mean of nothing is, and
    the operation is refused by whoever reads it, rather than trained with an invented ratio.
    """
    selected = inputs[MASK] != 0
    difference = (logprobs - inputs["logprobs"])[selected]
    mean = difference.mean() if difference.size else np.nan
    with np.errstate(over="ignore"):
        ratio = np.full_like(logprobs, np.exp(mean))
    return clipped_objective(ratio, inputs["advantages"], bounds(inputs, config))


SPEC = LossSpec(
    "gspo", gspo, (*RL_INPUTS, MASK), CLIP_INPUTS, {CLIP_LOW: 1 - 3e-4, CLIP_HIGH: 1 + 4e-4}
)
"""The default bounds are this project's choice: the paper's values."""
