"""What a loss is: a pure numpy function of one datum's logprobs, with its exact derivative.

Losses know neither torch nor the model: the engine turns dloss/dlogprob into gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


class LossValue(NamedTuple):
    """``loss``: summed over the datum's tokens. ``dlogprobs``: its derivative, same shape."""

    loss: float
    dlogprobs: Float64Array


class LossFn(Protocol):
    def __call__(
        self,
        logprobs: Float64Array,
        inputs: Mapping[str, Float64Array],
        config: Mapping[str, float],
    ) -> LossValue:
        """``logprobs`` float64 [N] or [N, K]; every input has that shape; config is complete."""


@dataclass(frozen=True)
class LossSpec:
    """A loss, what it needs and what it may be told.

    ``optional`` inputs override the config value of the same name token by token. ``config`` maps
    each allowed key to its default. ``max_rank`` 2 allows several targets per position.
    """

    name: str
    fn: LossFn
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    max_rank: int = 1
