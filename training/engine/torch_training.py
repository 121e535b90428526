"""Training passes by autograd: how sequences are packed, and the pass that holds the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from training.backends.base import Int32Array
from training.engine.adapter import Segment
from training.engine.projections import UNEMBED_LAYER, ModelShape

KEPT_VALUES = 1.75
"""What a pass takes of a row, in inputs and outputs of linears. Measured with SmolLM2-135M in
bfloat16 on a CPU: 1.7 to 1.9 by ``Transformer``, 1.7 by ``ForeignDecoder``; of it autograd has
saved two thirds, the rest is what the last layer uses and what the allocator cannot fill."""


class Packed(NamedTuple):
    """Sequences one after another. ``lengths``: those of each segment's sequences."""

    tokens_T: Int32Array
    positions_T: Int32Array
    lengths: list[list[int]]


def pack(sequences: Sequence[Int32Array], segments: Sequence[Segment]) -> Packed:
    """``segments`` cover the packed rows in order; each holds whole sequences."""
    positions_T = np.concatenate([np.arange(len(each), dtype=np.int32) for each in sequences])
    lengths: list[list[int]] = [[] for _ in segments]
    stops = [segment.stop for segment in segments]
    row = 0
    for sequence in sequences:
        lengths[int(np.searchsorted(stops, row, side="right"))].append(len(sequence))
        row += len(sequence)
    return Packed(np.concatenate(sequences), positions_T, lengths)


def activation_bytes(shape: ModelShape, num_tokens: int, dtype: torch.dtype) -> int:
    """See ``decoder.Decoder``. Experts count as if each saw every row."""
    values = sum(
        group.projections[0].in_size + sum(each.out_size for each in group.projections)
        for group in shape.adapted_groups
        if group.layer != UNEMBED_LAYER
    )
    return int(num_tokens * KEPT_VALUES * values * dtype.itemsize)


# A module with a property, which its type does not tell.
deterministic: Any = torch.utils.deterministic


@contextmanager
def fixed_order() -> Iterator[None]:
    """Asks torch for kernels that add in a fixed order: on CUDA attention's backward pass else does
    not, and the same operation gives other bits each time. Raises where torch has no such kernel.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Else every buffer is written once more, against code that reads what it has not written.
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        deterministic.fill_uninitialized_memory = filled


class TorchTrainingPass:
    """``decoder.TrainingPass`` over hidden states [T, H] that know how they were computed.
    ``in_order``: the backward pass adds in a fixed order on devices where that has to be said."""

    def __init__(self, hidden_TH: torch.Tensor, in_order: bool = False) -> None:
        self._in_order = in_order
        self._hidden_TH: torch.Tensor | None = hidden_TH
        self._detached_TH = hidden_TH.detach()

    @property
    def hidden_TH(self) -> torch.Tensor:
        return self._detached_TH

    def backward(self, dhidden_TH: torch.Tensor) -> None:
        hidden_TH, self._hidden_TH = self._hidden_TH, None
        if hidden_TH is None:
            raise RuntimeError("a pass goes backward once")
        # No history: no segment adapts a layer of the model, only its head or nothing.
        if hidden_TH.requires_grad:
            with fixed_order() if self._in_order else nullcontext():
                torch.autograd.backward(hidden_TH, dhidden_TH)
