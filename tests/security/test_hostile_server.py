"""A client with a key that means harm, on a real server: each request is refused or fails as the
user's fault, memory stays where it was, and the next client is served."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.raw import PROTOBUF, Raw, request
from tests.security.memory import MIB, resident_bytes
from tests.security.test_decoders import FRAMES, TEXTS, sparse
from tests.servers import FAKE_MODEL, Server, running_server

MAX_GROWTH_BYTES = 48 * MIB
"""The allocator keeps some of what a large body took; the tests send many times as much."""
ROUNDS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("hostile")
    model = directory / "model"
    model.mkdir()
    config = {"vocab_size": 8, "max_position_embeddings": 8, "architectures": ["Tiny"]}
    (model / "config.json").write_text(json.dumps(config))
    (directory / "secret.json").write_text("not for anybody")
    (model / "special_tokens_map.json").symlink_to(directory / "secret.json")
    (model / "chat_template.jinja").symlink_to("/etc/passwd")
    (model / "added_tokens.json").symlink_to(model / "config.json")
    settings = {
        "server": {"max_body_bytes": 64 * MIB, "long_poll_s": 1.0},
        "supported_models": [{"name": FAKE_MODEL, "backend": "fake", "path": str(model)}],
        "scheduler": {"gap_timeout_s": 0.1},
    }
    with running_server(directory, settings) as found:
        yield found


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    """Afterwards the server trains a new model, and logged no crash."""
    with Raw(server) as client:
        yield client
        output = client.output(client.forward_backward(request(client.new_model(), 1)))
        assert output.metrics["loss:sum"] > 0
    assert "crashed" not in server.log_file.read_text()


def refused(raw: Raw, answer: httpx.Response) -> str:
    """The words of a 4xx, or of the promise that failed by the user's fault."""
    raw.checked(answer)
    if answer.status_code == 200:
        return raw.failure(answer.json()["request_id"])
    assert 400 <= answer.status_code < 500, answer.text
    body = answer.json()
    assert body["category"] == "user"
    return str(body["detail"])


def post(raw: Raw, path: str, body: bytes, **headers: str) -> httpx.Response:
    return raw.http.post(path, content=body, headers={"Content-Type": PROTOBUF} | headers)


# --------------------------------------------------------------------------- bodies


def test_hostile_frames_and_bombs(server: Server, raw: Raw) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    bodies = [*FRAMES.values(), bomb, zstandard.compress(bomb)]
    before = 0
    for turn in range(ROUNDS + 1):
        for body in bodies:
            refused(raw, post(raw, "/forward_backward", body, **{"Content-Encoding": "zstd"}))
        if turn == 0:
            before = resident_bytes(server)
    assert resident_bytes(server) - before < MAX_GROWTH_BYTES


def test_hostile_json(server: Server, raw: Raw) -> None:
    before = 0
    for turn in range(ROUNDS):
        for name, body in TEXTS.items():
            answer = raw.checked(raw.http.post("/create_session", content=body))
            assert 400 <= answer.status_code < 500 or len(body) < 10**6 + 100, name
            assert len(answer.content) < 3000
        if turn == 0:
            before = resident_bytes(server)
    assert resident_bytes(server) - before < MAX_GROWTH_BYTES


def lying_requests(model_id: str, seqs: Iterator[int]) -> Iterator[bytes]:
    tensors = [
        pb.Tensor(dense=b"\0" * 4, dtype=pb.DTYPE_INT64, shape=[2**60]),
        pb.Tensor(dense=b"\0" * 8, dtype=pb.DTYPE_INT64, shape=[2**32, 2**32]),
        pb.Tensor(dense=b"\0" * 8, dtype=pb.DTYPE_INT64, shape=[-1]),
        pb.Tensor(dense=b"\0" * 8, dtype=pb.DTYPE_INT64, shape=[-1, -1]),
        pb.Tensor(dense=b"\0" * 8, dtype=pb.DTYPE_INT64, shape=[1] * 1000),
        pb.Tensor(dense=b"\0" * 8, dtype=99, shape=[1]),  # type: ignore[arg-type]
        *(sparse(4, columns) for columns in (2**61, 2**40, 2**24, 2**18)),
        pb.Tensor(
            sparse_csr=pb.SparseCsr(
                values=struct.pack("<q", 1),
                crow_indices=np.array([0, 2**62, -(2**62), 2**62, 1], "<i8").tobytes(),
                col_indices=struct.pack("<q", 2**62),
            ),
            dtype=pb.DTYPE_INT64,
            shape=[4, 4],
        ),
    ]
    for tensor in tensors:
        message = request(model_id, next(seqs))
        message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(tensor)
        yield message.SerializeToString()


