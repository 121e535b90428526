"""Checkpoints in an object store: whole or not there, never damaged, cached within bounds."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest

from tests.servers import REPOSITORY
from tests.storage.object_store import BUCKET, ObjectStore
from training.core import ids
from training.core.errors import ConfigError, DamagedFile, NotFound, StorageError
from training.core.threads import in_thread
from training.storage import remote_files
from training.storage.files import MANIFEST, OWNER, CheckpointFiles, Owner
from training.storage.remote_files import RemoteFiles, open_files

FILE = "adapter_model.safetensors"
ME = Owner("mine", is_new=False)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    yield from served(ObjectStore(tmp_path_factory.mktemp("s3")))


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    yield from served(ObjectStore(tmp_path_factory.mktemp("gs"), "gs"))


def served(store: ObjectStore) -> Iterator[ObjectStore]:
    try:
        store.start()
        yield store
    finally:
        store.stop()


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["s3", "gs", "memory"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{tmp_path.name}/checkpoints"
    use(request.getfixturevalue(request.param), monkeypatch)
    return f"{request.param}://{BUCKET}/{tmp_path.name}"


def opened(url: str, cache: Path, cache_bytes: int = 2**30) -> RemoteFiles:
    files = open_files(url, cache, cache_bytes)
    assert isinstance(files, RemoteFiles)
    files.prepare()
    try:
        files.claim(ME)
    except BaseException:
        files.close()
        raise
    return files


@pytest.fixture
def files(url: str, tmp_path: Path) -> Iterator[RemoteFiles]:
    files = opened(url, tmp_path / "cache")
    yield files
    files.close()


@pytest.fixture
def elsewhere(url: str, files: RemoteFiles, tmp_path: Path) -> Iterator[RemoteFiles]:
    """The same store, seen by a server that has nothing of it on its disk."""
    files = opened(url, tmp_path / "other-cache")
    yield files
    files.close()


@pytest.fixture
def bucket(url: str, files: RemoteFiles) -> Any:
    """The objects of this test, as a mapping from path to bytes."""
    scheme = url.split("://")[0]
    system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    return fsspec.FSMap(system._strip_protocol(url), system)


def store(files: CheckpointFiles, name: str, content: bytes = b"weights") -> int:
    staged = files.stage()
    (staged / FILE).write_bytes(content)
    (staged / "adapter_config.json").write_bytes(b"{}")
    return files.commit(staged, name)


def test_what_was_committed_is_found_by_another_machine(
    files: RemoteFiles, elsewhere: RemoteFiles, bucket: Any
) -> None:
    assert store(files, "one") == len(b"weights{}")
    assert files.names() == elsewhere.names() == {"one"}
    whole = {f"one/{FILE}", "one/adapter_config.json", f"one/{MANIFEST}"}
    assert set(bucket) == whole | {OWNER}
    for each in (files, elsewhere):
        assert (each.verify("one") / FILE).read_bytes() == b"weights"
        assert (each.fetch("one") / FILE).read_bytes() == b"weights"
    elsewhere.delete("one")
    elsewhere.delete("one")
    assert files.names() == set()
    assert set(bucket) == {OWNER}
    with pytest.raises(NotFound):
        elsewhere.verify("one")


def test_a_name_that_is_taken_is_not_overwritten(
    files: RemoteFiles, elsewhere: RemoteFiles
) -> None:
    store(files, "one", b"first")
    with pytest.raises(StorageError, match="exists"):
        store(elsewhere, "one", b"second")
    assert (elsewhere.verify("one") / FILE).read_bytes() == b"first"


@pytest.mark.parametrize("damage", [b"weightz", b"weight", b""])
def test_a_damaged_object_is_refused(
    elsewhere: RemoteFiles, files: RemoteFiles, bucket: Any, damage: bytes
) -> None:
    store(files, "one")
    bucket[f"one/{FILE}"] = damage
    with pytest.raises(DamagedFile, match="adapter_model"):
        elsewhere.verify("one")
    del bucket[f"one/{FILE}"]
    with pytest.raises(DamagedFile, match="adapter_model"):
        elsewhere.fetch("one")
    assert not elsewhere.path("one").exists()


@pytest.mark.parametrize(
    "manifest", [b"{", b"[]", b'{"files": {"../../x": {"sha256": "", "size_bytes": 0}}}']
)
def test_a_manifest_that_lies_is_refused(
    elsewhere: RemoteFiles, files: RemoteFiles, bucket: Any, manifest: bytes
) -> None:
    store(files, "one")
    bucket[f"one/{MANIFEST}"] = manifest
    with pytest.raises(DamagedFile, match="manifest"):
        elsewhere.verify("one")


def test_a_damaged_copy_on_disk_is_fetched_again(files: RemoteFiles) -> None:
    store(files, "one")
    (files.path("one") / FILE).write_bytes(b"weightz")
    assert (files.verify("one") / FILE).read_bytes() == b"weights"


def test_an_upload_that_was_cut_off_is_removed_at_the_next_start(
    files: RemoteFiles, bucket: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a killed process leaves it: some objects, no manifest, its note and its staging files."""
    store(files, "whole")
    staged = files.stage()
    (staged / FILE).write_bytes(b"weights")
    (tmp_path / "cache" / ".uploads" / "half").touch()
    bucket[f"half/{FILE}"] = b"weights"
    of_another_server = ids.new_directory()
    bucket[f"{of_another_server}/{FILE}"] = b"weights"
    bucket["not-of-a-server/notes.txt"] = b"hello"
    assert files.names() == {"whole"}, "not seen before it is complete"
    files.close()

    again = opened(url, tmp_path / "cache")
    assert again.names() == {"whole"}
    assert f"half/{FILE}" not in bucket
    assert f"{of_another_server}/{FILE}" in bucket, "it may still be uploading"
    assert not staged.exists()
    assert list((tmp_path / "cache" / ".uploads").iterdir()) == []
    again.close()

    monkeypatch.setattr(remote_files, "SPARED_S", -60.0)
    again = opened(url, tmp_path / "cache")
    whole = {f"whole/{FILE}", "whole/adapter_config.json", f"whole/{MANIFEST}"}
    assert set(bucket) == whole | {OWNER, "not-of-a-server/notes.txt"}
    again.close()


