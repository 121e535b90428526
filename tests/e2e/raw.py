"""The wire without the SDK's client: its protobuf schema and plain HTTP.

For what the client never does: repeating itself, leaving gaps, sending rubbish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from tests.servers import FAKE_MODEL, Server

PROTOBUF = "application/x-protobuf"


class Raw:
    """One key's HTTP client of a server. Every answer must be neither 5xx nor without a body."""

    def __init__(self, server: Server, api_key: str | None = None) -> None:
        self.http = httpx.Client(
            base_url=f"{server.base_url}/api/v1",
            headers={"X-API-Key": api_key or server.api_key},
            timeout=120.0,
        )
        self._sessions: list[str] = []

    def close(self) -> None:
        """Finishes its sessions, so that their models free their slots."""
        for session_id in self._sessions:
            self.post(f"/sessions/{session_id}/finish", {"reason": {"type": "success"}})
        self.http.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.checked(self.http.post(path, json=body))

    def post_bytes(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.checked(
            self.http.post(path, content=body, headers={"Content-Type": PROTOBUF} | named)
        )

    @staticmethod
    def checked(answer: httpx.Response) -> httpx.Response:
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            # Without a length the SDK takes an error for a reset connection and hides it.
            assert int(answer.headers["content-length"]) > 0
        return answer

    def forward_backward(self, message: pb.ForwardBackwardRequest) -> str:
        answer = self.post_bytes("/forward_backward", message.SerializeToString())
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def optim_step(self, model_id: str, seq_id: int, **params: float) -> str:
        body = {"model_id": model_id, "seq_id": seq_id, "adam_params": params}
        answer = self.post("/optim_step", body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def retrieve(self, request_id: str) -> httpx.Response:
        """Polls as the SDK does: 408 means again."""
        while True:
            answer = self.retrieve_once(request_id)
            if answer.status_code != 408:
                return answer

    def retrieve_once(self, request_id: str) -> httpx.Response:
        return self.post(
            "/retrieve_future", {"request_id": request_id, "allow_metadata_only": True}
        )

    def failure(self, request_id: str) -> str:
        """The message of a future that must have failed by the user's fault."""
        answer = self.retrieve(request_id)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("application/json"), "it did not fail"
        body = answer.json()
        assert body["category"] == "user", body
        return str(body["error"])

    def output(self, request_id: str) -> pb.ForwardBackwardOutput:
        answer = self.retrieve(request_id)
        assert PROTOBUF in answer.headers["content-type"], answer.text
        return pb.ForwardBackwardOutput.FromString(answer.content)

    def new_session(self) -> str:
        answer = self.post("/create_session", {"tags": [], "user_metadata": {}})
        self._sessions.append(str(answer.json()["session_id"]))
        return self._sessions[-1]

    def create_model(self, session_id: str, model_seq_id: int = 0) -> httpx.Response:
        body = {
            "session_id": session_id,
            "model_seq_id": model_seq_id,
            "base_model": FAKE_MODEL,
            "lora_config": {
                "rank": 4,
                "seed": 1,
                "train_attn": True,
                "train_mlp": True,
                "train_unembed": True,
            },
            "type": "create_model",
        }
        return self.post("/create_model", body)

    def new_model(self) -> str:
        answer = self.create_model(self.new_session())
        return str(self.retrieve(answer.json()["request_id"]).json()["model_id"])


def tensor(values: Sequence[float], dtype: str = "float32") -> pb.Tensor:
    array = np.array(values, dtype=dtype)
    kind = pb.DTYPE_FLOAT32 if dtype == "float32" else pb.DTYPE_INT64
    return pb.Tensor(dense=array.tobytes(), dtype=kind, shape=list(array.shape))


def request(
    model_id: str,
    seq_id: int,
    tokens: Sequence[int] = (1, 9, 30, 4, 11),
    loss_fn: str = "cross_entropy",
    forward_only: bool = False,
) -> pb.ForwardBackwardRequest:
    """Next-token cross entropy of ``tokens``."""
    message = pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array(tokens[:-1], np.int32).tobytes()
    datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor(tokens[1:], "int64"))
    datum.loss_fn_inputs["weights"].CopyFrom(tensor([1.0] * (len(tokens) - 1)))
    return message