def test_tensors_that_lie(server: Server, raw: Raw) -> None:
    model_id, seqs = raw.new_model(), itertools.count(1)
    before = 0
    for turn in range(10 * ROUNDS):
        for body in lying_requests(model_id, seqs):
            refused(raw, post(raw, "/forward_backward", body))
        if turn == 0:
            before = resident_bytes(server)
    assert resident_bytes(server) - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize(
    "graph",
    [
        {"format": 1, "nodes": [{"op": "call_function", "target": "builtins.eval", "args": ["1"]}]},
        {"format": 1, "nodes": [{"op": "call_method", "target": "__reduce__", "args": []}]},
        {"format": 1, "nodes": [{"op": "placeholder"}] * 10_000},
        {"format": 2**70, "nodes": "x" * 10**6},
    ],
)
def test_custom_losses_are_refused_as_a_whole(raw: Raw, graph: dict[str, Any]) -> None:
    """There is no decoder of graphs yet: no route takes one, and no loss reads one."""
    body = {"session_id": raw.new_session(), "custom_loss_seq_id": 0, "name": "x", "graph": graph}
    assert raw.post("/create_custom_loss", body).status_code == 404
    message = request(raw.new_model(), 1, loss_fn="custom")
    message.loss_fn_config_v2["loss_id"].text = json.dumps(graph)[:1000]
    answer = post(raw, "/forward_backward", message.SerializeToString())
    assert "custom" in refused(raw, answer)


# --------------------------------------------------------------------------- names

CLIMBS = (
    "../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "%2e%2e%2f%2e%2e",
    "..\\..\\x",
    "a/../../b",
    "a\0b",
    "a\nb",
    "\u202egnp.exe",
    "．．／",
    "CON ",
    "~root",
    "-rf",
    ".hidden",
    "a" * 201,
    "a" * 1999,
    "",
    " ",
)


@pytest.mark.parametrize("name", CLIMBS)
def test_no_checkpoint_has_such_a_name(server: Server, raw: Raw, name: str) -> None:
    model_id = raw.new_model()
    before = {path for path in server.directory.rglob("*") if path.is_dir()}
    for seq, route in ((1, "/save_weights"), (2, "/save_weights_for_sampler")):
        body = {"model_id": model_id, "seq_id": seq, "path": name}
        refused(raw, raw.http.post(route, json=body))
    session = model_id.split(":")[0]
    for path in (f"tinker://{model_id}/weights/{name}", f"tinker://{name}/weights/a", name):
        load = {"session_id": session, "model_seq_id": next(_seqs), "path": path}
        sample = {"session_id": session, "sampling_session_seq_id": next(_seqs), "model_path": path}
        refused(raw, raw.http.post("/load_weights", json=load))
        refused(raw, raw.http.post("/create_sampling_session", json=sample))
        refused(raw, raw.http.post("/weights_info", json={"tinker_path": path}))
    made = {path for path in server.directory.rglob("*") if path.is_dir()} - before
    assert {path.parent.name for path in made} <= {"checkpoints", ".staging", "metadata"}


_seqs = itertools.count(1)


@pytest.mark.parametrize("name", [*CLIMBS, "%00", "%2e%2e%2fx", "..%2f..%2fetc%2fpasswd", "%ff%fe"])
def test_no_such_name_in_a_url_leads_anywhere(server: Server, raw: Raw, name: str) -> None:
    encoded = quote(name, safe="%") or "%20"
    model_id = raw.new_model()
    for path in (
        f"/api/v1/training_runs/{encoded}",
        f"/api/v1/training_runs/{model_id}/checkpoints/weights/{encoded}/files",
        f"/api/v1/training_runs/{model_id}/checkpoints/{encoded}/a/files",
        f"/api/v1/samplers/{encoded}",
        f"/api/v1/sessions/{encoded}",
        f"/hf/{FAKE_MODEL}/resolve/main/{encoded}",
        f"/hf/{encoded}/x/resolve/main/config.json",
        f"/hf/api/models/{FAKE_MODEL}/tree/main/{encoded}",
    ):
        # Sent as it is: an HTTP library would tidy the path up first.
        asked = raw.http.build_request("GET", server.base_url)
        asked.extensions["target"] = path.encode()
        answer = raw.checked(raw.http.send(asked))
        assert answer.status_code in (400, 404), path
        assert "root:" not in answer.text


