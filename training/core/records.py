"""Stored objects as frozen records; each state enum has its allowed transitions beside it.

Times are aware UTC datetimes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from training.backends.base import LoraSpec
from training.core.errors import ErrorCategory
from training.core.ids import CheckpointKind, TinkerPath

JsonObject = Mapping[str, Any]


def utcnow() -> datetime:
    return datetime.now(UTC)


class SessionStatus(StrEnum):
    ACTIVE = "active"
    FINISHED = "finished"
    EXPIRED = "expired"


SESSION_TRANSITIONS: Mapping[SessionStatus, frozenset[SessionStatus]] = {
    SessionStatus.ACTIVE: frozenset({SessionStatus.FINISHED, SessionStatus.EXPIRED}),
    SessionStatus.FINISHED: frozenset(),
    SessionStatus.EXPIRED: frozenset(),
}


@dataclass(frozen=True)
class Session:
    session_id: str
    owner: str
    status: SessionStatus
    created_at: datetime
    last_heartbeat_at: datetime
    tags: tuple[str, ...] = ()
    user_metadata: JsonObject = field(default_factory=dict)
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None
    finished_at: datetime | None = None
    finish_reason: str | None = None
    finish_detail: str | None = None


class ModelStatus(StrEnum):
    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"  # creation failed
    LOST = "lost"  # neither a snapshot nor the operations since could bring it back
    UNLOADED = "unloaded"  # its session ended


MODEL_TRANSITIONS: Mapping[ModelStatus, frozenset[ModelStatus]] = {
    ModelStatus.CREATING: frozenset(
        {ModelStatus.READY, ModelStatus.FAILED, ModelStatus.LOST, ModelStatus.UNLOADED}
    ),
    ModelStatus.READY: frozenset({ModelStatus.LOST, ModelStatus.UNLOADED}),
    ModelStatus.FAILED: frozenset({ModelStatus.UNLOADED}),
    ModelStatus.LOST: frozenset({ModelStatus.UNLOADED}),
    ModelStatus.UNLOADED: frozenset(),
}


@dataclass(frozen=True)
class Model:
    """A training run. ``optimizer`` is the family name, fixed at creation."""

    model_id: str
    session_id: str
    model_seq_id: int
    owner: str
    base_model: str
    lora: LoraSpec
    optimizer: str
    status: ModelStatus
    created_at: datetime
    last_request_at: datetime
    user_metadata: JsonObject = field(default_factory=dict)
    loaded_from: str | None = None
    corrupted: bool = False
    """An operation that was run again after a crash came to another result than the client got."""
    fault: str | None = None
    """Why it is corrupted, lost or failed."""


class FutureKind(StrEnum):
    """Named as the SDK's ``X-Tinker-Request-Type``."""

    CREATE_MODEL = "CreateModel"
    LOAD_WEIGHTS = "LoadWeights"
    FORWARD = "Forward"
    FORWARD_BACKWARD = "ForwardBackward"
    OPTIM_STEP = "OptimStep"
    SAVE_WEIGHTS = "SaveWeights"
    SAVE_WEIGHTS_FOR_SAMPLER = "SaveWeightsForSampler"
    SAVE_WEIGHTS_EXTERNAL = "SaveWeightsExternal"
    SAMPLE = "Sample"
    CREATE_CUSTOM_LOSS = "CreateCustomLoss"


STATEFUL_KINDS = frozenset(
    {FutureKind.FORWARD_BACKWARD, FutureKind.OPTIM_STEP, FutureKind.LOAD_WEIGHTS}
)
"""Operations that change a model: to bring it back, these are run again, and their payloads stay
until a snapshot covers them."""


class WindowEffect(StrEnum):
    """What a failed operation did to the gradients accumulated since the last step."""

    SPOILED = "spoiled"  # the next step fails and discards them
    DISCARDED = "discarded"  # they are gone, a new window has begun


