"""Two keys on one server: what belongs to one is not there for the other."""

from __future__ import annotations

from typing import Any

from tinker import types

from tests.e2e.clients import loss_of, next_token, prompt, service_client, train, trainer_of
from tests.e2e.raw import Raw, request
from tests.servers import FAKE_MODEL, Server

GOOD = [next_token([1, 9, 30, 4, 11])]


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
