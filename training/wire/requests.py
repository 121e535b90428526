"""Bodies of the JSON requests. Unknown fields are ignored, so that a newer SDK does not break us;
known ones are of exactly the type stated. What the values mean is checked in ``core``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, AwareDatetime, Field

from training.wire.json_base import (
    FewOf,
    Id,
    Int64,
    ListOf,
    Metadata,
    ModelInputJson,
    Seq,
    Tags,
    TensorJson,
    Text,
    TextMetadata,
    WireModel,
)
from training.wire.records import TrainRequest, WireDatum

# --------------------------------------------------------------------------- sessions, control


class ClientConfigRequest(WireModel):
    sdk_version: Text | None = None


class CreateSessionRequest(WireModel):
    """``session_id`` is our own Sessions API's; the SDK never sends it."""

    tags: Tags = Field(default_factory=list)
    user_metadata: Metadata | None = None
    sdk_version: Text | None = None
    project_id: Id | None = None
    display_name: Text | None = None
    session_id: Id | None = None


class SessionHeartbeatRequest(WireModel):
    session_id: Id


class FinishReason(WireModel):
    type: Literal["success", "errored", "interrupted"]


def _shortened(text: str) -> str:
    """Free text of a client's own error, which must not keep it from finishing."""
    return text.replace("\0", "")[:2000]


class FinishSessionRequest(WireModel):
    reason: FinishReason = FinishReason(type="success")
    detail: Annotated[str, AfterValidator(_shortened)] | None = None


class AssignProjectRequest(WireModel):
    project_id: Id


# --------------------------------------------------------------------------- training


class LoraConfigJson(WireModel):
    rank: Int64 = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfigJson(WireModel):
    """The family is open: what a backend lacks is refused later, by name."""

    type: Text = "adamw"


class CreateModelRequest(WireModel):
    session_id: Id
    model_seq_id: Seq
    base_model: Id
    user_metadata: Metadata | None = None
    lora_config: LoraConfigJson | None = None
    optimizer_config: OptimizerConfigJson = OptimizerConfigJson()


class ModelRequest(WireModel):
    """``get_info`` and ``unload_model``."""

    model_id: Id


class OptimizerParamsJson(WireModel):
    """AdamW's fields; of another family only ``type`` is looked at."""

    type: Text = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepRequest(WireModel):
    model_id: Id
    seq_id: Seq | None = None
    params: OptimizerParamsJson = Field(
        validation_alias=AliasChoices("adam_params", "optim_params", "optimizer_params")
    )


class LoadWeightsRequest(WireModel):
    """Either ``session_id`` + ``model_seq_id`` (creates the model) or ``model_id`` + ``seq_id``."""

    path: Text
    optimizer: bool = False
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: Id | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfigJson | None = None
    weights_access_token: Text | None = None


class SaveWeightsRequest(WireModel):
    model_id: Id
    path: Text | None = None
    seq_id: Seq | None = None
    ttl_seconds: Int64 | None = None
    overwrite: bool = False
    user_metadata: TextMetadata | None = None


class SaveWeightsForSamplerRequest(WireModel):
    """Without ``path`` the save is ephemeral and answers a sampling session."""

    model_id: Id
    path: Text | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: Seq | None = None
    ttl_seconds: Int64 | None = None
    user_metadata: TextMetadata | None = None


class SaveWeightsExternalRequest(WireModel):
    model_id: Id
    path: Text
    seq_id: Seq | None = None
    ttl_seconds: Int64 | None = None
    age_encryption_recipients: ListOf[Text] | None = Field(None, max_length=10)


class CopyWeightsRequest(WireModel):
    source_path: Text
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    destination_project_id: Id | None = None
    ttl_seconds: Int64 | None = None


class CreateCustomLossRequest(WireModel):
    """Read as far as refusing it needs."""

    session_id: Id
    custom_loss_seq_id: Seq
    name: Text = ""


# --------------------------------------------------------------------------- JSON forward_backward


class DatumJson(WireModel):
    model_input: ModelInputJson
    loss_fn_inputs: FewOf[TensorJson] = Field(default_factory=dict)

    def to_wire(self, where: str) -> WireDatum:
        return WireDatum(
            chunks=self.model_input.to_wire(f"{where}.model_input"),
            inputs={
                name: tensor.to_wire(f"{where}.{name[:50]}")
                for name, tensor in self.loss_fn_inputs.items()
            },
        )