class FutureStatus(StrEnum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


FUTURE_TRANSITIONS: Mapping[FutureStatus, frozenset[FutureStatus]] = {
    FutureStatus.PENDING: frozenset(
        {FutureStatus.DONE, FutureStatus.FAILED, FutureStatus.CANCELLED}
    ),
    FutureStatus.DONE: frozenset(),
    FutureStatus.FAILED: frozenset(),
    FutureStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True)
class NewFuture:
    """A promise about to be stored. (``scope``, ``seq``) is unique where seq is not None.

    ``scope`` is the model id, sampling session id or session id whose counter ``seq`` belongs to,
    prefixed with what is counted ("model:", "sample:", "create:", ...). ``payload`` is the request
    as it must be replayed, ``content_type`` tells its encoding.
    """

    request_id: str
    kind: FutureKind
    scope: str
    seq: int | None
    owner: str
    session_id: str
    model_id: str | None
    payload: bytes
    content_type: str
    num_tokens: int = 0
    """Of a forward or forward_backward."""


@dataclass(frozen=True)
class Future:
    """A stored promise, without its payload and its result bytes."""

    request_id: str
    kind: FutureKind
    scope: str
    seq: int | None
    owner: str
    session_id: str
    model_id: str | None
    status: FutureStatus
    created_at: datetime
    finished_at: datetime | None = None
    deaths: int = 0
    """Engines that crashed while they ran it."""
    completion: int | None = None
    """Grows by one with each future of the scope that finishes; the batch poller's cursor."""


@dataclass(frozen=True)
class FutureResult:
    """What ``retrieve_future`` answers: the bytes the client receives, or why there are none."""

    status: FutureStatus
    body: bytes = b""
    content_type: str = "application/json"
    error: str = ""
    category: ErrorCategory = ErrorCategory.SERVER
    effect: WindowEffect | None = None

    def digest(self) -> bytes:
        """sha256 of the body."""
        return hashlib.sha256(self.body).digest()


@dataclass(frozen=True)
class StoredOperation:
    """An operation of a model as the database has it, without its bytes.

    ``outcome`` has no body either; None while it is pending. ``digest`` is that of the body, None
    where an older version stored the result. ``deaths`` counts engines that crashed running it.
    """

    request_id: str
    kind: FutureKind
    seq: int
    num_tokens: int
    deaths: int
    outcome: FutureResult | None
    digest: bytes | None

    @property
    def is_replayed(self) -> bool:
        """Whether it must run again to bring the model back: it changed it."""
        done = self.outcome is not None and self.outcome.status is FutureStatus.DONE
        return done and self.kind in STATEFUL_KINDS | {FutureKind.CREATE_MODEL}


@dataclass(frozen=True)
class Snapshot:
    """A model's weights, moments and step after operation ``seq``; a directory of the snapshot
    root. Without ``with_optimizer`` the moments and the step begin at zero."""

    model_id: str
    seq: int
    directory: str
    with_optimizer: bool
    size_bytes: int
    created_at: datetime


class SamplerKind(StrEnum):
    SNAPSHOT = "snapshot"
    INFLIGHT = "inflight"


@dataclass(frozen=True)
class SamplingSession:
    """``snapshot_id`` names what the sampler loads (None: the base model); for ``inflight`` ones it
    moves on with each inflight save of ``model_id``.

    ``saved_seq`` is the operation that saved it and ``size_bytes`` its size, where it is the
    sampler's own: of no checkpoint, saved under no name.
    """

    sampling_session_id: str
    session_id: str
    owner: str
    base_model: str
    kind: SamplerKind
    created_at: datetime
    model_path: str | None = None
    model_id: str | None = None
    snapshot_id: str | None = None
    num_clones: int = 0
    saved_seq: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk. ``directory`` is relative to the checkpoint root; immutable once stored.

    Ephemeral ones (of unnamed sampler saves) are never listed.
    """

    path: TinkerPath
    owner: str
    base_model: str
    lora: LoraSpec
    optimizer: str
    directory: str
    size_bytes: int
    created_at: datetime
    user_metadata: JsonObject = field(default_factory=dict)
    public: bool = False
    expires_at: datetime | None = None

    @property
    def kind(self) -> CheckpointKind:
        return self.path.kind
