"""Adapters in the kernels' own form go to disk and come back, also while their pass is running."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tests.engine.checkpoints import make_checkpoint
from tests.engine.slot_cases import SMALLEST_BUDGET, Bench, assert_spilling_changes_no_bit
from training.engine.native.decoder import NativeDecoder


def test_spilling_changes_no_bit(kernels: ctypes.CDLL, tmp_path: Path) -> None:
    """All operations of a unit share one pass: adapters that have left are still computed with."""
    checkpoint = make_checkpoint("llama-tied", tmp_path / "model")
    roomy, tight = (
        Bench(
            checkpoint,
            tmp_path / name,
            budget,
            model=NativeDecoder.from_directory(checkpoint),
        )
        for name, budget in (("roomy", 2**40), ("tight", SMALLEST_BUDGET))
    )
    assert_spilling_changes_no_bit(roomy, tight)
