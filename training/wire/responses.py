"""Bodies of the JSON answers, and how they are written.

None is left out; times are aware and end in Z; NaN and infinities never occur, because the SDK's
parser refuses them. Only ``RequestFailed`` and ``TraceExport`` have a field ``error``: to the SDK
that key marks a failed future.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from training.core.errors import ErrorCategory

_JSON_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_SERIALIZE_NUMPY


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


def dump_json(answer: Answer) -> bytes:
    return orjson.dumps(answer.model_dump(exclude_none=True), option=_JSON_OPTIONS)


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what JSON cannot write; the SDK would fail the whole step for one NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def text_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The SDK reads metadata as text to text, but sends any JSON: other values become JSON text."""
    return {
        key: value if isinstance(value, str) else orjson.dumps(value).decode()
        for key, value in metadata.items()
    }


class Problem(Answer):
    """Of every refused request."""

    detail: str
    category: ErrorCategory


# --------------------------------------------------------------------------- control, sessions


class ClientConfig(Answer):
    """Flags the server sets; the SDK has a default for every other."""

    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = False
    custom_loss_server_side: bool = False


class ClientDynamicConfig(Answer):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False


class CreatedSession(Answer):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: Literal["create_session"] = "create_session"


class Heartbeat(Answer):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class TelemetryAccepted(Answer):
    status: Literal["accepted"] = "accepted"


class SupportedModel(Answer):
    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


class ServerCapabilities(Answer):
    supported_models: Sequence[SupportedModel]


class EngineHealth(Answer):
    """``since`` it is in this ``state``; ``restarts`` since the server started."""

    model: str
    state: Literal["starting", "running", "restarting", "failing", "stopped"]
    since: AwareDatetime
    restarts: int
    reviving: int
    """Models that are being brought back after a crash."""


class Healthz(Answer):
    """``engine_down``: training and sampling wait, everything else works."""

    status: Literal["ok", "engine_down"] = "ok"
    engines: Sequence[EngineHealth] = ()


# --------------------------------------------------------------------------- futures


class Promise(Answer):
    request_id: str
    model_id: str | None = None
    sample_sequence_ids: Sequence[str] | None = None


class TryAgain(Answer):
    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class RequestFailed(Answer):
    error: str
    category: ErrorCategory


class FutureFinished(Answer):
    request_id: str
    response_payload_uncompressed_size: int | None = None
    state: Literal["finished"] = "finished"


class FutureFailed(Answer):
    request_id: str
    state: Literal["failed"] = "failed"


class Completions(Answer):
    completions: Sequence[FutureFinished | FutureFailed]
    cursor: int


# --------------------------------------------------------------------------- models


class OptimizerConfig(Answer):
    type: str = "adamw"


class CreatedModel(Answer):
    model_id: str
    type: Literal["create_model"] = "create_model"


class LoadedWeights(Answer):
    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] = "load_weights"


class ModelData(Answer):
    model_name: str
    arch: str | None = None
    tokenizer_id: str | None = None


class ModelInfo(Answer):
    model_id: str
    model_data: ModelData
    optimizer_config: OptimizerConfig = OptimizerConfig()
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    type: Literal["get_info"] = "get_info"


class OptimStepped(Answer):
    """Fill ``metrics`` through ``finite_metrics``."""

    metrics: Mapping[str, Annotated[float, Field(allow_inf_nan=False)]]


class SavedWeights(Answer):
    path: str
    type: Literal["save_weights"] = "save_weights"


class SavedWeightsForSampler(Answer):
    """``path`` of a named save, ``sampling_session_id`` of an ephemeral one."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SavedWeightsExternal(Answer):
    path: str
    size_bytes: int | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class CopiedWeights(Answer):
    tinker_path: str


# --------------------------------------------------------------------------- sampling


class CreatedSamplingSession(Answer):
    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinedSamplingSession(Answer):
    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SamplerInfo(Answer):
    sampler_id: str
    base_model: str
    model_path: str | None = None


# --------------------------------------------------------------------------- REST


class Cursor(Answer):
    offset: int
    limit: int
    total_count: int


class CheckpointInfo(Answer):
    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: AwareDatetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Mapping[str, str] | None = None
    expires_at: AwareDatetime | None = None


class CheckpointList(Answer):
    checkpoints: Sequence[CheckpointInfo]
    cursor: Cursor | None = None


class TrainingRun(Answer):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: AwareDatetime
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: CheckpointInfo | None = None
    last_sampler_checkpoint: CheckpointInfo | None = None
    user_metadata: Mapping[str, str] | None = None


class TrainingRunList(Answer):
    training_runs: Sequence[TrainingRun]
    cursor: Cursor


class WeightsInfo(Answer):
    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class ExternalWeightsUrls(Answer):
    urls: Mapping[str, str]
    expires: AwareDatetime


class SessionInfo(Answer):
    training_run_ids: Sequence[str]
    sampler_ids: Sequence[str]
    user_metadata: Mapping[str, str] | None = None
    display_name: str | None = None


class SessionList(Answer):
    sessions: Sequence[str]


class SessionActive(Answer):
    type: Literal["active"] = "active"


class SessionFinishReason(Answer):
    type: Literal["success", "errored", "interrupted"]


class SessionFinished(Answer):
    reason: SessionFinishReason
    detail: str | None = None
    type: Literal["client_finished"] = "client_finished"


class SessionCancelled(Answer):
    detail: str | None = None
    type: Literal["cancelled"] = "cancelled"


class SessionSummary(Answer):
    session_id: str
    created_at: AwareDatetime
    owner: str
    project_id: str
    checkpoints_count: int
    status: SessionActive | SessionFinished | SessionCancelled | None = None
    display_name: str | None = None
    user_metadata: Mapping[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SearchCursor(Answer):
    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchPage(Answer):
    sessions: Sequence[SessionSummary]
    next_cursor: SearchCursor | None = None


class TraceExport(Answer):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class AuditLog(Answer):
    entries: Sequence[Mapping[str, Any]] = ()


class BillingUsage(Answer):
    data: Sequence[Mapping[str, Any]] = ()


class StorageUsageItem(Answer):
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: str | None = None


class StorageUsage(Answer):
    data: Sequence[StorageUsageItem] = ()
