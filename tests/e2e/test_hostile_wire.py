"""Bytes and JSON that no client should send, on the raw wire: never a 5xx, and nobody is hurt.

Each test of a model ends by training it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.raw import Raw, request, tensor
from tests.servers import FAKE_MODEL, running_server

# --------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"rubbish",
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x1a" * 5000,
        b"{}",
        b'{"model_id": "x", "seq_id": 1}',
        pb.ForwardBackwardRequest(model_id="x").SerializeToString() * 50,
    ],
    ids=["empty", "text", "ones", "length", "nested", "json", "json request", "repeated"],
)
def test_a_corrupt_body_is_refused(raw: Raw, model: str, body: bytes) -> None:
    answer = raw.post_bytes("/forward_backward", body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


def test_a_cut_request_is_refused(raw: Raw, model: str) -> None:
    whole = request(model, 1).SerializeToString()
    for size in range(0, len(whole), 7):
        answer = raw.post_bytes("/forward_backward", whole[:size])
        if answer.status_code == 200:  # cut between two fields: what is missing is noticed later
            raw.failure(answer.json()["request_id"])
            break


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", pb.Tensor(dense=b"\x01\x02\x03", dtype=pb.DTYPE_FLOAT32, shape=[1]), "weights"),
        ("weights", pb.Tensor(dense=b"\0" * 16, dtype=pb.DTYPE_FLOAT32, shape=[2, 1]), "weights"),
        ("weights", pb.Tensor(dense=b"\0" * 16, dtype=pb.DTYPE_FLOAT32, shape=[-4]), "weights"),
        (
            "weights",
            pb.Tensor(dense=b"\0" * 16, dtype=pb.DTYPE_FLOAT32, shape=[2**62, 4]),
            "weights",
        ),
        ("weights", pb.Tensor(dense=b"\0" * 16, shape=[4]), "weights"),
        ("weights", pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[4]), "weights"),
        ("target_tokens", tensor([1.0, 2.0, 3.0, 4.0]), "target_tokens"),
        ("target_tokens", tensor([1] * 9, "int64"), "target_tokens"),
    ],
)
def test_a_malformed_tensor_is_refused_by_name(
    raw: Raw, model: str, field: str, value: pb.Tensor, message: str
) -> None:
    bad = request(model, 1)
    bad.data[0].loss_fn_inputs[field].CopyFrom(value)
    assert message in raw.failure(raw.forward_backward(bad))


def test_tokens_cut_in_the_middle_of_a_number_are_refused(raw: Raw, model: str) -> None:
    bad = request(model, 1)
    bad.data[0].model_input[0].encoded_text.tokens = b"\0" * 7
    assert "model_input" in raw.failure(raw.forward_backward(bad))


def test_a_request_without_datums_is_refused(raw: Raw, model: str) -> None:
    bad = pb.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy")
    assert "empty" in raw.failure(raw.forward_backward(bad))


@pytest.mark.parametrize(
    "body",
    [
        b"rubbish",
        zstandard.compress(b"rubbish"),
        zstandard.compress(request("x", 1).SerializeToString())[:-3],
    ],
    ids=["not zstd", "zstd of rubbish", "cut"],
)
def test_bad_compression_is_refused(raw: Raw, model: str, body: bytes) -> None:
    answer = raw.post_bytes("/forward_backward", body, Content_Encoding="zstd")
    assert 400 <= answer.status_code < 500


def test_an_unknown_encoding_is_refused_by_name(raw: Raw, model: str) -> None:
    answer = raw.post_bytes("/forward_backward", b"x", Content_Encoding="snappy")
    assert 400 <= answer.status_code < 500
    assert "snappy" in answer.text


def test_a_compression_bomb_is_refused(raw: Raw, model: str) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(b"\0" * 2**28)
    assert len(bomb) < 2**18
    answer = raw.post_bytes("/forward_backward", bomb, Content_Encoding="zstd")
    assert answer.status_code in (400, 413)


def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    limit = {"server": {"max_body_bytes": 100_000}}
    with running_server(tmp_path, limit) as server, Raw(server) as raw:
        model_id = raw.new_model()
        huge = b"\0" * 3_000_000
        for path in ("/forward_backward", "/asample", "/create_session"):
            try:
                answer = raw.post_bytes(path, huge)
            except httpx.TransportError:
                continue  # the server may answer and close before it has read everything
            assert answer.status_code == 413
        assert raw.output(raw.forward_backward(request(model_id, 1))).metrics["loss:sum"] > 0


# --------------------------------------------------------------------------- JSON

JSON_ROUTES = (
    "create_session",
    "create_model",
    "get_info",
    "optim_step",
    "load_weights",
    "save_weights",
    "save_weights_for_sampler",
    "create_sampling_session",
    "asample",
    "retrieve_future",
    "cancel_future",
    "session_heartbeat",
    "weights_info",
)
NOT_OBJECTS = (b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000)


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_a_body_that_is_no_json_object_is_refused(raw: Raw, route: str) -> None:
    for body in NOT_OBJECTS:
        answer = raw.checked(
            raw.http.post(f"/{route}", content=body, headers={"Content-Type": "application/json"})
        )
        assert 400 <= answer.status_code < 500, body[:20]


def mutations(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each field in turn of a wrong type, of a hostile value, and missing."""
    rubbish: tuple[Any, ...] = (None, True, -1, 2**70, 1e308, "x", "\0", "x" * 5000, [], {}, [[]])
    for name in body:
        for value in rubbish:
            yield body | {name: value}
        yield {key: value for key, value in body.items() if key != name}


