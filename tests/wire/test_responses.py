"""The SDK's strict response models accept what we answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tinker import types
from tinker.types.client_config_response import ClientConfigResponse
from tinker.types.client_dynamic_config_response import ClientDynamicConfigResponse
from tinker.types.create_sampling_session_response import CreateSamplingSessionResponse
from tinker.types.create_session_response import CreateSessionResponse
from tinker.types.current_checkpoint_storage_usage_response import (
    CurrentCheckpointStorageUsageResponse,
)
from tinker.types.external_weights_urls_response import ExternalWeightsUrlsResponse
from tinker.types.futures_retrieve_response import FuturesRetrieveResponse
from tinker.types.get_sampler_response import GetSamplerResponse
from tinker.types.join_sampling_session_response import JoinSamplingSessionResponse
from tinker.types.request_failed_response import RequestFailedResponse
from tinker.types.session_search_response import SessionSearchResponse
from tinker.types.shared.untyped_api_future import UntypedAPIFuture
from tinker.types.telemetry_response import TelemetryResponse
from tinker.types.try_again_response import TryAgainResponse

from tests.wire.test_protobuf import sample_results, train_outputs
from training.backends.base import SampleResult, TrainOutput
from training.core.errors import ErrorCategory
from training.wire import responses
from training.wire.json_results import forward_backward_output_json, sample_response_json
from training.wire.protobuf import encode_forward_backward_output, encode_sample_response
from training.wire.records import WireTensor

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
PATH = "tinker://s:train:0/weights/a"
CHECKPOINT = responses.CheckpointInfo(
    checkpoint_id="weights/a",
    checkpoint_type="training",
    time=NOW,
    tinker_path=PATH,
    size_bytes=5,
    user_metadata={"a": "b"},
    expires_at=NOW,
)
RUN = responses.TrainingRun(
    training_run_id="s:train:0",
    base_model="a/b",
    model_owner="me",
    is_lora=True,
    last_request_time=NOW,
    last_checkpoint=CHECKPOINT,
)
CURSOR = responses.Cursor(offset=0, limit=20, total_count=1)
SUMMARY = responses.SessionSummary(
    session_id="s",
    created_at=NOW,
    owner="me",
    project_id="default",
    checkpoints_count=0,
    status=responses.SessionFinished(reason=responses.SessionFinishReason(type="success")),
)
PAIRS: list[tuple[responses.Answer, type[Any]]] = [
    (responses.ClientConfig(), ClientConfigResponse),
    (responses.ClientDynamicConfig(), ClientDynamicConfigResponse),
    (responses.CreatedSession(session_id="s"), CreateSessionResponse),
    (responses.TelemetryAccepted(), TelemetryResponse),
    (
        responses.ServerCapabilities(
            supported_models=[responses.SupportedModel(model_name="a/b", max_context_length=5)]
        ),
        types.GetServerCapabilitiesResponse,
    ),
    (
        responses.Promise(request_id="r", sample_sequence_ids=["r:0"]),
        UntypedAPIFuture,
    ),
    (responses.TryAgain(request_id="r"), TryAgainResponse),
    (responses.RequestFailed(error="no", category=ErrorCategory.USER), RequestFailedResponse),
    (
        responses.Completions(
            completions=[
                responses.FutureFinished(request_id="a", response_payload_uncompressed_size=3),
                responses.FutureFailed(request_id="b"),
            ],
            cursor=2,
        ),
        FuturesRetrieveResponse,
    ),
    (responses.CreatedModel(model_id="s:train:0"), types.CreateModelResponse),
    (responses.LoadedWeights(path=PATH), types.LoadWeightsResponse),
    (
        responses.ModelInfo(
            model_id="s:train:0", model_data=responses.ModelData(model_name="a/b"), lora_rank=8
        ),
        types.GetInfoResponse,
    ),
    (responses.OptimStepped(metrics={"grad_norm": 1.0}), types.OptimStepResponse),
    (responses.SavedWeights(path=PATH), types.SaveWeightsResponse),
    (responses.SavedWeightsForSampler(path=PATH), types.SaveWeightsForSamplerResponse),
    (responses.CreatedSamplingSession(sampling_session_id="s"), CreateSamplingSessionResponse),
    (responses.JoinedSamplingSession(client_counter=1), JoinSamplingSessionResponse),
    (responses.SamplerInfo(sampler_id="s", base_model="a/b"), GetSamplerResponse),
    (
        responses.CheckpointList(checkpoints=[CHECKPOINT], cursor=CURSOR),
        types.CheckpointsListResponse,
    ),
    (responses.TrainingRunList(training_runs=[RUN], cursor=CURSOR), types.TrainingRunsResponse),
    (responses.WeightsInfo(base_model="a/b", is_lora=True), types.WeightsInfoResponse),
    (
        responses.ExternalWeightsUrls(urls={"a": "http://h/a"}, expires=NOW),
        ExternalWeightsUrlsResponse,
    ),
    (responses.SessionInfo(training_run_ids=[], sampler_ids=[]), types.GetSessionResponse),
    (responses.SessionList(sessions=["s"]), types.ListSessionsResponse),
    (
        responses.SessionSearchPage(
            sessions=[SUMMARY],
            next_cursor=responses.SearchCursor(last_created_at=NOW, last_session_id="s"),
        ),
        SessionSearchResponse,
    ),
    (
        responses.StorageUsage(
            data=[responses.StorageUsageItem(checkpoint_count=1, size_bytes=1, size_gigabytes=1e-9)]
        ),
        CurrentCheckpointStorageUsageResponse,
    ),
]


@pytest.mark.parametrize(
    ("answer", "theirs"), PAIRS, ids=[type(pair[0]).__name__ for pair in PAIRS]
)
def test_the_sdk_reads_it(answer: responses.Answer, theirs: type[Any]) -> None:
    """Every value we send and they know arrives; times end in Z."""
    body = responses.dump_json(answer)
    assert b"null" not in body
    assert b"+00:00" not in body
    read = theirs.model_validate(orjson.loads(body))
    sent = answer.model_dump(exclude_none=True)
    arrived = read.model_dump()
    for name in set(sent) & set(arrived):
        if isinstance(sent[name], str | int | float | datetime):
            assert arrived[name] == sent[name]


def test_times_are_written_in_utc() -> None:
    assert b'"time":"2026-01-02T03:04:05.678901Z"' in responses.dump_json(CHECKPOINT)


def test_naive_times_are_refused() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        responses.ExternalWeightsUrls(urls={}, expires=datetime(2026, 1, 1))


def test_only_failures_have_a_field_error() -> None:
    """To the SDK the key alone, even null, turns a success into a failure."""
    with_error = {
        answer.__name__
        for answer in responses.Answer.__subclasses__()
        if "error" in answer.model_fields
    }
    assert with_error == {"RequestFailed", "TraceExport"}


@given(st.dictionaries(st.text(max_size=3), st.floats()))
def test_metrics_that_json_cannot_write_are_dropped(metrics: dict[str, float]) -> None:
    kept = responses.finite_metrics(metrics)
    body = responses.dump_json(responses.OptimStepped(metrics=kept))
    assert orjson.loads(body)["metrics"] == kept
    assert set(kept) == {name for name, value in metrics.items() if np.isfinite(value)}


def test_a_metric_that_json_cannot_write_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        responses.OptimStepped(metrics={"a": float("nan")})


def test_metadata_becomes_text() -> None:
    metadata = {"a": "b", "n": 1, "x": {"y": [None]}}
    assert responses.text_metadata(metadata) == {"a": "b", "n": "1", "x": '{"y":[null]}'}


# --------------------------------------------------------------------------- results as JSON


def nullable(array: Any) -> list[Any]:
    return [float(x) if np.isfinite(x) else None for x in np.asarray(array, np.float32).ravel()]


def as_float32(numbers: list[Any]) -> list[Any]:
    return [None if number is None else float(np.float32(number)) for number in numbers]


@given(train_outputs())
def test_forward_backward_output_as_json(output: TrainOutput) -> None:
    answer = orjson.loads(forward_backward_output_json(encode_forward_backward_output(output)))
    assert answer["metrics"] == responses.finite_metrics(output.metrics)
    assert len(answer["loss_fn_outputs"]) == len(output.logprobs)
    for datum, logprobs in zip(answer["loss_fn_outputs"], output.logprobs, strict=True):
        tensor = datum["logprobs"]
        assert (tensor["dtype"], tensor["shape"]) == ("float32", list(logprobs.shape))
        assert as_float32(tensor["data"]) == nullable(logprobs)


@given(sample_results())
def test_sample_response_as_json(result: SampleResult) -> None:
    answer = orjson.loads(sample_response_json(encode_sample_response(result)))
    for sequence, ours in zip(answer["sequences"], result.sequences, strict=True):
        assert sequence["tokens"] == ours.tokens.tolist()
        assert as_float32(sequence["logprobs"]) == nullable(ours.logprobs)
        assert sequence["stop_reason"] == ours.stop_reason.value
    if result.topk_prompt is not None:
        computed = ~np.isnan(result.topk_prompt.logprobs[:, 0])
        assert [row is not None for row in answer["topk_prompt_logprobs"]] == computed.tolist()
    if result.prompt_logprobs is not None:
        assert as_float32(answer["prompt_logprobs"]) == nullable(result.prompt_logprobs)
    if result.prompt_alt is not None:
        tokens = answer["prompt_alt_tokens"]["tokens"]
        assert tokens["data"] == result.prompt_alt.token_ids.ravel().tolist()


def test_sparse_targets_as_json() -> None:
    targets = WireTensor(np.array([5]), (1, 9), np.array([0, 1]), np.array([8]))
    result = SampleResult([], target_prompt_logprobs=np.array([[-0.5]], np.float32))
    answer = orjson.loads(sample_response_json(encode_sample_response(result, targets)))
    assert answer["target_prompt_logprobs"] == {
        "data": [-0.5],
        "dtype": "float32",
        "shape": [1, 9],
        "sparse_crow_indices": [0, 1],
        "sparse_col_indices": [8],
    }