def test_links_that_lead_out_of_a_model_are_not_published(server: Server, raw: Raw) -> None:
    base = f"{server.base_url}/hf/{FAKE_MODEL}/resolve/main"
    assert httpx.get(f"{base}/config.json").status_code == 200
    assert httpx.get(f"{base}/added_tokens.json").status_code == 200  # a link within the directory
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        assert httpx.get(f"{base}/{name}").status_code == 404
    listed = httpx.get(f"{server.base_url}/hf/api/models/{FAKE_MODEL}/tree/main").text
    assert "chat_template" not in listed


# --------------------------------------------------------------------------- strangers


def test_a_stranger_uploads_nothing(server: Server, raw: Raw) -> None:
    piece = bytes(MIB)
    before = resident_bytes(server)
    with httpx.Client(base_url=server.base_url, timeout=60.0) as stranger:
        for path in ("/api/v1/forward_backward", "/hf/api/models/a/b/paths-info/main"):
            try:
                answer = stranger.post(path, content=itertools.repeat(piece, 200))
            except httpx.TransportError:
                continue  # answered and closed before everything was sent
            assert answer.status_code in (401, 404, 413)  # unread: no key, no such model
    assert resident_bytes(server) - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize(
    "headers", [{"X-Long": "a" * 70_000}, {f"X-{i}": "1" for i in range(3000)}]
)
def test_the_command_serves_with_bounded_headers(
    server: Server, raw: Raw, headers: dict[str, str]
) -> None:
    """``test_connections.py`` has the rest."""
    answer = httpx.get(f"{server.base_url}/api/v1/health", headers=headers)
    assert answer.status_code == 431
    assert answer.json()["detail"] == "the headers are too long"


def test_a_form_for_a_model_that_is_not_served_is_not_waited_for(server: Server, raw: Raw) -> None:
    with closing(HTTPConnection(server.base_url.removeprefix("http://"), timeout=60)) as client:
        client.putrequest("POST", "/hf/api/models/a/b/paths-info/main")
        client.putheader("Content-Length", "1000")
        client.endheaders(b"paths=")
        assert client.getresponse().status == 404


@pytest.mark.parametrize("route", ["get_info", "retrieve_future", "session_heartbeat"])
def test_very_long_ids(raw: Raw, route: str) -> None:
    field = {"get_info": "model_id", "retrieve_future": "request_id"}.get(route, "session_id")
    for length in (401, 10**5, 10**7):
        answer = raw.http.post(f"/{route}", json={field: "x" * length})
        assert len(refused(raw, answer)) < 1000
    assert raw.http.get("/samplers/" + "x" * 10_000).status_code == 400
    message = pb.ForwardBackwardRequest(model_id="x" * 10**6, seq_id=1)
    assert len(refused(raw, post(raw, "/forward_backward", message.SerializeToString()))) < 200


def test_a_body_that_announces_too_much_is_refused_unread(server: Server, raw: Raw) -> None:
    with closing(HTTPConnection(server.base_url.removeprefix("http://"), timeout=60)) as client:
        client.putrequest("POST", "/api/v1/forward_backward")
        client.putheader("X-API-Key", server.api_key)
        client.putheader("Content-Length", str(2**40))
        client.endheaders(b"x")
        answer = client.getresponse()
        assert answer.status == 413
        assert b"limit" in answer.read()


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"\xff\xfe", 200), (b"paths=%ff%00", 200), (b"&" * 60_000, 413), (b"paths=" * 9999, 200)],
)
def test_rubbish_forms_of_strangers(server: Server, raw: Raw, body: bytes, status: int) -> None:
    url = f"{server.base_url}/hf/api/models/{FAKE_MODEL}/paths-info/main"
    assert raw.checked(httpx.post(url, content=body)).status_code == status


def test_a_client_that_leaves_in_the_middle_is_no_crash(server: Server, raw: Raw) -> None:
    def cut() -> Iterator[bytes]:
        yield b"x" * 1000
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt), Raw(server) as leaver:
            leaver.http.post("/create_session", content=cut())
    assert raw.post("/client/config", {}).status_code == 200


def test_the_log_tells_no_bodies(server: Server) -> None:
    """Runs last: after all of the above the log is short and has none of what was sent."""
    text = Path(server.log_file).read_text()
    assert len(text) < 10**6
    assert "Traceback" not in text
    assert "passwd" not in text