def test_a_clean_up_spares_what_is_just_being_uploaded(
    url: str, files: RemoteFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes."""
    name = ids.new_directory()
    put_file = files._remote.put_file
    cleaned = 0

    def clean_between(source: str, target: str) -> None:
        nonlocal cleaned
        if f"{name}/" in target:
            files._clean()
            cleaned += 1
        put_file(source, target)

    monkeypatch.setattr(remote_files, "SPARED_S", -60.0)
    monkeypatch.setattr(files._remote, "put_file", clean_between)
    store(files, name)
    assert cleaned == 3
    assert set(files._objects(name)) == {FILE, "adapter_config.json", MANIFEST}


@pytest.mark.parametrize("broken", ["_clean", "_make_room", "rename"])
def test_what_is_stored_is_no_failed_save_whatever_fails_afterwards(
    files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("503 SlowDown")

    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    files._cleaned_s = 0.0
    with monkeypatch.context() as patch:
        if broken == "rename":
            patch.setattr(os, "rename", disk_full)
        else:
            patch.setattr(files, broken, fail)
        assert store(files, "one") == len(b"weights{}")
    assert files.names() == {"one"}
    assert (files.verify("one") / FILE).read_bytes() == b"weights"


def test_nothing_is_kept_for_names_that_nobody_uses(files: RemoteFiles) -> None:
    for number in range(5):
        store(files, str(number))
        files.verify(str(number))
    gc.collect()
    assert len(files._locks) == 0
    assert files._uploading == set()


async def test_a_store_that_hangs_holds_nobody_up_who_does_not_use_it(files: RemoteFiles) -> None:
    """It answers again only when somebody else was served."""
    served_others = threading.Event()
    put_file = files._remote.put_file

    def hang(source: str, target: str) -> None:
        if not served_others.wait(60.0):  # only bounds a failure
            raise TimeoutError("everybody else waits for the store")
        put_file(source, target)

    files._remote.put_file = hang
    saves = []
    for number in range(2 * min(32, (os.cpu_count() or 1) + 4)):
        staged = files.stage()
        (staged / FILE).write_bytes(b"weights")
        saves.append(asyncio.create_task(in_thread(files.commit, staged, str(number))))
    await asyncio.sleep(0)  # they are with their threads
    await in_thread(served_others.set)
    await asyncio.gather(*saves)
    assert len(files.names()) == len(saves)


def test_the_cache_is_bounded_and_spares_what_is_used(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "KEPT_S", 0.0)
    files = opened(url, tmp_path / "cache", cache_bytes=4500)
    for number in range(4):
        store(files, str(number), bytes([number]) * 1000)
        os.utime(files.path(str(number)), (number, number))
    assert files.names() == {"0", "1", "2", "3"}
    files.hold("0")
    store(files, "4", b"4" * 1000)
    cached = {name for name in "01234" if files.path(name).exists()}
    assert "0" in cached, "held"
    assert "1" not in cached, "not used for longest"
    assert "4" in cached
    files.let_go("0")
    os.utime(files.path("0"), (0, 0))
    assert (files.verify("1") / FILE).read_bytes() == b"\1" * 1000
    assert not files.path("0").exists()
    assert (files.hold("0") / FILE).read_bytes() == b"\0" * 1000
    files.close()


def test_what_was_read_just_now_stays_however_small_the_cache(url: str, tmp_path: Path) -> None:
    files = opened(url, tmp_path / "cache", cache_bytes=0)
    store(files, "one")
    assert files.path("one").exists()
    past = time.time() - remote_files.KEPT_S - 1
    os.utime(files.path("one"), (past, past))
    store(files, "two")
    assert not files.path("one").exists()
    files.close()


def test_a_store_that_is_down_fails_clearly_and_nothing_half_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_process = ObjectStore(tmp_path)
    use(store_process, monkeypatch)
    url = f"s3://{BUCKET}/prefix"
    with pytest.raises(StorageError, match="cannot use the checkpoint storage"):
        opened(url, tmp_path / "first-cache")
    try:
        store_process.start()
        files = opened(url, tmp_path / "cache")
        store(files, "one")
        store_process.stop()
        for call in (lambda: store(files, "two"), files.names, lambda: files.delete("one")):
            with pytest.raises(StorageError, match="cannot") as raised:
                call()
            assert "hush-hush" not in str(raised.value)
        assert (files.verify("one") / FILE).read_bytes() == b"weights", "from the disk"
        assert list((tmp_path / "cache" / ".staging").iterdir()) == []
        store_process.start()  # empty: it kept everything in memory
        assert files.names() == set()
        store(files, "two")
        assert files.names() == {"two"}
        files.close()
    finally:
        store_process.stop()


def test_a_bucket_that_is_not_there_is_told_at_the_start(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(s3, monkeypatch)
    with pytest.raises(StorageError, match="cannot use the checkpoint storage"):
        opened("s3://no-such-bucket/x", tmp_path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://key:secret@bucket/x", "credentials"),
        ("nonsense://bucket/x", "nonsense"),
    ],
)
def test_what_cannot_be_opened_is_refused(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        open_files(url, tmp_path, 0)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "library"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_library_is_named_with_its_extra(scheme: str, library: str) -> None:
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        "from pathlib import Path\n"
        "from training.storage.remote_files import open_files\n"
        f"open_files('{scheme}://bucket/x', Path('cache'), 0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert "ConfigError" in last
    assert f"pip install 'tinkercloud[{scheme}]'" in last


def test_another_database_is_refused(
    files: RemoteFiles, elsewhere: RemoteFiles, bucket: Any
) -> None:
    store(files, ids.new_directory())
    del bucket[OWNER]
    with pytest.raises(StorageError, match="another database"):
        files.claim(Owner("new", is_new=True))
    files.claim(ME)
    before = dict(bucket)
    with pytest.raises(StorageError, match="It names mine, this one is other"):
        elsewhere.claim(Owner("other", is_new=False))
    assert dict(bucket) == before
    elsewhere.claim(ME)
    assert len(files.names()) == 1


def test_nothing_is_touched_before_it_is_known_whose_it_is(
    files: RemoteFiles, bucket: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what an earlier process left unfinished, and not for a moment."""
    bucket[f"{ids.new_directory()}/{FILE}"] = b"weights"
    bucket[f"noted/{FILE}"] = b"weights"
    notes = tmp_path / "wrong-cache" / ".uploads"
    notes.mkdir(parents=True)
    (notes / "noted").touch()
    before = dict(bucket)
    monkeypatch.setattr(remote_files, "SPARED_S", -60.0)
    wrong = open_files(url, tmp_path / "wrong-cache", 0)
    assert isinstance(wrong, RemoteFiles)

    def refuse(*_: object) -> None:
        raise AssertionError("it writes")

    for change in ("pipe_file", "put_file", "rm_file"):
        monkeypatch.setattr(wrong._remote, change, refuse)
    wrong.prepare()
    with pytest.raises(StorageError, match="It names mine, this one is other"):
        wrong.claim(Owner("other", is_new=False))
    wrong.close()
    assert dict(bucket) == before


def test_a_path_is_a_directory(tmp_path: Path) -> None:
    files = open_files(str(tmp_path / "c"), tmp_path / "cache", 0)
    assert type(files) is CheckpointFiles
    files.prepare()
    store(files, "one")
    manifest = json.loads((tmp_path / "c" / "one" / MANIFEST).read_text())
    assert manifest["files"][FILE]["size_bytes"] == len(b"weights")
    files.close()
