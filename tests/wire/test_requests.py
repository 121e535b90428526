"""The SDK's own request models serialise to what ours read; wrong bodies are explained."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tinker import types
from tinker.types import (
    CreateModelRequest,
    LoadWeightsRequest,
    OptimStepRequest,
    SampleRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from tinker.types.create_sampling_session_request import CreateSamplingSessionRequest
from tinker.types.create_session_request import CreateSessionRequest
from tinker.types.futures_retrieve_request import (
    FuturesRetrieveRequest,
    SamplingSessionFuturesTarget,
)
from tinker.types.optimizer import DimuonParams
from tinker.types.session_search_request import SessionSearchRequest

from tests.wire.strategies import CAPABILITIES  # noqa: F401  (lifts the time limits)
from training.core.errors import InvalidRequest, RequestError, TooLarge
from training.wire import requests
from training.wire.json_base import (
    MAX_JSON_BYTES,
    MAX_METADATA_BYTES,
    ModelInputJson,
    TensorJson,
    WireModel,
    parse_json,
)
from training.wire.records import OtherChunk, TextChunk

EMPTY_PROMPT = types.ModelInput.from_ints([1])


def sent(request: Any) -> dict[str, Any]:
    """The JSON body as the SDK's client writes it."""
    body: dict[str, Any] = json.loads(request.model_dump_json(exclude_none=True))
    return body


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            CreateSessionRequest(tags=["a"], user_metadata={"k": {"x": 1}}, sdk_version="0"),
            requests.CreateSessionRequest,
        ),
        (
            CreateModelRequest(
                session_id="s",
                model_seq_id=0,
                base_model="a/b",
                lora_config=types.LoraConfig(rank=8, seed=3),
            ),
            requests.CreateModelRequest,
        ),
        (
            LoadWeightsRequest(session_id="s", model_seq_id=1, path="tinker://x", optimizer=True),
            requests.LoadWeightsRequest,
        ),
        (
            LoadWeightsRequest(model_id="m", seq_id=1, path="tinker://x", optimizer=False),
            requests.LoadWeightsRequest,
        ),
        (
            SaveWeightsRequest(model_id="m", path="a", seq_id=2, user_metadata={"a": "b"}),
            requests.SaveWeightsRequest,
        ),
        (
            SaveWeightsForSamplerRequest(model_id="m", sampling_session_seq_id=3, seq_id=2),
            requests.SaveWeightsForSamplerRequest,
        ),
        (
            types.SaveWeightsExternalRequest(model_id="m", path="a", seq_id=2, ttl_seconds=3600),
            requests.SaveWeightsExternalRequest,
        ),
        (
            CreateSamplingSessionRequest(
                session_id="s", sampling_session_seq_id=2**40, base_model="a/b"
            ),
            requests.CreateSamplingSessionRequest,
        ),
        (
            FuturesRetrieveRequest(
                target=SamplingSessionFuturesTarget(sampling_session_id="s"), timeout=0
            ),
            requests.RetrieveFuturesRequest,
        ),
        (SessionSearchRequest(display_name="x"), requests.SessionSearchRequest),
    ],
)
def test_reads_what_the_sdk_sends(theirs: Any, ours: type[WireModel]) -> None:
    body = sent(theirs)
    read = parse_json(ours, json.dumps(body).encode()).model_dump(exclude_none=True)
    body.pop("type", None)
    assert {key: read[key] for key in body} == body


def test_optimizer_parameters_by_any_name() -> None:
    adam = OptimStepRequest(
        model_id="m", seq_id=1, optim_params=types.AdamParams(learning_rate=0.5)
    )
    dimuon = OptimStepRequest(model_id="m", seq_id=1, optim_params=DimuonParams(learning_rate=0.5))
    assert "adam_params" in sent(adam)
    assert "optimizer_params" in sent(dimuon)
    for request, family in ((adam, "adamw"), (dimuon, "dimuon")):
        read = parse_json(requests.OptimStepRequest, json.dumps(sent(request)).encode())
        assert (read.params.type, read.params.learning_rate) == (family, 0.5)
    body = b'{"model_id":"m","optim_params":{"learning_rate":1}}'
    assert parse_json(requests.OptimStepRequest, body).params.learning_rate == 1.0


STOPS = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.lists(st.text(max_size=5), max_size=3),
    st.lists(st.integers(0, 10**6), max_size=3),
)


@given(STOPS, st.integers(-(2**70), 2**70), st.integers(0, 2**62))
def test_reads_the_sdk_sample_request(stop: Any, seed: int, seq_id: int) -> None:
    params = types.SamplingParams(max_tokens=5, seed=seed, stop=stop, temperature=0.5)
    request = SampleRequest(
        prompt=EMPTY_PROMPT, sampling_params=params, sampling_session_id="s", seq_id=seq_id
    )
    read = parse_json(requests.SampleJsonRequest, json.dumps(sent(request)).encode())
    assert (read.sampling_params.stop, read.sampling_params.seed) == (stop, seed)
    assert (read.seq_id, read.num_samples) == (seq_id, 1)


