"""The losses the server computes, by name; and those it refuses, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from training.losses import cispo, cross_entropy, dro, gspo, importance_sampling, ppo
from training.losses.base import LossSpec

LOSSES: Mapping[str, LossSpec] = {
    module.SPEC.name: module.SPEC
    for module in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)
}

REFUSED: Mapping[str, str] = {
    "stable_reinforce": (
        "the objective of stable_reinforce is not published, so this server does not offer it; "
        "use importance_sampling, ppo or cispo (in the cookbook: loss_fn='importance_sampling')"
    ),
    "custom": (
        "custom losses run on the client: use forward_backward_custom, which sends "
        "cross_entropy requests"
    ),
}
"""Names the SDK may send -> what to tell its user."""
