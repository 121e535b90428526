"""What passes of the kernels take, keep for the next one, and give back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engine.checkpoints import make_checkpoint
from training.engine.adapter import Segment
from training.engine.native.decoder import NativeDecoder

LENGTH = 256


@pytest.fixture(scope="module")
def native(kernels: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> NativeDecoder:
    return NativeDecoder.from_directory(make_checkpoint("wide", tmp_path_factory.mktemp("model")))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def taken_bytes(decoder: NativeDecoder, counts: Sequence[int]) -> int:
    """By passes of so many sequences each, one after another; the last one may yet go back."""
    decoder.release_memory()
    before = resident_bytes()
    for count in counts:
        tokens = [np.zeros(LENGTH, np.int32)] * count
        segments = [Segment(None, 0, LENGTH * count)]
        decoder.training_pass(tokens, segments, with_gradient=True, checkpointing=False)
    return resident_bytes() - before


def test_a_pass_keeps_what_it_says_and_gives_it_back(native: NativeDecoder) -> None:
    expected = native.activation_bytes(256 * LENGTH)
    assert expected > 200 << 20  # so that what else happens in this process does not count
    taken = taken_bytes(native, [256])
    assert 1 < taken / expected < 1.5
    held = resident_bytes()
    native.release_memory()
    assert held - resident_bytes() > 0.9 * expected


def test_a_pass_after_smaller_ones_takes_no_more_than_alone(native: NativeDecoder) -> None:
    alone = taken_bytes(native, [256])
    assert taken_bytes(native, [32, 64, 128, 256]) < 1.05 * alone


def test_passes_go_on_after_a_release(native: NativeDecoder) -> None:
    tokens, segments = [np.arange(40, dtype=np.int32)], [Segment(None, 0, 40)]
    before = native.training_pass(tokens, segments, True, False).hidden_TH.clone()
    native.release_memory()
    after = native.training_pass(tokens, segments, True, False).hidden_TH
    assert before.any()
    assert before.equal(after)
