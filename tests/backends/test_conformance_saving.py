"""What every backend keeps of a state between its capture and its last byte on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.backends.harness import Harness, datum, spec
from tests.backends.steps import exported, logprobs, same_weights, some_data, train, written
from training.core.errors import StorageError

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@contextlib.contextmanager
def slow_disk(directory: Path) -> Iterator[None]:
    """Who writes an adapter into ``directory`` stands still until the end, and then fails; so does
    who gets that far only later."""
    directory.mkdir()
    config_file = directory / CONFIG_FILE
    os.mkfifo(config_file)
    try:
        yield
    finally:
        reader = os.open(config_file, os.O_RDONLY | os.O_NONBLOCK)
        full = directory / "full"
        full.symlink_to("/dev/full")
        full.replace(config_file)
        os.close(reader)


@pytest.mark.parametrize("then", ["stepped", "unloaded", "replaced"])
async def test_what_is_done_after_the_capture_changes_no_file(
    harness: Harness, tmp_path: Path, then: str
) -> None:
    backend = harness.backend
    await backend.load_slot(0, spec())
    await train(harness, 0, *some_data(harness))
    await written(backend.save_state(0, tmp_path / "before"))
    with slow_disk(tmp_path / "first"):
        await backend.save_state(0, tmp_path / "first")
        saving = await backend.save_state(0, tmp_path / "state")
        if then == "stepped":
            await train(harness, 0, *some_data(harness, 1))
        elif then == "unloaded":
            await backend.unload_slot(0)
        else:
            await backend.load_slot(0, spec(seed=2))
            await train(harness, 0, *some_data(harness, 2))
    await saving.written()
    for name in (ADAPTER_FILE, "optimizer.safetensors"):
        same_weights(load_file(tmp_path / "before" / name), load_file(tmp_path / "state" / name))
    for name in (CONFIG_FILE, "state.json"):
        before = (tmp_path / "before" / name).read_bytes()
        assert (tmp_path / "state" / name).read_bytes() == before


async def test_training_does_not_wait_for_the_disk(harness: Harness, tmp_path: Path) -> None:
    """With one state being written and another one waiting for that."""
    await harness.backend.load_slot(0, spec())
    with slow_disk(tmp_path / "first"):
        savings = [await harness.backend.save_state(0, tmp_path / "first")]
        savings.append(await harness.backend.export_adapter(0, tmp_path / "second"))
        await train(harness, 0, *some_data(harness))
    with pytest.raises(StorageError):
        await savings[0].written()
    await savings[1].written()
    down = await exported(harness, 0, tmp_path / "after")
    fresh = load_file(tmp_path / "second" / ADAPTER_FILE)
    assert any(not np.array_equal(down[name], fresh[name]) for name in fresh)


async def test_a_slot_without_moments_is_saved_with_moments_of_zero(
    harness: Harness, tmp_path: Path
) -> None:
    await harness.backend.load_slot(0, spec())
    await written(harness.backend.save_state(0, tmp_path / "state"))
    moments = load_file(tmp_path / "state" / "optimizer.safetensors")
    adapter = load_file(tmp_path / "state" / ADAPTER_FILE)
    assert sum(each.size for each in moments.values()) == 2 * sum(
        each.size for each in adapter.values()
    )
    assert not any(each.any() for each in moments.values())


@pytest.mark.parametrize("file", [CONFIG_FILE, "state.json"])
async def test_a_full_disk_is_told_by_written(harness: Harness, tmp_path: Path, file: str) -> None:
    await harness.backend.load_slot(0, spec())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / file).symlink_to("/dev/full")
    saving = await harness.backend.save_state(0, tmp_path / "full")
    with pytest.raises(StorageError, match="No space left on device"):
        await saving.written()
    await still_works(harness, tmp_path)


@pytest.mark.parametrize("file", [ADAPTER_FILE, "optimizer.safetensors"])
async def test_a_file_that_cannot_be_written_is_told_by_written(
    harness: Harness, tmp_path: Path, file: str
) -> None:
    await harness.backend.load_slot(0, spec())
    (tmp_path / "state" / file / "in the way").mkdir(parents=True)
    saving = await harness.backend.save_state(0, tmp_path / "state")
    with pytest.raises(StorageError, match="cannot write the state") as failure:
        await saving.written()
    assert str(tmp_path) not in str(failure.value)
    await still_works(harness, tmp_path)


async def test_a_directory_that_cannot_be_made_is_told_by_written(
    harness: Harness, tmp_path: Path
) -> None:
    await harness.backend.load_slot(0, spec())
    (tmp_path / "file").touch()
    saving = await harness.backend.export_adapter(0, tmp_path / "file" / "adapter")
    with pytest.raises(StorageError, match="cannot write the state") as failure:
        await saving.written()
    assert str(tmp_path) not in str(failure.value)
    with pytest.raises(StorageError):
        await saving.written()  # as often as it is asked
    await still_works(harness, tmp_path)


async def still_works(harness: Harness, tmp_path: Path) -> None:
    await written(harness.backend.save_state(0, tmp_path / "works"))
    assert np.isfinite(await logprobs(harness, 0, datum(harness.vocab_size, 5, 0))).all()
