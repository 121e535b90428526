"""Everything wrong that a client can send: refused clearly, never a 5xx, and nobody is hurt.

Each test ends by training the same model again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.clients import datum, loss_of, next_token, prompt, service_client, train, trainer_of
from tests.e2e.raw import Raw, request, tensor
from tests.servers import FAKE_MODEL, Server, running_server

GOOD = [next_token([1, 9, 30, 4, 11])]
TOKENS = [1, 9, 30]
FINE: dict[str, Any] = {"target_tokens": [9, 30, 4], "weights": [1.0, 1.0, 1.0]}
RL: dict[str, Any] = {
    "target_tokens": [9, 30, 4],
    "logprobs": [-1.0] * 3,
    "advantages": [1.0] * 3,
}


@pytest.fixture
def service(fake_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(fake_server) as client:
        yield client


@pytest.fixture
def trainer(service: tinker.ServiceClient) -> Iterator[tinker.TrainingClient]:
    """A model that must train like an untouched one after the test."""
    client = trainer_of(service)
    yield client
    expected = train(trainer_of(service), GOOD, 2)
    assert train(client, GOOD, 2) == expected


@pytest.fixture
def raw(fake_server: Server) -> Iterator[Raw]:
    with Raw(fake_server) as client:
        yield client


@pytest.fixture
def model(raw: Raw) -> Iterator[str]:
    """A model of the raw wire; operation 1 is the test's, and 2 and 3 must work after it."""
    model_id = raw.new_model()
    yield model_id
    raw.retrieve(raw.forward_backward(request(model_id, 1)))  # where the test used no number
    raw.retrieve(raw.optim_step(model_id, 2, learning_rate=0.0))
    assert raw.output(raw.forward_backward(request(model_id, 3))).metrics["loss:sum"] > 0
    assert "metrics" in raw.retrieve(raw.optim_step(model_id, 4, learning_rate=1e-3)).json()


def csr(values: list[float], crow: list[int], col: list[int], shape: list[int]) -> types.TensorData:
    return types.TensorData(
        data=values,
        dtype="float32",
        shape=shape,
        sparse_crow_indices=crow,
        sparse_col_indices=col,
    )


SQUARE = np.array([[9, 30], [4, 5], [6, 7]], dtype=np.int64)


# --------------------------------------------------------------------------- datums