class TrainInputJson(WireModel):
    data: ListOf[DatumJson] = Field(max_length=1024)
    loss_fn: Text
    loss_fn_config: FewOf[float | str] | None = None


class TrainJsonRequest(WireModel):
    """The JSON twin of the protobuf request, as older SDKs and curl send it."""

    model_id: Id
    seq_id: Seq | None = None
    input: TrainInputJson = Field(
        validation_alias=AliasChoices("forward_backward_input", "forward_input")
    )

    def to_wire(self, seq_id: int, forward_only: bool) -> TrainRequest:
        return TrainRequest(
            model_id=self.model_id,
            seq_id=seq_id,
            loss_fn=self.input.loss_fn,
            loss_config=dict(self.input.loss_fn_config or {}),
            forward_only=forward_only,
            data=[datum.to_wire(f"data[{i}]") for i, datum in enumerate(self.input.data)],
        )


# --------------------------------------------------------------------------- sampling, futures


class CreateSamplingSessionRequest(WireModel):
    session_id: Id
    sampling_session_seq_id: Seq
    base_model: Id | None = None
    model_path: Text | None = None


class JoinSamplingSessionRequest(WireModel):
    sampling_session_id: Id


class SamplingParamsJson(WireModel):
    """``stop``: absent stops at the end token, [] at nothing."""

    max_tokens: Int64 | None = None
    seed: int | None = None
    stop: str | ListOf[str] | ListOf[int] | None = None
    temperature: float = 1.0
    top_k: Int64 = -1
    top_p: float = 1.0


class SampleJsonRequest(WireModel):
    prompt: ModelInputJson
    sampling_params: SamplingParamsJson = SamplingParamsJson()
    num_samples: Int64 = 1
    sampling_session_id: Id | None = None
    seq_id: Seq | None = None
    base_model: Id | None = None
    model_path: Text | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Int64 | None = None
    topk_prompt_logprobs: Int64 = 0
    topk_sample_logprobs: Int64 = 0
    target_prompt_logprobs: TensorJson | None = None
    prompt_alt_tokens_k: Int64 = 0
    record_stability_info: bool | None = None

    def num_numbers(self) -> int:
        """In its lists, with one more for each chunk."""
        num = sum(1 + len(chunk.tokens or ()) for chunk in self.prompt.chunks)
        if (targets := self.target_prompt_logprobs) is not None:
            num += len(targets.data) + len(targets.sparse_crow_indices or ())
        return num


class RetrieveFutureRequest(WireModel):
    request_id: Id
    allow_metadata_only: bool = False


class CancelFutureRequest(WireModel):
    request_id: Id


class FuturesTarget(WireModel):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Seq = 0


class RetrieveFuturesRequest(WireModel):
    target: FuturesTarget
    prev_cursor: Seq = 0
    timeout: float | None = None
    retrieved_request_ids: ListOf[Id] = Field(default_factory=list, max_length=100_000)


# --------------------------------------------------------------------------- REST


class WeightsInfoRequest(WireModel):
    tinker_path: Text


class SetTtlRequest(WireModel):
    ttl_seconds: Int64 | None = None


class SearchOwner(WireModel):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: ListOf[Text] | None = Field(None, min_length=1, max_length=10)


class SessionStatusQuery(WireModel):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: ListOf[Literal["success", "errored", "interrupted"]] | None = Field(
        None, max_length=10
    )


class SessionSearchCursor(WireModel):
    last_created_at: AwareDatetime
    last_session_id: Id


class SessionSearchRequest(WireModel):
    session_id: Id | None = None
    project_ids: ListOf[Id] | None = Field(None, max_length=1000)
    user_metadata: TextMetadata = Field(default_factory=dict)
    display_name: Text | None = Field(None, min_length=1)
    owner: SearchOwner = SearchOwner()
    statuses: ListOf[SessionStatusQuery] | None = Field(None, max_length=10)
    limit: int = Field(50, ge=1, le=200)
    cursor: SessionSearchCursor | None = None
