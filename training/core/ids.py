"""Identifiers and the ``tinker://`` path grammar: their only home."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from enum import StrEnum

from training.core.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+=-]{0,199}")
_DIRECTORY = re.compile(r"[0-9a-f]{32}")
_SCHEME = "tinker://"


class CheckpointKind(StrEnum):
    """Second part of a ``tinker://`` path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"


@dataclass(frozen=True)
class TinkerPath:
    """``tinker://<training_run_id>/<kind>/<name>``, exactly three parts."""

    training_run_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.training_run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Raises ``InvalidRequest`` for anything that is not a checkpoint path."""
        parts = text.removeprefix(_SCHEME).split("/")
        if not text.startswith(_SCHEME) or len(parts) != 3 or not parts[0]:
            raise InvalidRequest(
                f"{text[:200]!r} is not a checkpoint path; "
                "expected tinker://<training_run_id>/<weights|sampler_weights>/<name>"
            )
        run_id, kind, name = parts
        if kind not in set(CheckpointKind):
            raise InvalidRequest(f"unknown checkpoint kind {kind[:50]!r} in {text[:200]!r}")
        return cls(run_id, CheckpointKind(kind), checked_name(name))


def checked_name(name: str) -> str:
    """A checkpoint name that is one path segment on every system; raises ``InvalidRequest``."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"checkpoint name {name[:50]!r} is not allowed: use 1 to 200 letters, digits and "
            "._@+=- and begin with a letter or digit"
        )
    return name


def new_session_id() -> str:
    return str(uuid.uuid4())


def new_directory() -> str:
    """A name for the files of a checkpoint or snapshot."""
    return uuid.uuid4().hex


def is_directory(name: str) -> bool:
    """Whether ``new_directory`` may have given it: what is called otherwise is somebody else's, and
    never removed."""
    return _DIRECTORY.fullmatch(name) is not None


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


def model_id(session_id: str, model_seq_id: int) -> str:
    """The SDK computes this itself on create-by-load, so the form is fixed."""
    return f"{session_id}:train:{model_seq_id}"


def sampling_session_id(session_id: str, seq: int) -> str:
    return f"{session_id}:sample:{seq}"


def sequence_ids(request_id: str, num_samples: int) -> tuple[str, ...]:
    """One id per sampled sequence, known before sampling starts."""
    return tuple(f"{request_id}:{index}" for index in range(num_samples))
