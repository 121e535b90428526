"""Handshake, keys, sessions and their end, telemetry, and what the server says about itself."""

from __future__ import annotations

import time

import httpx
import pytest
import tinker

from tests.e2e.clients import next_token, prompt, rest_client, service_client, train, trainer_of
from tests.servers import FAKE_MODEL, KEY, Server


def test_a_session_lives_from_its_creation_to_its_finish(fake_server: Server) -> None:
    service = service_client(
        fake_server, user_metadata={"purpose": "test"}, display_name="first light"
    )
    with service:
        trainer = trainer_of(service)
        session_id, model_id = trainer.model_id.split(":")[0], trainer.model_id
        assert model_id == f"{session_id}:train:0"
        sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
        assert (
            len(
                sampler.sample(prompt(3, 4), 1, tinker.SamplingParams(max_tokens=2))
                .result()
                .sequences
            )
            == 1
        )
        info = rest_client(fake_server).get_session(session_id).result()
        assert info.training_run_ids == [model_id]
        assert info.user_metadata == {"purpose": "test"}
        assert info.display_name == "first light"


def test_nothing_works_in_a_finished_session(fake_server: Server) -> None:
    service = service_client(fake_server)
    trainer = trainer_of(service)
    headers = {"X-API-Key": fake_server.api_key}
    with httpx.Client(base_url=fake_server.base_url, headers=headers) as raw:
        session_id = trainer.model_id.split(":")[0]
        finish = f"/api/v1/sessions/{session_id}/finish"
        reason = {"reason": {"type": "success"}, "detail": "done"}
        assert raw.post(finish, json=reason).is_success
        assert raw.post(finish, json={"reason": {"type": "errored"}, "detail": None}).is_success
        beat = raw.post(
            "/api/v1/session_heartbeat",
            json={"session_id": session_id, "type": "session_heartbeat"},
        )
        assert beat.status_code == 410
    with pytest.raises(
        (tinker.TinkerError, ValueError), match=r"(?i)session|ended|finished|unload"
    ):
        trainer.forward_backward([next_token([1, 5, 6])], "cross_entropy").result()


def test_heartbeats_are_accepted(fake_server: Server) -> None:
    with service_client(fake_server) as service:
        session_id = trainer_of(service).model_id.split(":")[0]
        beat = httpx.post(
            f"{fake_server.base_url}/api/v1/session_heartbeat",
            json={"session_id": session_id, "type": "session_heartbeat"},
            headers={"X-API-Key": fake_server.api_key},
        )
        assert beat.status_code == 200


def test_telemetry_is_accepted(fake_server: Server) -> None:
    body = {
        "events": [],
        "platform": "test",
        "sdk_version": "0.38.0",
        "session_id": "sessionless-1",
        "process_uuid": "p",
    }
    answer = httpx.post(
        f"{fake_server.base_url}/api/v1/telemetry",
        json=body,
        headers={"X-API-Key": fake_server.api_key},
    )
    assert answer.json() == {"status": "accepted"}


def test_two_sessions_do_not_share_a_model(fake_server: Server) -> None:
    data = [next_token([1, 7, 9, 7])]
    with service_client(fake_server) as one, service_client(fake_server) as other:
        first, second = trainer_of(one), trainer_of(other)
        before = train(first, data, 3)
        after = train(second, data, 3)
        assert before == after, "the second model felt the first one's steps"


@pytest.mark.parametrize("key", [f"tml-{KEY}", KEY])
def test_a_key_counts_with_and_without_its_prefix(fake_server: Server, key: str) -> None:
    answer = httpx.get(
        f"{fake_server.base_url}/api/v1/get_server_capabilities", headers={"X-API-Key": key}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "tml-wrong"}, {"X-API-Key": ""}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "client/config"),
        ("POST", "create_session"),
        ("POST", "retrieve_future"),
        ("POST", "asample"),
        ("GET", "get_server_capabilities"),
        ("GET", "training_runs"),
        ("GET", "checkpoints"),
    ],
)
def test_without_a_good_key_there_is_nothing(
    fake_server: Server, headers: dict[str, str], method: str, path: str
) -> None:
    answer = httpx.request(
        method, f"{fake_server.base_url}/api/v1/{path}", headers=headers, json={}
    )
    assert answer.status_code == 401
    assert answer.headers["content-length"] != "0"


def test_the_sdk_shows_a_refused_key(fake_server: Server) -> None:
    with pytest.raises(tinker.AuthenticationError, match="401"):
        trainer_of(service_client(fake_server, api_key="tml-wrong"))


def test_health_is_open(fake_server: Server) -> None:
    assert httpx.get(f"{fake_server.base_url}/api/v1/health").status_code == 200


def test_capabilities_name_the_served_models(fake_server: Server) -> None:
    models = rest_client(fake_server).get_server_capabilities().result().supported_models
    assert [model.model_name for model in models] == [FAKE_MODEL]


def test_an_unserved_base_model_is_refused_by_name(fake_server: Server) -> None:
    with service_client(fake_server) as service:
        with pytest.raises(tinker.TinkerError, match="nobody/nothing"):
            trainer_of(service, "nobody/nothing")
        with pytest.raises(tinker.TinkerError, match="nobody/nothing"):
            service.create_sampling_client(base_model="nobody/nothing").result()
        assert train(trainer_of(service), [next_token([1, 2, 3])])[0] > 0


def test_a_session_can_be_closed_with_a_reason(fake_server: Server) -> None:
    service = service_client(fake_server)
    trainer_of(service)
    started = time.monotonic()
    service.close("errored", detail="on purpose").result()
    assert time.monotonic() - started < 60
    with pytest.raises(RuntimeError, match="closed"):
        trainer_of(service)
