"""A client on the same machine gets the tokenizer from the seeded cache, in whatever way it is
offline; the cache of a user who has the model already is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.servers import REPOSITORY
from training.config import EMBEDDED_MODEL
from training.models.client_cache import Seeding, seed_client_cache
from training.models.registry import find_snapshot

CLOSED_PORT = "http://127.0.0.1:9"
"""Stands for a hub that cannot be reached: the discard port, which nothing listens on."""


def load_as_client(hf_home: Path, settings: dict[str, str], *flags: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "tests.models.hub_client", EMBEDDED_MODEL, *flags]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"HF_HOME": str(hf_home)} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def expected_tokens(tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode("in 2024, <|im_end|>").ids
    return ids


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": CLOSED_PORT}])
def test_a_client_without_internet_gets_the_tokenizer(
    embedded_model: Path, embedded_tokenizer: Tokenizer, tmp_path: Path, offline: dict[str, str]
) -> None:
    cache = tmp_path / "hub"
    assert seed_client_cache(EMBEDDED_MODEL, embedded_model, cache) is Seeding.SEEDED
    loaded = load_as_client(tmp_path, offline, "--no-waiting")
    assert loaded["tokens"] == expected_tokens(embedded_tokenizer)
    assert loaded["eos"] == 2
    assert loaded["model_type"] == "llama"
    assert loaded["chat"].endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_no_weights_are_put_into_the_cache(embedded_model: Path, tmp_path: Path) -> None:
    seed_client_cache(EMBEDDED_MODEL, embedded_model, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("blobs/*")) < 5_000_000
    snapshot = find_snapshot(EMBEDDED_MODEL, tmp_path)
    assert snapshot is not None
    assert sorted(path.name for path in snapshot.iterdir()) == [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def listing(directory: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in directory.rglob("*")}


def test_seeding_again_changes_nothing(embedded_model: Path, tmp_path: Path) -> None:
    seed_client_cache(EMBEDDED_MODEL, embedded_model, tmp_path)
    before = listing(tmp_path)
    assert seed_client_cache(EMBEDDED_MODEL, embedded_model, tmp_path) is Seeding.ALREADY_THERE
    assert listing(tmp_path) == before


@pytest.mark.parametrize("commit", ["a" * 40, None])
def test_what_the_user_downloaded_is_left_alone(
    embedded_model: Path, tmp_path: Path, commit: str | None
) -> None:
    repository = tmp_path / f"models--{EMBEDDED_MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    if commit:
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    before = listing(tmp_path)
    assert seed_client_cache(EMBEDDED_MODEL, embedded_model, tmp_path) is Seeding.ALREADY_THERE
    assert listing(tmp_path) == before


def test_our_own_older_seed_is_replaced(embedded_model: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (older / name).write_text("{}")
    cache = tmp_path / "hub"
    assert seed_client_cache(EMBEDDED_MODEL, older, cache) is Seeding.SEEDED
    assert seed_client_cache(EMBEDDED_MODEL, embedded_model, cache) is Seeding.SEEDED
    snapshot = find_snapshot(EMBEDDED_MODEL, cache)
    assert snapshot is not None
    assert (snapshot / "tokenizer.json").is_file()
    assert len(list(snapshot.parent.iterdir())) == 1


def test_a_model_without_a_tokenizer_seeds_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert seed_client_cache("tests/model", model, tmp_path / "hub") is Seeding.NO_TOKENIZER
    assert not (tmp_path / "hub").exists()
