"""A trainer whose slots' clock, disk and budget a test holds in its hands."""

from __future__ import annotations

import errno
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

import torch

from tests.engine.training_cases import ALL, BASE_MODEL, CPU, MLP, finish, sft_op, unit
from training.backends.base import AdamParams, LoraSpec
from training.config import EngineConfig
from training.engine.adapter_slots import AdapterSlots
from training.engine.decoder import Decoder
from training.engine.model import Transformer
from training.engine.slot_memory import SlotMemory
from training.engine.slot_store import SlotStore
from training.engine.spill_files import SpillDirectory, open_for_writing
from training.engine.trainer import Trainer

LENGTHS = (20, 33, 7)
STEP = AdamParams(1e-2, weight_decay=0.1)
IDLE_S = 20.0
SMALLEST_BUDGET = 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class SmallDisk:
    """Files on a disk with ``free_bytes`` left, which fills up in the middle of a write. A write
    takes ``write_s`` of ``clock``."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.free_bytes = 1 << 40
        self.clock = clock or Clock()
        self.write_s = 0.0

    def __call__(self, path: Path) -> BinaryIO:
        return cast(BinaryIO, _SmallDiskFile(path, self))


class _SmallDiskFile(FileIO):
    def __init__(self, path: Path, disk: SmallDisk) -> None:
        super().__init__(path, "wb")
        self._disk = disk

    def write(self, data: object) -> int:
        chunk = memoryview(cast(bytes, data))[: self._disk.free_bytes]
        if not chunk:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._disk.free_bytes -= len(chunk)
        self._disk.clock.now_s += self._disk.write_s
        return super().write(chunk)


class Bench:
    """A trainer whose slots' clock, disk and budget the test holds."""

    def __init__(
        self,
        checkpoint: Path,
        directory: Path,
        budget_bytes: int = 2**40,
        dtype: torch.dtype = torch.float32,
        open_file: Callable[[Path], BinaryIO] = open_for_writing,
        join_operations: bool = False,
        clock: Clock | None = None,
        model: Decoder | None = None,
    ) -> None:
        config = EngineConfig(
            adapter_memory_bytes=budget_bytes,
            idle_spill_s=IDLE_S,
            join_operations=join_operations,
            max_slots=1000,
        )
        model = model or Transformer.from_directory(checkpoint, CPU, dtype)
        self.clock = clock or Clock()
        self.directory = directory
        store = SlotStore(model, SpillDirectory(directory), open_file)
        self.memory = SlotMemory(store, config, self.clock)
        self.slots = AdapterSlots(self.memory, config.max_slots, model.adam)
        self.trainer = Trainer(model, config, BASE_MODEL, slots=self.slots)

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*/*.spill"))

    def leftovers(self) -> list[Path]:
        return sorted(self.directory.glob("*/*.partial"))

    def train(self, slot: int, seed: int) -> float:
        run = self.trainer.forward_backward(unit(sft_op(slot, LENGTHS, seed)))
        (output,) = finish(run)
        return output.metrics["loss:sum"]

    def step(self, *slots: int) -> None:
        outputs = self.trainer.optim_step(dict.fromkeys(slots, STEP))
        assert all(output.error is None for output in outputs.values())

    def spill_idle(self) -> None:
        """Lets everything grow idle."""
        self.clock.now_s += IDLE_S + 1
        while self.trainer.tidy(busy=False) is not None:
            pass

    def state(self, slot: int) -> list[torch.Tensor | int | None]:
        held = self.slots.use(slot)
        parts = [held.weights, held.adam.exp_avg, held.adam.exp_avg_sq, held.gradient]
        copies = [None if part is None else part.clone() for part in parts]
        return [*copies, held.adam.step]


def assert_same(
    found: list[torch.Tensor | int | None], expected: list[torch.Tensor | int | None]
) -> None:
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


def train_three_tenants(bench: Bench) -> list[float]:
    """In units of all of them and alone; the last slot is left with a gradient. Returns losses."""
    for slot, spec in enumerate((ALL, MLP, LoraSpec(7, 9))):
        bench.trainer.load_slot(slot, spec)
    losses = []
    for seed in range(3):
        ops = [sft_op(slot, LENGTHS, 10 * seed + slot) for slot in range(3)]
        outputs = finish(bench.trainer.forward_backward(unit(*ops, ops[0])))
        losses += [output.metrics["loss:sum"] for output in outputs]
        losses.append(bench.train(1, 100 + seed))
        bench.step(0, 1, 2)
        bench.slots.check_integrity()
    losses.append(bench.train(2, 7))
    return losses


def assert_spilling_changes_no_bit(roomy: Bench, tight: Bench) -> None:
    """``tight`` has room for one adapter: each operation sends the others to disk, gradients of the
    running unit included."""
    assert train_three_tenants(tight) == train_three_tenants(roomy)
    assert tight.memory.num_resident == 1
    assert len(tight.files()) == 2
    assert not roomy.files()
    for slot in range(3):
        assert_same(tight.state(slot), roomy.state(slot))
    assert tight.state(2)[-1] == 3
