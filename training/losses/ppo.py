"""PPO's clipped objective, token by token (Schulman et al. 2017, arXiv 1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping

from training.losses.base import Float64Array, LossSpec, LossValue
from training.losses.ratio import (
    CLIP_HIGH,
    CLIP_INPUTS,
    CLIP_LOW,
    RL_INPUTS,
    bounds,
    clipped_objective,
    token_ratio,
)


def ppo(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """``-sum(min(r * A, clamp(r, low, high) * A))``."""
    ratio = token_ratio(logprobs, inputs)
    return clipped_objective(ratio, inputs["advantages"], bounds(inputs, config))


SPEC = LossSpec("ppo", ppo, RL_INPUTS, CLIP_INPUTS, {CLIP_LOW: 0.8, CLIP_HIGH: 1.2})