def test_no_mutation_of_a_request_is_answered_with_5xx(raw: Raw) -> None:
    model_id = raw.new_model()
    session = model_id.split(":")[0]
    sampler = raw.post(
        "/create_sampling_session",
        {"session_id": session, "sampling_session_seq_id": 0, "base_model": FAKE_MODEL},
    ).json()["sampling_session_id"]
    bodies: dict[str, dict[str, Any]] = {
        "/create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "display_name": "n"},
        "/create_model": {
            "session_id": session,
            "model_seq_id": 900,
            "base_model": FAKE_MODEL,
            "lora_config": {"rank": 4},
            "optimizer_config": {"type": "adamw"},
            "user_metadata": {"a": "b"},
        },
        "/optim_step": {"model_id": model_id, "seq_id": 900, "adam_params": {"beta1": 0.5}},
        "/save_weights": {
            "model_id": model_id,
            "path": "p",
            "seq_id": 901,
            "ttl_seconds": 7200,
            "overwrite": False,
        },
        "/save_weights_for_sampler": {
            "model_id": model_id,
            "sampling_session_seq_id": 900,
            "kind": "snapshot",
            "seq_id": 902,
        },
        "/load_weights": {
            "model_id": model_id,
            "seq_id": 903,
            "path": f"tinker://{model_id}/weights/x",
            "optimizer": True,
        },
        "/asample": {
            "sampling_session_id": sampler,
            "seq_id": 900,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
            "sampling_params": {"max_tokens": 2},
            "prompt_logprobs": False,
            "topk_prompt_logprobs": 0,
            "prompt_alt_tokens_k": 0,
        },
        "/retrieve_future": {"request_id": "req-x", "allow_metadata_only": False},
        "/retrieve_futures": {
            "target": {
                "type": "sampling_session",
                "sampling_session_id": sampler,
                "cloned_sampler_id": 0,
            },
            "prev_cursor": 0,
            "timeout": 0,
        },
        "/create_sampling_session": {
            "session_id": session,
            "sampling_session_seq_id": 901,
            "base_model": FAKE_MODEL,
        },
        "/get_info": {"model_id": model_id},
        "/weights_info": {"tinker_path": f"tinker://{model_id}/weights/x"},
        "/cancel_future": {"request_id": "req-x"},
        "/session_heartbeat": {"session_id": session},
    }
    for path, body in bodies.items():
        for mutated in mutations(body):
            raw.post(path, mutated)  # asserts that it is no 5xx
    assert raw.output(raw.forward_backward(request(raw.new_model(), 1))).metrics["loss:sum"] > 0


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-1e999"])
def test_numbers_that_json_does_not_have_are_refused(raw: Raw, model: str, value: str) -> None:
    body = f'{{"model_id": "{model}", "seq_id": 1, "adam_params": {{"learning_rate": {value}}}}}'
    answer = raw.checked(raw.http.post("/optim_step", content=body.encode()))
    if answer.status_code == 200:
        assert "learning_rate" in raw.failure(answer.json()["request_id"])
    else:
        assert answer.status_code in (400, 422)


# --------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "/samplers/none",
        "/samplers/%00",
        "/samplers/..%2f..%2fetc%2fpasswd",
        "/training_runs/none",
        "/training_runs/..%2f..",
        "/training_runs/none/checkpoints",
        "/training_runs?limit=-1",
        "/training_runs?limit=x",
        "/training_runs?offset=-5",
        "/training_runs?offset=99999999999999999999",
        "/checkpoints?limit=99999999999999999999",
        "/nothing/here",
    ],
)
def test_a_bad_path_is_answered_with_4xx(raw: Raw, path: str) -> None:
    answer = raw.checked(raw.http.get(path))
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    "path",
    [
        "tinker://",
        "tinker://a",
        "tinker://a/weights",
        "tinker://a/b/c",
        "tinker://../weights/../../etc",
        "tinker://a/weights/..",
        "tinker://a/weights/\0",
        "x" * 5000,
        "",
    ],
)
def test_a_path_that_is_none_is_refused(raw: Raw, model: str, path: str) -> None:
    body = {"model_id": model, "seq_id": 1, "path": path, "optimizer": True}
    answer = raw.post("/load_weights", body)
    if answer.status_code == 200:
        raw.failure(answer.json()["request_id"])


def test_a_field_that_claims_two_gigabytes_is_refused(raw: Raw, model: str) -> None:
    header = pb.ForwardBackwardRequest(model_id=model, seq_id=1).SerializeToString()
    answer = raw.post_bytes("/forward_backward", header + b"\x1a\xff\xff\xff\xff\x07")
    assert 400 <= answer.status_code < 500
