"""One tenant with another's ids, on every route there is: as if the ids had never existed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from tests.e2e.raw import Raw, request
from tests.security.walk import ID_FIELDS, Route, Said, ghost, routes, said
from tests.servers import FAKE_MODEL, Server, running_server

MARK = "only-the-owner-may-read-this"


class Tenant(NamedTuple):
    raw: Raw
    ids: dict[str, str]


def tenant(raw: Raw) -> Tenant:
    """One thing of every kind: a session, a model, checkpoints, samplers, promises."""
    session = {"tags": [MARK], "user_metadata": {"mark": MARK}, "display_name": MARK}
    session_id = str(raw.post("/create_session", session).json()["session_id"])
    raw.retrieve(raw.create_model(session_id).json()["request_id"])
    model_id = f"{session_id}:train:0"
    promise = raw.forward_backward(request(model_id, 1))
    raw.output(promise)
    for seq, route in ((2, "save_weights"), (3, "save_weights_for_sampler")):
        body = {"model_id": model_id, "seq_id": seq, "path": "mine"}
        body |= {"user_metadata": {"mark": MARK}}
        saved = raw.retrieve(raw.post(f"/{route}", body).json()["request_id"])
    assert saved.json()["path"] == f"tinker://{model_id}/sampler_weights/mine"
    path = f"tinker://{model_id}/weights/mine"
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": FAKE_MODEL}
    sampler = str(raw.post("/create_sampling_session", body).json()["sampling_session_id"])
    paths = {name: path for name in ID_FIELDS if name.endswith("path")}
    ids = paths | {
        "session_id": session_id,
        "model_id": model_id,
        "run_id": model_id,
        "sampling_session_id": sampler,
        "request_id": promise,
    }
    assert set(ids) == set(ID_FIELDS)
    return Tenant(raw, ids)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Numbers are left out on purpose here, and waiting for them takes long otherwise."""
    config = {"scheduler": {"gap_timeout_s": 0.1}}
    with running_server(tmp_path_factory.mktemp("tenants"), config) as found:
        yield found


@pytest.fixture(scope="module")
def victim(server: Server) -> Iterator[Tenant]:
    with Raw(server) as raw:
        yield tenant(raw)


@pytest.fixture(scope="module")
def thief(server: Server) -> Iterator[Tenant]:
    with Raw(server, server.other_key) as raw:
        yield tenant(raw)


def view(someone: Tenant) -> dict[str, Any]:
    """All that an owner can see of what is hers."""
    raw, ids = someone
    session, model_id, sampler = ids["session_id"], ids["model_id"], ids["sampling_session_id"]
    promise = {"request_id": ids["request_id"]}
    urls = [
        *("/training_runs", f"/training_runs/{model_id}", f"/training_runs/{model_id}/checkpoints"),
        *("/checkpoints", f"/sessions/{session}", f"/samplers/{sampler}"),
    ]
    return {url: raw.http.get(url).json() for url in urls} | {
        "info": raw.post("/get_info", {"model_id": model_id}).json(),
        "info of weights": raw.post("/weights_info", {"tinker_path": ids["tinker_path"]}).json(),
        "result": raw.post("/retrieve_future", promise).content,
        "files": sorted(files(someone)),
    }


def files(someone: Tenant) -> dict[str, str]:
    path = f"/training_runs/{someone.ids['model_id']}/checkpoints/weights/mine/files"
    urls: dict[str, str] = someone.raw.http.get(path).json()["urls"]
    return urls


_seqs = itertools.count(100)


def attempt(raw: Raw, route: Route, ids: dict[str, str]) -> list[Said]:
    """What is said at once, and what the promise says where it gave one."""
    answer = raw.checked(raw.http.request(**route.request(ids, next(_seqs))))
    told = [said(answer, ids)]
    promised = answer.status_code == 200 and "json" in answer.headers["content-type"]
    request_id = answer.json().get("request_id") if promised else None
    if request_id is not None and request_id != ids["request_id"]:
        told[0] = Said(200, "a promise", told[0].headers)
        told.append(said(raw.retrieve(request_id), ids))
    return told


def combinations(route: Route) -> list[list[str]]:
    """Which fields to fill with another's ids: all of them, and each alone among one's own."""
    fields = route.id_fields()
    return [fields] + ([[field] for field in fields] if len(fields) > 1 else [])


def test_every_route_that_wants_a_key_refuses_to_go_without(server: Server, victim: Tenant) -> None:
    before = view(victim)
    walked = [route for route in routes(server.base_url) if route.wants_key]
    assert len(walked) > 25
    with httpx.Client(timeout=60.0) as stranger:
        for route in walked:
            for key in (None, "", "tml-", "tml-wrong", "slime-dev-key"):
                asked = route.request(victim.ids, next(_seqs))
                headers = asked.pop("headers", {}) | ({} if key is None else {"X-API-Key": key})
                answer = stranger.request(**asked, headers=headers)
                assert answer.status_code == 401, route
                assert MARK not in answer.text
    assert view(victim) == before


def test_somebody_elses_ids_are_ids_that_never_existed(
    server: Server, victim: Tenant, thief: Tenant
) -> None:
    before = view(victim)
    walked = [route for route in routes(server.base_url) if route.id_fields()]
    refused = 0
    for route in walked:
        for fields in combinations(route):
            taken = thief.ids | {field: victim.ids[field] for field in fields}
            invented = thief.ids | {field: ghost(victim.ids[field]) for field in fields}
            stolen = attempt(thief.raw, route, taken)
            nothing = attempt(thief.raw, route, invented)
            for one, other in zip(stolen, nothing, strict=True):
                assert one.without_new_ids() == other.without_new_ids(), (str(route), fields)
                unsent = [MARK, *(i for i in victim.ids.values() if i not in str(taken))]
                assert not any(secret in one.text for secret in unsent), (str(route), one.text)
            refused += stolen[-1].status in (400, 404) or '"error"' in stolen[-1].text
    assert len(walked) > 20
    assert refused > 20
    assert view(victim) == before


def test_lists_hold_ones_own_alone(server: Server, victim: Tenant, thief: Tenant) -> None:
    listed = 0
    for route in routes(server.base_url):
        if route.method != "GET" or not route.wants_key or route.id_fields():
            continue
        answer = thief.raw.checked(thief.raw.http.request(**route.request({}, 0)))
        assert answer.status_code == 200
        listed += 1
        for value in victim.ids.values():
            assert value not in answer.text, route
    assert listed >= 3


def test_the_victim_trains_on_as_if_nothing_had_been(victim: Tenant, server: Server) -> None:
    """Runs after the walks above: nothing of theirs is in her model or before her in line."""
    model_id = victim.ids["model_id"]
    untouched = victim.raw.new_model()
    for seq in (1, 2, 3):
        victim.raw.retrieve(victim.raw.forward_backward(request(untouched, seq)))
    for model, seq in ((model_id, 4), (untouched, 4)):
        victim.raw.retrieve(victim.raw.optim_step(model, seq, learning_rate=1e-2))
    # One forward_backward went into hers, three into the other: the sums differ by their number
    # alone, and Adam's first step does not depend on a gradient's size.
    losses = [
        victim.raw.output(victim.raw.forward_backward(request(model, 5))).metrics["loss:sum"]
        for model in (model_id, untouched)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
