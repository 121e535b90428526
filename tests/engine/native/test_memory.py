"""What passes of the kernels take, keep for the next one, and give back."""

from __future__ import annotations

import ctypes
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


def workspace_bytes() -> int:
    """Pages of all workspaces of this process. They alone are mapped without reservation and with
    a wish for huge pages (``nr hg``); what malloc keeps, for this or for other threads, varies."""
    total = pages = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if name == "Rss:":
            pages = int(values[0]) * 1024
        elif name == "VmFlags:" and {"nr", "hg"} <= set(values):
            total += pages
    return total


def taken_bytes(decoder: NativeDecoder, counts: Sequence[int]) -> int:
    """By passes of so many sequences each, one after another; the last one may yet go back."""
    decoder.release_memory()
    before = workspace_bytes()
    for count in counts:
        tokens = [np.zeros(LENGTH, np.int32)] * count
        segments = [Segment(None, 0, LENGTH * count)]
        decoder.training_pass(tokens, segments, with_gradient=True, checkpointing=False)
    return workspace_bytes() - before


def test_a_pass_keeps_what_it_says_and_gives_it_back(native: NativeDecoder) -> None:
    expected = native.activation_bytes(256 * LENGTH)
    taken = taken_bytes(native, [256])
    assert 1 < taken / expected < 1.5
    held = workspace_bytes()
    native.release_memory()
    assert held - workspace_bytes() == taken


def test_a_pass_after_smaller_ones_takes_no_more_than_alone(native: NativeDecoder) -> None:
    alone = taken_bytes(native, [256])
    assert alone > 0
    assert taken_bytes(native, [32, 64, 128, 256]) < 1.01 * alone


def test_passes_go_on_after_a_release(native: NativeDecoder) -> None:
    tokens, segments = [np.arange(40, dtype=np.int32)], [Segment(None, 0, 40)]
    before = native.training_pass(tokens, segments, True, False).hidden_TH.clone()
    native.release_memory()
    after = native.training_pass(tokens, segments, True, False).hidden_TH
    assert before.any()
    assert before.equal(after)
