"""Adapter slots where the disk is full, out of reach, or changed what was on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.checkpoints import make_checkpoint
from tests.engine.slot_cases import IDLE_S, SMALLEST_BUDGET, STEP, Bench, SmallDisk, assert_same
from tests.engine.training_cases import ALL
from training.backends.base import OptimOutput
from training.core.errors import BackendDead, DeathCause, UnitError
from training.engine.optimizer import adamw_step
from training.engine.slot_memory import FAILED_PAUSE_S


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-tied", tmp_path_factory.mktemp("llama"))


def test_a_full_disk_refuses_the_newcomer_and_harms_nobody(
    checkpoint: Path, tmp_path: Path
) -> None:
    disk = SmallDisk()
    bench = Bench(checkpoint, tmp_path, SMALLEST_BUDGET, open_file=disk)
    for slot in range(2):
        bench.trainer.load_slot(slot, ALL)
    bench.train(0, 0)
    bench.step(0)
    before = bench.state(0)
    disk.free_bytes = 100_000
    with pytest.raises(UnitError, match=r"cannot be put on disk \(No space left on device\)"):
        bench.train(1, 1)
    outputs = bench.trainer.optim_step({1: STEP, 0: STEP})
    assert "No space left" in str(outputs[1].error)
    assert outputs[0].error is None
    assert not bench.leftovers()
    bench.slots.check_integrity()
    disk.free_bytes = 1 << 30
    bench.train(1, 1)
    bench.step(1)
    other = Bench(checkpoint, tmp_path / "other")
    other.trainer.load_slot(0, ALL)
    other.train(0, 0)
    other.step(0)
    assert_same(other.state(0), before)
    other.step(0)
    assert_same(bench.state(0), other.state(0))


def test_an_idle_adapter_that_a_full_disk_refuses_stays_and_is_tried_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SmallDisk()
    bench = Bench(checkpoint, tmp_path, open_file=disk)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 0)
    before = bench.state(0)
    disk.free_bytes = 0
    bench.clock.now_s += IDLE_S + 1
    assert bench.trainer.tidy(busy=False) == FAILED_PAUSE_S
    assert "No space left" in caplog.text
    assert bench.trainer.tidy(busy=False) == FAILED_PAUSE_S
    assert bench.slots.resident == [0]
    disk.free_bytes = 1 << 30
    bench.clock.now_s += FAILED_PAUSE_S
    bench.spill_idle()
    assert bench.slots.resident == []
    assert_same(bench.state(0), before)


def test_a_directory_that_cannot_be_made(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bench = Bench(checkpoint, tmp_path / "file" / "spill", SMALLEST_BUDGET)
    bench.trainer.load_slot(0, ALL)
    bench.trainer.load_slot(1, ALL)
    bench.train(0, 0)
    with pytest.raises(UnitError, match="Not a directory") as failure:
        bench.train(1, 0)
    assert str(tmp_path) not in str(failure.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def swap(path: Path) -> None:
    """With another adapter's file of the same size."""
    other = path.with_name("1.spill")
    assert other.stat().st_size == path.stat().st_size
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, truncate, swap, Path.unlink])
def test_a_damaged_file_is_never_used(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    bench = Bench(checkpoint, tmp_path)
    for slot in range(2):
        bench.trainer.load_slot(slot, ALL)
        bench.train(slot, slot)
    bench.step(0, 1)
    bench.spill_idle()
    damage(bench.files()[0])
    with pytest.raises(BackendDead, match="cannot be read back") as failure:
        bench.train(0, 1)
    assert failure.value.cause is DeathCause.LOST
    with pytest.raises(BackendDead, match="cannot be read back") as failure:
        bench.trainer.capture_state(0).write(tmp_path / "saved")
    assert str(tmp_path) not in str(failure.value)
    with pytest.raises(BackendDead, match="cannot be read back"):
        bench.trainer.optim_step({0: STEP, 1: STEP})
    assert bench.trainer.optim_step({1: STEP})[1].error is None
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 1)


def test_the_books_notice_a_file_that_nobody_wrote(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 0)
    bench.spill_idle()
    bench.slots.check_integrity()
    stranger = bench.files()[0].with_name("stranger.spill")
    stranger.touch()
    with pytest.raises(AssertionError, match="files"):
        bench.slots.check_integrity()
    bench.train(0, 1)
    bench.spill_idle()
    assert "inconsistent: files" in caplog.text  # and nothing else comes of it
    stranger.unlink()
    bench.slots.check_integrity()
    held = bench.slots.use(0)
    held.gradient = None  # behind the manager's back
    with pytest.raises(AssertionError, match="bytes"):
        bench.slots.check_integrity()


def test_a_step_of_a_slot_that_does_not_exist_steps_nobody(
    checkpoint: Path, tmp_path: Path
) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 0)
    before = bench.state(0)
    with pytest.raises(UnitError, match="slot 1 holds no adapter"):
        bench.trainer.optim_step({0: STEP, 1: STEP})
    assert_same(bench.state(0), before)


def test_a_step_that_breaks_is_that_of_its_own_slot_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(checkpoint, tmp_path)
    for slot in range(2):
        bench.trainer.load_slot(slot, ALL)
        bench.train(slot, slot)
    forms: list[Callable[..., OptimOutput]] = [adamw_step, no_memory]
    name = "training.engine.adapter_slots.adamw_step"
    monkeypatch.setattr(name, lambda *args: forms.pop(0)(*args))
    outputs = bench.trainer.optim_step({0: STEP, 1: STEP})
    assert outputs[0].error is None
    assert "MemoryError" in (outputs[1].error or "")


def no_memory(*_: object) -> OptimOutput:
    raise MemoryError("no more")
