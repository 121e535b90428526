"""Checkpoint directories: complete or absent, damage is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from training.core import ids
from training.core.errors import DamagedFile, NotFound, StorageError
from training.storage import lock
from training.storage.files import OWNER, CheckpointFiles, Owner


@pytest.fixture
def files(tmp_path: Path) -> Iterator[CheckpointFiles]:
    files = CheckpointFiles(tmp_path / "checkpoints")
    files.prepare()
    yield files
    files.close()


def store(files: CheckpointFiles, name: str, content: bytes = b"weights") -> int:
    staged = files.stage()
    (staged / "adapter_model.safetensors").write_bytes(content)
    return files.commit(staged, name)


def test_a_committed_directory_verifies_and_a_staged_one_is_not_seen(
    files: CheckpointFiles,
) -> None:
    staged = files.stage()
    (staged / "a").write_bytes(b"half")
    assert files.names() == set()
    assert store(files, "one") == len(b"weights")
    assert files.names() == {"one"}
    assert (files.verify("one") / "adapter_model.safetensors").read_bytes() == b"weights"
    files.close()
    files.prepare()
    assert not staged.exists()
    assert files.names() == {"one"}


@pytest.mark.parametrize("damage", [b"weightz", b"weight", b""])
def test_damage_is_refused(files: CheckpointFiles, damage: bytes) -> None:
    store(files, "one")
    (files.path("one") / "adapter_model.safetensors").write_bytes(damage)
    with pytest.raises(DamagedFile, match="adapter_model"):
        files.verify("one")


def test_a_missing_file_or_manifest_is_refused(files: CheckpointFiles) -> None:
    store(files, "one")
    (files.path("one") / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFile):
        files.verify("one")
    (files.path("one") / "manifest.json").write_text("{")
    with pytest.raises(DamagedFile, match="manifest"):
        files.verify("one")
    with pytest.raises(NotFound):
        files.verify("two")


def test_delete_removes_and_tolerates_absence(files: CheckpointFiles) -> None:
    store(files, "one")
    files.delete("one")
    files.delete("one")
    assert files.names() == set()


def test_a_name_that_is_taken_is_not_overwritten(files: CheckpointFiles) -> None:
    store(files, "one", b"first")
    with pytest.raises(StorageError):
        store(files, "one", b"second")
    assert (files.verify("one") / "adapter_model.safetensors").read_bytes() == b"first"


def test_a_directory_belongs_to_one_server(
    files: CheckpointFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other would remove this one's checkpoints as nobody's."""
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    staged = files.stage()
    other = CheckpointFiles(tmp_path / "checkpoints")
    with pytest.raises(StorageError, match="another tinkercloud server"):
        other.prepare()
    assert staged.exists()
    files.close()
    other.prepare()
    other.close()


def test_checkpoints_belong_to_one_database(files: CheckpointFiles) -> None:
    files.claim(Owner("mine", is_new=True))
    store(files, "one")
    files.claim(Owner("mine", is_new=False))
    for is_new in (True, False):
        with pytest.raises(StorageError, match="It names mine, this one is other"):
            files.claim(Owner("other", is_new))
    assert files.names() == {"one"}


def test_checkpoints_of_an_earlier_version_are_taken_over_by_who_may_know_them(
    files: CheckpointFiles,
) -> None:
    (files.path("notes")).mkdir()
    store(files, ids.new_directory())
    with pytest.raises(StorageError, match="It names no database, this one is new"):
        files.claim(Owner("new", is_new=True))
    files.claim(Owner("old", is_new=False))
    with pytest.raises(StorageError, match="It names old"):
        files.claim(Owner("new", is_new=True))


def test_what_is_no_checkpoint_is_in_nobodys_way(files: CheckpointFiles) -> None:
    (files.path("notes")).mkdir()
    files.claim(Owner("new", is_new=True))


def test_an_owner_that_cannot_be_read_is_not_taken_for_none(files: CheckpointFiles) -> None:
    files.path(OWNER).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        files.claim(Owner("mine", is_new=False))
