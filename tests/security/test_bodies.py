"""Bodies that are larger than their route can need, and more of them than there is room for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.raw import PROTOBUF, Raw, request
from tests.security.memory import MIB
from tests.servers import FAKE_MODEL, Server, running_server
from training.routers.bodies import CONTROL_BYTES, POLL_BYTES, TELEMETRY_BYTES
from training.wire.json_base import MAX_METADATA_BYTES

MAX_BODY_BYTES = 8 * MIB
"""So there is room for four of them, and each of two keys may fill it by half."""
CONTROL = (
    "/client/config",
    "/client/dynamic_config",
    "/create_session",
    "/session_heartbeat",
    "/sessions/x/finish",
    "/create_model",
    "/get_info",
    "/optim_step",
    "/load_weights",
    "/save_weights",
    "/save_weights_for_sampler",
    "/create_sampling_session",
    "/join_sampling_session",
    "/retrieve_future",
    "/cancel_future",
    "/weights_info",
)
LIMITS = {
    **dict.fromkeys(CONTROL, CONTROL_BYTES),
    "/telemetry": TELEMETRY_BYTES,
    "/retrieve_futures": POLL_BYTES,
    "/asample": 5 * MIB,  # or less: of a model with 32 tokens of context
    "/forward_backward": MAX_BODY_BYTES,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("bodies")
    model = {"name": FAKE_MODEL, "backend": "fake", "context_length": 32}
    settings = {"server": {"max_body_bytes": MAX_BODY_BYTES}, "supported_models": [model]}
    with running_server(directory, settings) as found:
        yield found


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with Raw(server) as client:
        yield client


# --------------------------------------------------------------------------- routes


def test_every_route_with_a_body_is_known_here(server: Server) -> None:
    paths = httpx.get(f"{server.base_url}/openapi.json").json()["paths"]
    posted = {path for path, methods in paths.items() if "post" in methods and "/hf/" not in path}
    known = {f"/api/v1{path.replace('/x/', '/{session_id}/')}" for path in LIMITS}
    assert posted == known


@pytest.mark.parametrize("path", LIMITS)
def test_a_body_is_no_longer_than_its_route_can_need(raw: Raw, path: str) -> None:
    """Whether it tells its length, comes in pieces, or grows when it is unpacked."""
    body = b'{"x": "' + b"x" * LIMITS[path] + b'"}'
    small = zstandard.compress(body)
    assert len(small) < 10_000
    for answer in (
        raw.http.post(path, content=body),
        raw.http.post(path, content=(body[at : at + MIB] for at in range(0, len(body), MIB))),
        raw.http.post(path, content=small, headers={"Content-Encoding": "zstd"}),
    ):
        assert answer.status_code == 413, answer.text
        assert answer.json()["category"] == "user"
    if LIMITS[path] == CONTROL_BYTES:
        fits = body[: CONTROL_BYTES - 2] + b'"}'
        assert raw.checked(raw.http.post(path, content=fits)).status_code != 413


def test_a_session_may_have_all_that_it_may_have(raw: Raw) -> None:
    """As curl or Python write it: each of two bytes of a character as six."""
    text = "é" * (MAX_METADATA_BYTES // 2 - 20)
    body = {"tags": ["é" * 1000] * 32, "user_metadata": {"a": text}, "display_name": "é" * 2000}
    encoded = json.dumps(body)
    assert len(encoded) > 350_000
    assert raw.http.post("/create_session", content=encoded).status_code == 200


def sampler(raw: Raw) -> str:
    body = {"sampling_session_seq_id": 0, "base_model": FAKE_MODEL}
    body["session_id"] = raw.new_session()
    return str(raw.post("/create_sampling_session", body).json()["sampling_session_id"])


def test_more_numbers_than_a_request_can_need_are_not_parsed(raw: Raw) -> None:
    """They take 25 bytes each in the parser, and two here."""
    start = (
        b'{"sampling_session_id": "%s", "prompt": {"chunks": [{"tokens": [' % sampler(raw).encode()
    )
    for many in (b"1," * (2 * MIB), b"[" * (4 * MIB), b"{}," * MIB, b'"a":' * MIB):
        answer = raw.http.post("/asample", content=start + many + b"1]}]}}")
        assert answer.status_code == 413
        assert "values; limit" in answer.text


def test_the_largest_sampling_request_passes(raw: Raw) -> None:
    """Every chunk, target and stop that there may be, with spaces and escapes."""
    chunks = [{"type": "encoded_text", "tokens": tokens} for tokens in [[1]] * 30 + [[]] * 16_354]
    prompt = {"chunks": chunks}
    targets = {
        "dtype": "int64",
        "shape": [29, 512],
        "data": list(range(512)) * 29,
        "sparse_crow_indices": list(range(0, 512 * 30, 512)),
        "sparse_col_indices": list(range(512)) * 29,
    }
    params = {"max_tokens": 2, "stop": ["\U0001f600" * 1000] * 256}
    body = {"sampling_session_id": sampler(raw), "seq_id": 0, "prompt": prompt, "num_samples": 1}
    body |= {"target_prompt_logprobs": targets, "sampling_params": params}
    answer = raw.http.post("/asample", content=json.dumps(body))
    assert answer.status_code == 200, answer.text
    assert PROTOBUF in raw.retrieve(answer.json()["request_id"]).headers["content-type"]


# --------------------------------------------------------------------------- room


def upload(server: Server, key: str, length: int, sent: int = 0) -> socket.socket:
    """A body on its way: announced, and perhaps begun."""
    address = httpx.URL(server.base_url)
    connection = socket.create_connection((address.host, address.port or 80))
    head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + bytes(sent))
    return connection


def nothing(num_bytes: int) -> bytes:
    """A message without any field that we know: refused for that, once it is read."""
    message = pb.ForwardBackwardRequest(loss_fn="x" * (num_bytes - 6))
    return message.SerializeToString()


def until(status: int, raw: Raw, body: bytes) -> httpx.Response:
    """Asks again until the server has seen what other connections have sent it."""
    while True:
        answer = raw.post_bytes("/forward_backward", body)
        if answer.status_code == status:
            return answer


def test_bodies_on_their_way_have_a_room(server: Server, raw: Raw) -> None:
    """A key that fills its part is sent away, and comes again; another key has its own part, and
    what is small always passes."""
    large = nothing(5 * MIB)
    with (
        closing(upload(server, server.api_key, MAX_BODY_BYTES, sent=1000)),
        closing(upload(server, server.api_key, MAX_BODY_BYTES - 1000)),
    ):
        answer = until(429, raw, large)
        assert answer.headers["Retry-After"] == "1"
        assert "bytes on their way in" in answer.json()["detail"]
        pieces = (large[at : at + MIB] for at in range(0, len(large), MIB))
        assert raw.http.post("/forward_backward", content=pieces).status_code == 429
        packed = raw.post_bytes(
            "/forward_backward", zstandard.compress(large), Content_Encoding="zstd"
        )
        assert packed.status_code == 429
        assert raw.output(raw.forward_backward(request(raw.new_model(), 1))).metrics["loss:sum"] > 0
        with Raw(server, server.other_key) as other:
            assert other.post_bytes("/forward_backward", large).status_code == 400
    until(400, raw, large)
    for _ in range(8):  # all of it is free again, each time
        assert raw.post_bytes("/forward_backward", nothing(MAX_BODY_BYTES)).status_code == 400
