"""DRO (arXiv 2405.19107): log-likelihood weighted by advantage, with a quadratic pull back."""

from __future__ import annotations

from collections.abc import Mapping

from training.losses.base import Float64Array, LossSpec, LossValue
from training.losses.ratio import RL_INPUTS


def dro(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """``-sum(logprob * A - beta / 2 * (logprob - sampling logprob)^2)``.

    The pull counts at every position, also where the advantage is zero.
    """
    beta, advantages = config["beta"], inputs["advantages"]
    drift = logprobs - inputs["logprobs"]
    objective = logprobs * advantages - 0.5 * beta * drift**2
    return LossValue(float(-objective.sum()), beta * drift - advantages)


SPEC = LossSpec("dro", dro, RL_INPUTS, config={"beta": 0.05})
"""The default ``beta`` is this project's choice: the value of the published example."""
