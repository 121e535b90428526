"""What the ratio losses share: the probability ratio, its bounds, and PPO's clipped objective.

Bounds are ratios (0.8, 1.2), not distances from one. An input of a bound's name overrides the
configured value token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from training.losses.base import Float64Array, LossValue

RL_INPUTS = ("logprobs", "advantages")
CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"
CLIP_INPUTS = (CLIP_LOW, CLIP_HIGH)


class Bounds(NamedTuple):
    """A number each, or one per token."""

    low: float | Float64Array
    high: float | Float64Array


def bounds(inputs: Mapping[str, Float64Array], config: Mapping[str, float]) -> Bounds:
    return Bounds(
        inputs.get(CLIP_LOW, config[CLIP_LOW]),
        inputs.get(CLIP_HIGH, config[CLIP_HIGH]),
    )


def token_ratio(logprobs: Float64Array, inputs: Mapping[str, Float64Array]) -> Float64Array:
    """exp(logprob - sampling logprob) [N]; 1 where the advantage is zero.

    Such a token adds nothing to any ratio loss, and prompt positions often carry a made-up
    sampling logprob, whose ratio could overflow and turn 0 * inf into NaN.
    """
    difference = np.where(inputs["advantages"] == 0, 0.0, logprobs - inputs["logprobs"])
    with np.errstate(over="ignore"):  # an infinite ratio is reported by whoever reads the loss
        ratio: Float64Array = np.exp(difference)
    return ratio


def clipped_objective(ratio: Float64Array, advantages: Float64Array, limit: Bounds) -> LossValue:
    """``-sum(min(r * A, clamp(r, low, high) * A))`` with dr/dlogprob = r.

    Where both terms are equal because the clamp changes nothing, the gradient is that of r * A;
    where the clamped term is smaller, it is zero. At a bound itself torch's clamp lets the
    gradient through, so the token still counts.
    """
    clamped = np.minimum(np.maximum(ratio, limit.low), limit.high)
    free, held = ratio * advantages, clamped * advantages
    loss = -np.minimum(free, held)
    return LossValue(float(loss.sum()), np.where(free <= held, -free, 0.0))
