"""Adapter slots: nothing is lost on the way to disk and back; memory stays within its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from tests.engine.slot_cases import (
    IDLE_S,
    LENGTHS,
    SMALLEST_BUDGET,
    Bench,
    Clock,
    SmallDisk,
    assert_same,
    assert_spilling_changes_no_bit,
)
from tests.engine.training_cases import ALL, ATTN, finish, sft_op, unit
from training.backends.base import LoraSpec
from training.core.errors import UserError
from training.engine.slot_memory import BUSY_SHARE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-tied", tmp_path_factory.mktemp("llama"))


# --------------------------------------------------------------------------- bits


@pytest.mark.parametrize("join_operations", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_tenants_with_room_for_none_train_to_the_same_bits(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype, join_operations: bool
) -> None:
    roomy, tight = (
        Bench(checkpoint, tmp_path / name, budget, dtype=dtype, join_operations=join_operations)
        for name, budget in (("roomy", 2**40), ("tight", SMALLEST_BUDGET))
    )
    assert_spilling_changes_no_bit(roomy, tight)


def test_idle_adapters_come_back_as_they_were(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path, dtype=torch.bfloat16)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 1)
    bench.step(0)
    bench.train(0, 2)  # a gradient waits
    before = bench.state(0)
    bench.spill_idle()
    assert bench.memory.num_resident == 0
    assert bench.memory.num_bytes == 0
    assert len(bench.files()) == 1
    assert_same(bench.state(0), before)
    again = Bench(checkpoint, tmp_path / "again", dtype=torch.bfloat16)
    again.trainer.load_slot(0, ALL)
    again.train(0, 1)
    again.step(0)
    again.train(0, 2)
    for each in (bench, again):
        each.step(0)
    assert_same(bench.state(0), again.state(0))


def test_a_failed_unit_leaves_the_gradients_of_slots_on_disk(
    checkpoint: Path, tmp_path: Path
) -> None:
    bench = Bench(checkpoint, tmp_path, SMALLEST_BUDGET)
    for slot in range(2):
        bench.trainer.load_slot(slot, ALL)
        bench.train(slot, slot)
    before = [bench.state(slot) for slot in range(2)]
    run = bench.trainer.forward_backward(
        unit(sft_op(0, LENGTHS, 5), sft_op(1, LENGTHS, 6), sft_op(0, LENGTHS, 7))
    )
    next(run)
    next(run)
    run.close()
    bench.slots.check_integrity()
    for slot in range(2):
        assert_same(bench.state(slot), before[slot])
    with pytest.raises(UserError):
        finish(bench.trainer.forward_backward(unit(sft_op(0, LENGTHS), sft_op(1, (5000,)))))
    for slot in range(2):
        assert_same(bench.state(slot), before[slot])


def test_gradients_of_a_slot_on_disk_can_be_discarded(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 1)
    bench.spill_idle()
    bench.trainer.discard_grads(0)
    assert bench.memory.num_resident == 0
    assert bench.state(0)[3] is None


def test_a_spilled_adapter_is_saved_and_exported(checkpoint: Path, tmp_path: Path) -> None:
    spilled, kept = Bench(checkpoint, tmp_path / "a"), Bench(checkpoint, tmp_path / "b")
    for bench in (spilled, kept):
        bench.trainer.load_slot(0, ALL)
        bench.train(0, 1)
        bench.step(0)
    spilled.spill_idle()
    for name, bench in (("spilled", spilled), ("kept", kept)):
        bench.trainer.capture_state(0).write(tmp_path / name)
        bench.spill_idle()
        bench.trainer.capture_adapter(0).write(tmp_path / f"{name}-export")
    for directory, names in (
        ("", ("adapter_model.safetensors", "optimizer.safetensors", "state.json")),
        ("-export", ("adapter_model.safetensors", "adapter_config.json")),
    ):
        for file in names:
            found = (tmp_path / f"spilled{directory}" / file).read_bytes()
            assert found == (tmp_path / f"kept{directory}" / file).read_bytes()


def test_a_captured_state_is_counted_until_its_writer_lets_go_of_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 1)
    bench.step(0)
    before = bench.memory.num_bytes
    adapter_bytes = 4 * bench.slots.use(0).layout.num_params
    captured = [bench.trainer.capture_state(0), bench.trainer.capture_adapter(0)]
    assert bench.memory.num_bytes == before + 4 * adapter_bytes
    bench.trainer.unload_slot(0)
    bench.slots.check_integrity()
    captured[0].write(tmp_path / "state")
    captured.clear()
    bench.spill_idle()
    assert bench.memory.num_bytes == 0


# --------------------------------------------------------------------------- laziness, budget


def test_a_fresh_slot_holds_nothing_until_it_is_used(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path)
    for slot in range(200):
        bench.trainer.load_slot(slot, LoraSpec(8, slot))
    assert (bench.memory.num_bytes, bench.memory.num_resident) == (0, 0)
    assert bench.slots.available == 800
    finish(bench.trainer.forward(unit(sft_op(7, LENGTHS))))
    num_params = bench.slots.use(7).layout.num_params
    assert bench.memory.num_bytes == 4 * num_params  # neither moments nor a gradient
    bench.train(7, 0)
    assert bench.memory.num_bytes == 8 * num_params
    bench.step(7)
    assert bench.memory.num_bytes == 16 * num_params  # the gradient's buffer is kept for the next
    bench.spill_idle()
    assert bench.memory.num_bytes == 0
    bench.slots.check_integrity()


def test_what_a_seed_gives_needs_no_file(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path, SMALLEST_BUDGET)
    for slot in range(3):
        bench.trainer.load_slot(slot, LoraSpec(4, 1))
        finish(bench.trainer.forward(unit(sft_op(slot, LENGTHS))))
    bench.spill_idle()
    assert not bench.files()
    bench.trainer.capture_state(0).write(tmp_path / "saved")  # of a slot without moments
    bench.trainer.load_slot(1, LoraSpec(4, 1), tmp_path / "saved")
    assert_same(bench.state(1)[:1], bench.state(2)[:1])


def test_an_adapter_that_was_only_read_is_not_written_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 1)
    bench.step(0)
    bench.spill_idle()
    (written,) = bench.files()
    finish(bench.trainer.forward(unit(sft_op(0, LENGTHS))))
    bench.spill_idle()
    assert bench.files() == [written]
    bench.train(0, 2)
    assert not bench.files()  # it is no longer true


def test_the_least_recently_used_leave_first(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path / "first")
    bench.trainer.load_slot(0, ALL)
    num_params = bench.slots.use(0).layout.num_params
    room_for_three = (3 * 12 + 4) * num_params  # weights, moments, and one gradient at a time
    bench = Bench(checkpoint, tmp_path / "second", room_for_three)
    for slot in range(5):
        bench.trainer.load_slot(slot, ALL)
    resident = []
    for slot in (0, 1, 2, 0, 3, 4, 1):
        bench.train(slot, slot)
        bench.step(slot)
        bench.slots.check_integrity()
        assert bench.memory.num_bytes <= room_for_three
        resident.append(bench.slots.resident)
    assert resident == [[0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 2, 3], [0, 3, 4], [1, 3, 4]]


def test_only_what_is_idle_leaves(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path)
    for slot in range(3):
        bench.trainer.load_slot(slot, ALL)
        bench.train(slot, slot)
        bench.step(slot)
        bench.clock.now_s += 8
    assert bench.trainer.tidy(busy=False) == 0.0  # slot 0 is 24 s old; one chunk of it is written
    assert bench.trainer.tidy(busy=False) == 0.0
    while (pause_s := bench.trainer.tidy(busy=False)) == 0.0:
        pass
    assert bench.slots.resident == [1, 2]
    assert pause_s is not None
    assert pause_s == pytest.approx(IDLE_S - 16)
    bench.clock.now_s += pause_s + 0.1
    while bench.trainer.tidy(busy=False) == 0.0:
        pass
    assert bench.slots.resident == [2]
    bench.slots.check_integrity()


def test_use_cancels_an_idle_spill_half_way(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 0)
    bench.step(0)
    bench.clock.now_s += IDLE_S + 1
    for change in (
        lambda: bench.train(0, 1),
        lambda: bench.trainer.discard_grads(0),
        lambda: bench.trainer.unload_slot(0),
    ):
        assert bench.trainer.tidy(busy=False) == 0.0
        assert len(bench.leftovers()) == 1
        change()
        assert not bench.leftovers()
        assert not bench.files()
        bench.slots.check_integrity()
        bench.clock.now_s += IDLE_S + 1


def test_a_busy_engine_gives_little_time_to_idle_adapters(checkpoint: Path, tmp_path: Path) -> None:
    clock = Clock()
    disk = SmallDisk(clock)
    bench = Bench(checkpoint, tmp_path, open_file=disk, clock=clock)
    bench.trainer.load_slot(0, ALL)
    bench.train(0, 0)
    bench.step(0)
    clock.now_s += IDLE_S + 1
    disk.write_s = 0.01
    started_s, paused_s, num_pieces = clock.now_s, 0.0, 0
    while bench.slots.resident:
        pause_s = bench.trainer.tidy(busy=True)
        assert pause_s is not None
        if pause_s > 0:
            assert bench.trainer.tidy(busy=True) == pytest.approx(pause_s)  # too early for more
        clock.now_s += pause_s
        paused_s += pause_s
        num_pieces += 1
    assert num_pieces >= 4  # at least one for each of weights, moments
    assert 1 - paused_s / (clock.now_s - started_s) == pytest.approx(BUSY_SHARE)


def test_two_hundred_idle_tenants_hold_no_memory(checkpoint: Path, tmp_path: Path) -> None:
    bench = Bench(checkpoint, tmp_path, dtype=torch.bfloat16)
    for slot in range(200):
        bench.trainer.load_slot(slot, LoraSpec(4, slot, train_mlp=False, train_unembed=False))
        bench.train(slot, slot)
        bench.step(slot)
    bench.spill_idle()
    assert (bench.memory.num_bytes, bench.slots.resident) == (0, [])
    assert len(bench.files()) == 200
    bench.train(150, 0)
    assert bench.slots.resident == [150]
    for slot in range(200):
        bench.trainer.unload_slot(slot)
    assert not bench.files()
    bench.slots.check_integrity()


def test_adapters_of_other_layer_groups_and_none(checkpoint: Path, tmp_path: Path) -> None:
    empty = LoraSpec(4, 1, train_attn=False, train_mlp=False, train_unembed=False)
    bench = Bench(checkpoint, tmp_path, SMALLEST_BUDGET)
    for slot, spec in enumerate((ATTN, empty)):
        bench.trainer.load_slot(slot, spec)
    for _ in range(2):
        for slot in range(2):
            bench.train(slot, 1)
            bench.step(slot)
    assert bench.state(1)[-1] == 2
