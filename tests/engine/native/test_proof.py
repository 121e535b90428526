"""A model that was loaded wrongly is loaded again, and the first load of a new one is doubted."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from training.core.errors import ConfigError
from training.engine.native import proof
from training.engine.native.decoder import NativeDecoder
from training.engine.native.proof import digest_of, load_proved

Damage = Callable[[NativeDecoder], None]


@pytest.fixture
def path(
    kernels: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A model; what is known of it lies in ``tmp_path``."""
    monkeypatch.setattr(proof, "cache_directory", lambda: tmp_path)
    return make_checkpoint("wide", tmp_path_factory.mktemp("model"))


class Loads:
    """Counts them, and damages the next ones in the ways given."""

    def __init__(self) -> None:
        self.num = 0
        self.damages: list[Damage] = []
        self._load = NativeDecoder.from_directory

    def from_directory(self, path: Path) -> NativeDecoder:
        self.num += 1
        decoder = self._load(path)
        if self.damages:
            self.damages.pop(0)(decoder)
        return decoder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    loads = Loads()
    monkeypatch.setattr(NativeDecoder, "from_directory", loads.from_directory)
    yield loads
    assert not loads.damages


def flip(tensor: int, byte: int = 77, bit: int = 3) -> Damage:
    """One bit of one of the tensors that the kernels read."""

    def damage(decoder: NativeDecoder) -> None:
        content = decoder.weights._tensors[tensor].view(torch.uint8).flatten()
        content[byte] ^= 1 << bit

    return damage


def wrong_results(decoder: NativeDecoder) -> None:
    """The weights are right, what is computed with them is not."""
    training_pass = decoder.training_pass

    def wrong(*args: object, **kwargs: object) -> object:
        passed = training_pass(*args, **kwargs)  # type: ignore[arg-type]
        passed.hidden_TH[0, 0] += 1
        return passed

    decoder.training_pass = wrong  # type: ignore[method-assign, assignment]


def test_a_new_model_is_loaded_twice_and_then_once(path: Path, loads: Loads) -> None:
    first = digest_of(load_proved(path))
    assert loads.num == 2
    assert digest_of(load_proved(path)) == first
    assert loads.num == 3


@pytest.mark.parametrize("damage", [flip(0), flip(5), flip(-1), wrong_results])
def test_a_wrong_load_is_not_used(
    path: Path, loads: Loads, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    right = digest_of(NativeDecoder.from_directory(path))
    loads.damages = [damage]  # of a model that nothing is known of
    assert digest_of(load_proved(path)) == right
    assert loads.num == 4
    loads.damages = [damage]  # of one that is known
    with caplog.at_level(logging.WARNING):
        assert digest_of(load_proved(path)) == right
    assert loads.num == 6
    assert "other bits than before and is loaded again" in caplog.text


def test_the_same_digest_whatever_number_of_threads(path: Path) -> None:
    decoder = NativeDecoder.from_directory(path)
    before = decoder.kernels.tc_num_threads()
    digests = set()
    for count in (1, 2, 3):
        decoder.set_num_threads(count)
        digests.add(digest_of(decoder))
    decoder.set_num_threads(before)
    assert len(digests) == 1


def test_where_no_two_loads_are_alike_there_is_no_model(path: Path, loads: Loads) -> None:
    loads.damages = [flip(5, byte=number) for number in range(proof.MAX_LOADS)]
    with pytest.raises(ConfigError, match="no two of 5 loads have the same bits"):
        load_proved(path)


def test_a_wrong_record_is_outvoted(
    path: Path, loads: Loads, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = digest_of(load_proved(path))
    (record,) = tmp_path.glob("loaded-*")
    record.write_text("0" * 64)
    assert digest_of(load_proved(path)) == right
    assert "twice the same: they are taken" in caplog.text
    assert record.read_text() == right


def test_a_changed_file_is_a_new_model(path: Path, loads: Loads, tmp_path: Path) -> None:
    load_proved(path)
    (weights,) = path.glob("*.safetensors")
    os.utime(weights, ns=(0, 0))
    load_proved(path)
    assert loads.num == 4
    assert len(list(tmp_path.glob("loaded-*"))) == 2


def test_records_do_not_pile_up(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "MAX_RECORDS", 3)
    (weights,) = path.glob("*.safetensors")
    for version in range(5):
        os.utime(weights, ns=(0, version))
        load_proved(path)
        newest = max(tmp_path.glob("loaded-*"), key=lambda record: record.stat().st_mtime_ns)
        os.utime(newest, ns=(0, version))  # as if hours had passed
    found = {record.stat().st_mtime_ns for record in tmp_path.glob("loaded-*")}
    assert found == {2, 3, 4}


def test_without_a_place_for_the_record_every_start_loads_twice(
    path: Path, loads: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "cache_directory", lambda: tmp_path / "missing")
    for num in (2, 4):
        load_proved(path)
        assert loads.num == num
