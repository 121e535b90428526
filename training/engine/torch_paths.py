"""Which special paths of torch a ``model.Transformer`` takes. On the CPU none; on CUDA those that
``torch_probe`` found to work. Without them it computes the same, to rounding."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.torch_graphs import Capture
from training.engine.torch_varlen import VarlenKernel


@dataclass(frozen=True)
class FastPaths:
    """``varlen``: attention of packed sequences in one call, training and sampling. ``grouped``:
    the LoRA products of all segments in one call. ``capture``: decode steps are recorded.
    ``in_order``: backward passes add in a fixed order, so that an operation alone in its pass gives
    the same bits each time."""

    varlen: VarlenKernel | None = None
    grouped: bool = False
    capture: Capture | None = None
    in_order: bool = False