BAD_DATUMS: dict[str, tuple[str, types.Datum, str]] = {
    "NaN weight": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0, float("nan"), 1.0]}),
        r"data\[1\]\.weights.*nan.*finite",
    ),
    "infinite weight": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0, float("inf"), 1.0]}),
        r"weights.*inf.*finite",
    ),
    "NaN advantage": (
        "ppo",
        datum(TOKENS, **RL | {"advantages": [float("nan")] * 3}),
        r"advantages.*finite",
    ),
    "infinite logprob": (
        "importance_sampling",
        datum(TOKENS, **RL | {"logprobs": [float("-inf")] * 3}),
        r"logprobs.*finite",
    ),
    "too few weights": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0]}),
        r"weights.*\[1\].*target_tokens.*\[3\]",
    ),
    "too many targets": (
        "cross_entropy",
        datum(TOKENS, target_tokens=[1, 2, 3, 4], weights=[1.0] * 4),
        r"target_tokens.*\[4\].*3 tokens",
    ),
    "a token over the vocabulary": (
        "cross_entropy",
        datum([1, 512, 3], **FINE),
        r"model_input.*512.*outside \[0, 512\)",
    ),
    "a negative token": ("cross_entropy", datum([1, -1, 3], **FINE), r"model_input.*-1.*outside"),
    "a negative target": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"target_tokens": [1, -100, 3]}),
        r"target_tokens.*-100.*outside",
    ),
    "a huge target": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"target_tokens": [1, 2**62, 3]}),
        r"target_tokens.*outside",
    ),
    "no tokens": (
        "cross_entropy",
        datum([], target_tokens=[], weights=[]),
        r"model_input has no tokens",
    ),
    "no chunks": (
        "cross_entropy",
        types.Datum(
            model_input=types.ModelInput.empty(), loss_fn_inputs=datum([1], **FINE).loss_fn_inputs
        ),
        r"model_input has no tokens",
    ),
    "over the context": (
        "cross_entropy",
        next_token([3] * 5000),
        r"4999 tokens.*context length.*4096",
    ),
    "an image": (
        "cross_entropy",
        types.Datum(
            model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")]),
            loss_fn_inputs=datum([1], **FINE).loss_fn_inputs,
        ),
        r"image.*text tokens",
    ),
    "targets missing": (
        "cross_entropy",
        datum(TOKENS, weights=[1.0] * 3),
        r"cross_entropy needs.*target_tokens",
    ),
    "weights missing": (
        "cross_entropy",
        datum(TOKENS, target_tokens=[9, 30, 4]),
        r"cross_entropy needs.*weights",
    ),
    "advantages missing": (
        "ppo",
        datum(TOKENS, target_tokens=[9, 30, 4], logprobs=[0.0] * 3),
        r"ppo needs.*advantages",
    ),
    "mask missing": ("gspo", datum(TOKENS, **RL), r"gspo needs.*sequence_ratio_mask"),
    "an empty mask": (
        "gspo",
        datum(TOKENS, **RL, sequence_ratio_mask=[0.0] * 3),
        r"finite|sequence_ratio_mask",
    ),
    "targets of a wrong type": (
        "cross_entropy",
        datum(
            TOKENS,
            target_tokens=types.TensorData(data=[1.0, 2.0, 3.0], dtype="float32", shape=[3]),
            weights=[1.0] * 3,
        ),
        r"target_tokens must be int64",
    ),
    "two targets where one is allowed": (
        "ppo",
        datum(
            TOKENS,
            target_tokens=SQUARE,
            logprobs=np.zeros((3, 2), np.float32),
            advantages=np.zeros((3, 2), np.float32),
        ),
        r"ppo takes one target per position",
    ),
    "three dimensions": (
        "cross_entropy",
        datum(
            TOKENS, target_tokens=SQUARE.reshape(3, 2, 1), weights=np.ones((3, 2, 1), np.float32)
        ),
        r"target_tokens has the shape \[3, 2, 1\]",
    ),
    "row pointers that shrink": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0, 1.0], [0, 2, 1, 2], [0, 1], [3, 2])),
        r"row pointers must grow",
    ),
    "a column outside": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0, 1.0], [0, 1, 1, 2], [0, 7], [3, 2])),
        r"column index is outside",
    ),
    "too few row pointers": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0], [0, 1], [0], [3, 2])),
        r"2 row pointers for 3 rows",
    ),
    "a sparse tensor that claims to be huge": (
        "cross_entropy",
        datum(
            TOKENS,
            target_tokens=types.TensorData(
                data=[1],
                dtype="int64",
                shape=[3, 2**40],
                sparse_crow_indices=[0, 1, 1, 1],
                sparse_col_indices=[0],
            ),
            weights=csr([1.0], [0, 1, 1, 1], [0], [3, 2**40]),
        ),
        r"elements; limit",
    ),
    "bounds the wrong way round": (
        "ppo",
        datum(TOKENS, **RL, clip_low_threshold=[2.0] * 3, clip_high_threshold=[1.0] * 3),
        r"clip_low_threshold is above clip_high_threshold",
    ),
}


@pytest.mark.parametrize("name", BAD_DATUMS)
def test_a_bad_datum_is_refused_by_place_and_reason(
    trainer: tinker.TrainingClient, name: str
) -> None:
    loss_fn, bad, message = BAD_DATUMS[name]
    companion = datum(TOKENS, **(RL | FINE), sequence_ratio_mask=[1.0] * 3)
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        trainer.forward_backward([companion, bad], loss_fn).result()  # type: ignore[arg-type]
    assert "data[1]" in str(caught.value) or "finite" in str(caught.value)
    assert caught.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="no step was taken"):
        trainer.optim_step(types.AdamParams()).result()


