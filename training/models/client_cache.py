"""Puts served tokenizers into this user's Hugging Face cache, so that the SDK's ``get_tokenizer()``
works on the same machine with no internet and nothing set.

The cache's layout: ``blobs/<etag>``, ``snapshots/<commit>/<file>`` (links to blobs), ``refs/main``
(the commit), ``.no_exist/<commit>/<file>`` (known to be absent). Weights are never put there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from training.models.files import CONFIG_FILES, TOKENIZER_FILES
from training.models.hub import HubRepo, published_repo
from training.models.registry import find_snapshot

ABSENT_CANDIDATES = CONFIG_FILES | TOKENIZER_FILES | {"adapter_config.json"}
"""What transformers may ask for. Those that are not there get an entry saying so: without it,
huggingface_hub 2.4 asks the unreachable hub for each of them six times, in 23 s. (Two listings of
the repository have no cache at all: an offline client that sets neither ``HF_ENDPOINT`` nor
``HF_HUB_OFFLINE`` waits for them, 46 s in all, and then has its tokenizer.)"""


class Seeding(StrEnum):
    SEEDED = "seeded"
    ALREADY_THERE = "already there"
    NO_TOKENIZER = "no tokenizer"


def seed_client_cache(name: str, directory: Path, cache_dir: Path = Path(HF_HUB_CACHE)) -> Seeding:
    """Adds repository ``name`` with the configuration and tokenizer of ``directory``.

    A repository that the cache already has is left alone, unless we seeded it ourselves from
    other files. Raises ``OSError`` where the cache cannot be written.
    """
    repo = published_repo(name, directory)
    if "tokenizer_config.json" not in repo.by_name:
        return Seeding.NO_TOKENIZER
    target = cache_dir / f"models--{name.replace('/', '--')}"
    if target.exists():
        snapshot = find_snapshot(name, cache_dir)
        if snapshot is None or snapshot.name == repo.commit or not _is_ours(name, snapshot):
            return Seeding.ALREADY_THERE
        shutil.rmtree(target)
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache_dir))
    try:
        _write_repository(repo, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if target.exists():  # somebody else was faster
            return Seeding.ALREADY_THERE
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Seeding.SEEDED


def _is_ours(name: str, snapshot: Path) -> bool:
    """Our commits are computed from the files themselves, which no commit of git is."""
    return published_repo(name, snapshot).commit == snapshot.name


def _write_repository(repo: HubRepo, target: Path) -> None:
    snapshot = target / "snapshots" / repo.commit
    blobs, absent = target / "blobs", target / ".no_exist" / repo.commit
    for directory in (snapshot, blobs, absent, target / "refs"):
        directory.mkdir(parents=True)
    for file in repo.files:
        shutil.copyfile(file.path, blobs / file.etag)
        link = snapshot / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / file.etag, link.parent))
    for name in ABSENT_CANDIDATES - repo.by_name.keys():
        (absent / name).touch()
    (target / "refs" / "main").write_text(repo.commit)
