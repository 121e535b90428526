"""What the hub mirror publishes of each served model: configuration, tokenizer, perhaps weights.

Paths are only ever listed, never built from a request, so a request cannot leave the directory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training.config import ModelConfig, TrainingConfig
from training.core.errors import ConfigError, NotFound
from training.models.files import config_files, tokenizer_files, weight_files
from training.models.registry import served_model_info

LLAMA_3_PREFIX = "meta-llama/Llama-3"
LLAMA_3_TOKENIZER = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
"""Where the SDK looks for the tokenizer of every Llama 3 model."""


DEFAULT_REVISION = "main"


class HubError(NotFound):
    """``code`` is the hub's own word (``RepoNotFound``, ``RevisionNotFound``, ``EntryNotFound``);
    ``commit`` is known for an entry only."""

    def __init__(self, code: str, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.commit = commit


@dataclass(frozen=True)
class HubFile:
    """``etag`` names the content in clients' caches: git's blob id, as on the hub itself. Weights
    are too large to hash at start; theirs is made from name, size and time of change."""

    name: str
    path: Path
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class HubRepo:
    name: str
    files: tuple[HubFile, ...]

    @cached_property
    def commit(self) -> str:
        """40 hexadecimal digits that change with any file, as clients expect of a commit."""
        digest = hashlib.sha1(self.name.encode(), usedforsecurity=False)
        for file in self.files:
            digest.update(f"\0{file.name}\0{file.etag}".encode())
        return digest.hexdigest()

    @cached_property
    def by_name(self) -> dict[str, HubFile]:
        return {file.name: file for file in self.files}

    def file(self, name: str) -> HubFile:
        if (file := self.by_name.get(name)) is None:
            raise HubError("EntryNotFound", f"{self.name} has no file {name}", self.commit)
        return file

    def children(self, folder: str, recursive: bool) -> tuple[list[HubFile], list[str]]:
        """Files and subfolders of ``folder`` ("" is the root), both in order."""
        prefix = f"{folder}/" if folder else ""
        inside = [file for file in self.files if file.name.startswith(prefix)]
        if folder and not inside:
            raise HubError("EntryNotFound", f"{self.name} has no folder {folder}", self.commit)
        parts = [file.name.removeprefix(prefix).split("/") for file in inside]
        folders = sorted({prefix + part[0] for part in parts if len(part) > 1})
        direct = [file for file, part in zip(inside, parts, strict=True) if len(part) == 1]
        return (inside if recursive else direct), folders


def published_repo(name: str, directory: Path, weights: bool = False) -> HubRepo:
    """Reads every configuration and tokenizer file of ``directory`` once (a few megabytes)."""
    names = [*config_files(directory), *tokenizer_files(directory)]
    files = [_small_file(directory, name) for name in names if _is_its_own(directory, name)]
    if weights:
        names = weight_files(directory)
        files += [_large_file(directory, name) for name in names if _is_its_own(directory, name)]
    return HubRepo(name, tuple(sorted(files, key=lambda file: file.name)))


def _is_its_own(directory: Path, name: str) -> bool:
    """Whether a file lies in the model's directory, or in the blobs that a snapshot of the Hugging
    Face cache links to. A link that leads elsewhere publishes somebody else's file."""
    found, home = (directory / name).resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    return found.is_relative_to(home) or found.is_relative_to(blobs)


def _small_file(directory: Path, name: str) -> HubFile:
    content = (directory / name).read_bytes()
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return HubFile(name, directory / name, len(content), blob.hexdigest())


def _large_file(directory: Path, name: str) -> HubFile:
    stat = (directory / name).stat()
    identity = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    return HubFile(
        name,
        directory / name,
        stat.st_size,
        hashlib.sha1(identity, usedforsecurity=False).hexdigest(),
    )


class HubMirror:
    """The repositories of all served models, read when first asked for and then kept: a served
    model's directory does not change while the server runs."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._models: dict[str, ModelConfig] = {}
        for model in config.served_models():
            self._models[model.name] = model
            if model.name.startswith(LLAMA_3_PREFIX):
                self._models.setdefault(LLAMA_3_TOKENIZER, model)
        self._repos: dict[str, HubRepo] = {}

    def get(self, name: str, revision: str) -> HubRepo:
        """``revision`` is ``main`` or the repository's commit. Raises ``HubError``."""
        repo = self._find(name)
        if repo is None:
            raise HubError("RepoNotFound", f"{name} is not served here")
        if revision not in (DEFAULT_REVISION, repo.commit):
            raise HubError("RevisionNotFound", f"{name} has no revision {revision}")
        return repo

    def _find(self, name: str) -> HubRepo | None:
        """None for a model that is not served, or has no files (a fake, or not prepared yet)."""
        if repo := self._repos.get(name):
            return repo
        if (model := self._models.get(name)) is None:
            return None
        try:
            directory = served_model_info(model, self._config).directory
        except ConfigError:
            return None
        if directory is None:
            return None
        repo = published_repo(name, directory, weights=self._config.hub.serve_weights)
        return self._repos.setdefault(name, repo)