BAD_SETTINGS: dict[str, tuple[str, dict[str, float | str], str]] = {
    "an unknown loss": ("ppo2", {}, r"'ppo2' is not known; known:.*ppo"),
    "an empty loss": ("", {}, "not known"),
    "the custom loss": ("custom", {"loss_id": "x"}, "forward_backward_custom"),
    "an unknown setting": ("ppo", {"clip": 0.2}, r"'clip'.*clip_low_threshold"),
    "a setting for a loss without any": ("cross_entropy", {"beta": 1.0}, "beta"),
    "text for a number": ("dro", {"beta": "high"}, "beta.*number"),
    "a setting that is not finite": ("dro", {"beta": float("nan")}, "beta.*finite"),
    "bounds the wrong way round": (
        "ppo",
        {"clip_low_threshold": 1.5, "clip_high_threshold": 1.2},
        "above",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_loss_is_refused_by_name(trainer: tinker.TrainingClient, name: str) -> None:
    loss_fn, config, message = BAD_SETTINGS[name]
    data = [datum(TOKENS, **(RL | FINE))]
    with pytest.raises(tinker.RequestFailedError, match=message):
        trainer.forward_backward(data, loss_fn, config).result()  # type: ignore[arg-type]
    with pytest.raises(tinker.RequestFailedError, match="no step was taken"):
        trainer.optim_step(types.AdamParams()).result()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.5}, "beta2"),
        ({"eps": -1.0}, "eps"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_a_bad_step_is_refused_by_name(raw: Raw, params: dict[str, float], message: str) -> None:
    model_id = raw.new_model()
    body = json.dumps({"model_id": model_id, "seq_id": 1, "adam_params": params})
    answer = raw.checked(raw.http.post("/optim_step", content=body))
    text = raw.failure(answer.json()["request_id"]) if answer.status_code == 200 else answer.text
    assert message in text or "JSON" in text
    seq = 2 if answer.status_code == 200 else 1
    assert raw.output(raw.forward_backward(request(model_id, seq))).metrics["loss:sum"] > 0
    assert "metrics" in raw.retrieve(raw.optim_step(model_id, seq + 1)).json()


# --------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"max_tokens": 0}, {}, "max_tokens"),
        ({"max_tokens": -5}, {}, "max_tokens"),
        ({"max_tokens": 10**9}, {}, "context"),
        ({"temperature": -1.0}, {}, "temperature"),
        ({"top_p": 0.0}, {}, "top_p"),
        ({"top_p": 1.5}, {}, "top_p"),
        ({"top_k": 0}, {}, "top_k"),
        ({"top_k": -2}, {}, "top_k"),
        ({"stop": [10**6]}, {}, "stop"),
        ({"stop": [""]}, {}, "stop"),
        ({"stop": ["x"] * 1000}, {}, "stop"),
        ({}, {"topk_sample_logprobs": 10**6}, "topk_sample_logprobs"),
        ({}, {"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({}, {"prompt_alt_tokens_k": 10**6}, "prompt_alt_tokens_k"),
        ({}, {"num_samples": 0}, "num_samples"),
        ({}, {"num_samples": -1}, "num_samples"),
        ({}, {"num_samples": 10**6}, "num_samples"),
        ({}, {"prompt": prompt()}, "no tokens"),
        ({}, {"prompt": prompt(1, 512)}, "512"),
        ({}, {"prompt": prompt(1, -3)}, "-3"),
        ({}, {"prompt": prompt(*[3] * 5000)}, "context"),
        (
            {},
            {"prompt_logprobs_last_n": 3, "include_prompt_logprobs": True},
            "prompt_logprobs_last_n",
        ),
        (
            {},
            {"target_prompt_logprobs": types.TensorData(data=[1, 2], dtype="int64", shape=[1, 2])},
            "target_prompt_logprobs",
        ),
        (
            {},
            {
                "target_prompt_logprobs": types.TensorData(
                    data=[9, 999], dtype="int64", shape=[2, 1]
                )
            },
            "999",
        ),
    ],
)
def test_a_bad_sample_is_refused_by_name(
    service: tinker.ServiceClient, params: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
    call: dict[str, Any] = {"prompt": prompt(1, 2, 3), "num_samples": 1} | options
    with pytest.raises(tinker.TinkerError, match=message):
        sampler.sample(
            sampling_params=types.SamplingParams(**{"max_tokens": 4} | params), **call
        ).result()
    reply = sampler.sample(prompt(1), 1, types.SamplingParams(max_tokens=4, stop=[])).result()
    assert len(reply.sequences[0].tokens) == 4


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


# --------------------------------------------------------------------------- other people


def test_other_peoples_things_are_not_there(fake_server: Server) -> None:
    with service_client(fake_server) as service, Raw(fake_server, fake_server.other_key) as thief:
        trainer = trainer_of(service)
        path = trainer.save_state("mine").result().path
        weights = trainer.save_weights_for_sampler("mine").result().path
        sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
        model_id = trainer.model_id
        session = model_id.split(":")[0]
        own_session = thief.new_session()
        attempts: list[tuple[str, str, dict[str, Any] | None]] = [
            ("POST", "/get_info", {"model_id": model_id}),
            ("POST", "/optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {}}),
            ("POST", "/save_weights", {"model_id": model_id, "seq_id": 3, "path": "theirs"}),
            ("POST", "/session_heartbeat", {"session_id": session}),
            ("POST", f"/sessions/{session}/finish", {"reason": {"type": "success"}}),
            (
                "POST",
                "/create_model",
                {
                    "session_id": session,
                    "model_seq_id": 9,
                    "base_model": FAKE_MODEL,
                    "lora_config": {"rank": 2},
                },
            ),
            (
                "POST",
                "/asample",
                {
                    "sampling_session_id": sampler._sampling_session_id,
                    "seq_id": 77,
                    "num_samples": 1,
                    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
                    "sampling_params": {"max_tokens": 1},
                },
            ),
            (
                "POST",
                "/create_sampling_session",
                {"session_id": own_session, "sampling_session_seq_id": 0, "model_path": weights},
            ),
            ("POST", "/weights_info", {"tinker_path": path}),
            ("GET", f"/samplers/{sampler._sampling_session_id}", None),
            ("GET", f"/training_runs/{model_id}", None),
            ("GET", f"/training_runs/{model_id}/checkpoints", None),
            ("DELETE", f"/training_runs/{model_id}/checkpoints/weights/mine", None),
            (
                "PUT",
                f"/training_runs/{model_id}/checkpoints/weights/mine/ttl",
                {"ttl_seconds": 3600},
            ),
        ]
        for method, url, body in attempts:
            answer = thief.checked(thief.http.request(method, url, json=body))
            assert answer.status_code in (403, 404), (url, answer.text)
        load = thief.post(
            "/load_weights",
            {"session_id": own_session, "model_seq_id": 0, "path": path, "optimizer": False},
        )
        if load.status_code == 200:
            thief.failure(load.json()["request_id"])
        else:
            assert load.status_code in (403, 404)
        stolen = thief.post_bytes("/forward_backward", request(model_id, 3).SerializeToString())
        assert stolen.status_code in (403, 404)
        assert thief.http.get("/training_runs").json()["training_runs"] == []
        assert thief.http.get("/checkpoints").json()["checkpoints"] == []

        assert train(trainer, GOOD, 2)[0] == loss_of(
            trainer_of(service).forward(GOOD, "cross_entropy").result()
        )
        reply = sampler.sample(prompt(1), 1, types.SamplingParams(max_tokens=2, stop=[])).result()
        assert len(reply.sequences[0].tokens) == 2


def test_a_promise_is_only_its_owners(fake_server: Server, raw: Raw) -> None:
    promise = raw.forward_backward(request(raw.new_model(), 1))
    with Raw(fake_server, fake_server.other_key) as thief:
        assert thief.retrieve_once(promise).status_code == 404
        assert thief.post("/cancel_future", {"request_id": promise}).status_code in (204, 404)
    raw.output(promise)


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