def test_chunks() -> None:
    chunks = [
        types.EncodedTextChunk(tokens=[1, 2]),
        types.ImageChunk(data=b"x", format="png"),
        types.ImageAssetPointerChunk(format="png", location="here"),
        types.DmelChunk(dmel=b"x"),
    ]
    body = types.ModelInput(chunks=chunks).model_dump_json().encode()
    text, *others = parse_json(ModelInputJson, body).to_wire("prompt")
    assert isinstance(text, TextChunk)
    assert text.tokens.tolist() == [1, 2]
    assert others == [OtherChunk("image"), OtherChunk("image_asset_pointer"), OtherChunk("dmel")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"request_id": 5}', "request_id: Input should be a valid string"),
        (b'{"request_id": ""}', "request_id: String should have at least 1 character"),
        (b'{"request_id": "a\\u0000"}', "request_id: String should match pattern"),
        (b"", "request_id: Field required"),
        (b"[]", "body: Input should be an object"),
        (b"{", "body: Invalid JSON"),
        (b"\xff", "body: Invalid JSON"),
        (b"[" * 10**6, "recursion limit"),
        (b'{"request_id":' + b"9" * 10**5 + b"}", "number out of range"),
    ],
)
def test_wrong_bodies_are_explained(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_json(requests.RetrieveFutureRequest, body)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(number: str) -> None:
    body = f'{{"model_id":"m","adam_params":{{"learning_rate":{number}}}}}'
    with pytest.raises(InvalidRequest, match="learning_rate: Input should be a finite number"):
        parse_json(requests.OptimStepRequest, body.encode())


@pytest.mark.parametrize("field", ["num_samples", "topk_prompt_logprobs", "seq_id"])
def test_integers_beyond_64_bits(field: str) -> None:
    body = {"prompt": {"chunks": []}, "sampling_params": {}, field: 2**64}
    with pytest.raises(InvalidRequest, match=f"{field}: Input should be less than"):
        parse_json(requests.SampleJsonRequest, json.dumps(body).encode())


def test_many_problems_are_counted() -> None:
    with pytest.raises(InvalidRequest, match=r"^model_id: Field required; .*; and 2 more$"):
        parse_json(requests.OptimStepRequest, b'{"adam_params":%s}' % WRONG_ADAM)


WRONG_ADAM = json.dumps(dict.fromkeys(types.AdamParams.model_fields, "x")).encode()


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ModelInputJson, {"chunks": [5] * 10**5}),
        (ModelInputJson, {"chunks": [{}] * 10**5}),
        (ModelInputJson, {"chunks": [{"tokens": ["x"] * 10**5}]}),
        (TensorJson, {"data": ["x"] * 10**5, "dtype": "int64"}),
        (TensorJson, {"data": [1], "dtype": "int64", "shape": [1] * 10**5}),
        (requests.DatumJson, {"loss_fn_inputs": {str(i): 5 for i in range(10**5)}}),
        (requests.TrainInputJson, {"loss_fn_config": {str(i): [] for i in range(10**5)}}),
        (requests.SamplingParamsJson, {"stop": [None] * 10**5}),
        (requests.CreateSessionRequest, {"tags": [5] * 10**5}),
        (requests.CreateSessionRequest, {"user_metadata": {"\0" * i: 5 for i in range(300)}}),
        (requests.SaveWeightsRequest, {"user_metadata": {str(i): 5 for i in range(10**4)}}),
        (requests.SessionSearchRequest, {"statuses": [{}] * 10**5, "project_ids": [5] * 10**5}),
        (requests.RetrieveFuturesRequest, {"retrieved_request_ids": [5] * 10**5}),
    ],
)
def test_a_wrong_body_costs_no_more_than_a_right_one(model: type[WireModel], body: Any) -> None:
    """pydantic would collect a problem of some 500 bytes for every wrong element."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10


def test_size_limit() -> None:
    with pytest.raises(TooLarge, match="JSON body"):
        parse_json(requests.RetrieveFutureRequest, b" " * (MAX_JSON_BYTES + 1))


def test_metadata_becomes_storable() -> None:
    body = b'{"user_metadata": {"a": NaN, "b": 1e999, "c": [1, {"d": "x"}]}}'
    read = parse_json(requests.CreateSessionRequest, body)
    assert read.user_metadata == {"a": None, "b": None, "c": [1, {"d": "x"}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "cannot be stored"),
        ("x\0", "contains a NUL"),
        ("x" * MAX_METADATA_BYTES, "limit 65536"),
    ],
)
def test_metadata_that_cannot_be_stored(value: object, message: str) -> None:
    body = json.dumps({"user_metadata": {"a": value}}).encode()
    with pytest.raises(InvalidRequest, match=f"user_metadata: .*{message}"):
        parse_json(requests.CreateSessionRequest, body)


def test_tags_are_short_together() -> None:
    for tags in (["x" * 2000] * 33, ["\U0001f600" * 1000] * 17, ["x"] * 1001):
        with pytest.raises(InvalidRequest, match=r"tags: .*(limit 65536|at most 1000)"):
            parse_json(requests.CreateSessionRequest, json.dumps({"tags": tags}).encode())
    most = ["x" * 65] * 1000
    read = parse_json(requests.CreateSessionRequest, json.dumps({"tags": most}).encode())
    assert read.tags == most


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"data": [1.5], "dtype": "int64"}, "whole numbers"),
        ({"data": [2**63], "dtype": "int64"}, "does not fit into int64"),
        ({"data": [1], "dtype": "int64", "sparse_crow_indices": [0]}, "go together"),
    ],
)
def test_json_tensors(tensor: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_json(TensorJson, json.dumps(tensor).encode()).to_wire("t")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("prompt", "chunks", "tokens", "type", "data", "dtype", "shape", "stop"),
                    *("sampling_params", "model_input", "loss_fn_inputs", "input", "user_metadata"),
                ]
            ),
            children,
            max_size=5,
        )
    ),
    max_leaves=20,
)
ALL_REQUESTS = [
    model
    for model in vars(requests).values()
    if isinstance(model, type) and issubclass(model, WireModel) and model is not WireModel
]


@given(st.sampled_from(ALL_REQUESTS), JSON_VALUES | st.binary(max_size=50))
def test_garbage_raises_request_errors_alone(model: type[WireModel], body: Any) -> None:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    with suppress(RequestError):
        parse_json(model, encoded)
