"""Policy gradient with a ratio: ``-sum(r * A)``, r = exp(logprob - sampling logprob)."""

from __future__ import annotations

from collections.abc import Mapping

from training.losses.base import Float64Array, LossSpec, LossValue
from training.losses.ratio import RL_INPUTS, token_ratio


def importance_sampling(
    logprobs: Float64Array, inputs: Mapping[str, Float64Array], config: Mapping[str, float]
) -> LossValue:
    """dr/dlogprob = r, so the derivative of each term is the term itself."""
    terms = -token_ratio(logprobs, inputs) * inputs["advantages"]
    return LossValue(float(terms.sum()), terms)


SPEC = LossSpec("importance_sampling", importance_sampling, required=RL_INPUTS)
