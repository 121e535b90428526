"""Order, repetition, gaps and polling, on the raw wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.raw import Raw, request
from tests.servers import FAKE_MODEL, Server, running_server


@pytest.fixture(scope="module")
def hasty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Gives up on gaps and polls after a moment."""
    config = {"server": {"long_poll_s": 0.2}, "scheduler": {"gap_timeout_s": 0.5}}
    with running_server(tmp_path_factory.mktemp("hasty"), config) as server:
        yield server


# --------------------------------------------------------------------------- repetition


def test_a_repeated_operation_gets_the_same_promise_and_counts_once(raw: Raw) -> None:
    model, other = raw.new_model(), raw.new_model()
    ids = {raw.forward_backward(request(model, 1)) for _ in range(3)}
    assert len(ids) == 1
    steps = {raw.optim_step(model, 2, learning_rate=1e-2) for _ in range(3)}
    assert len(steps) == 1
    raw.forward_backward(request(other, 1))
    once = raw.optim_step(other, 2, learning_rate=1e-2)
    assert raw.retrieve(steps.pop()).json() == raw.retrieve(once).json()
    after = [
        raw.output(raw.forward_backward(request(m, 3, forward_only=True))).metrics["loss:sum"]
        for m in (model, other)
    ]
    assert after[0] == after[1]


def test_a_repetition_with_another_body_changes_nothing(raw: Raw) -> None:
    model = raw.new_model()
    first = raw.forward_backward(request(model, 1))
    result = raw.retrieve(first).content
    assert raw.forward_backward(request(model, 1, tokens=(5, 6, 7))) == first
    assert raw.retrieve(first).content == result


def test_a_result_can_be_fetched_again_and_is_the_same_bytes(raw: Raw) -> None:
    promise = raw.forward_backward(request(raw.new_model(), 1))
    results = {raw.retrieve(promise).content for _ in range(3)}
    assert len(results) == 1


def test_a_repeated_creation_makes_one_model(raw: Raw) -> None:
    session = raw.new_session()
    promises = {raw.create_model(session).json()["request_id"] for _ in range(3)}
    assert len(promises) == 1
    model = raw.retrieve(promises.pop()).json()["model_id"]
    assert model == f"{session}:train:0"
    second = raw.create_model(session, 1).json()["request_id"]
    assert raw.retrieve(second).json()["model_id"] == f"{session}:train:1"


def test_a_repeated_sampling_session_is_one(raw: Raw) -> None:
    body = {
        "session_id": raw.new_session(),
        "sampling_session_seq_id": 0,
        "base_model": FAKE_MODEL,
    }
    ids = {raw.post("/create_sampling_session", body).json()["sampling_session_id"] for _ in "abc"}
    assert len(ids) == 1


def test_a_repeated_sample_is_one(raw: Raw) -> None:
    session = {
        "session_id": raw.new_session(),
        "sampling_session_seq_id": 0,
        "base_model": FAKE_MODEL,
    }
    sampler = raw.post("/create_sampling_session", session).json()["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": 5,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 8},
    }
    answers = [raw.post("/asample", body).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0]["sample_sequence_ids"])) == 2
    assert len({raw.retrieve(answer["request_id"]).content for answer in answers}) == 1


def test_a_repeated_unnamed_save_may_carry_a_new_number(raw: Raw) -> None:
    """As the SDK does when it sends one again."""
    model = raw.new_model()
    body = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0, "kind": "snapshot"}
    first = raw.post("/save_weights_for_sampler", body).json()["request_id"]
    again = raw.post("/save_weights_for_sampler", body | {"sampling_session_seq_id": 1}).json()[
        "request_id"
    ]
    assert first == again
    assert raw.retrieve(first).json()["sampling_session_id"]


# --------------------------------------------------------------------------- order


def test_operations_run_by_number_whatever_order_they_come_in(raw: Raw) -> None:
    straight, shuffled = raw.new_model(), raw.new_model()
    texts = {1: (1, 2, 3, 4), 2: (4, 4, 9), 4: (1, 2, 3, 4), 5: (7, 7, 7)}

    def send(model: str, seq: int) -> str:
        if seq in texts:
            return raw.forward_backward(request(model, seq, tokens=texts[seq]))
        return raw.optim_step(model, seq, learning_rate=1e-2)

    in_order = {seq: send(straight, seq) for seq in (1, 2, 3, 4, 5, 6)}
    out_of_order = {seq: send(shuffled, seq) for seq in (2, 3, 6, 5, 4, 1)}
    for seq in texts:
        assert raw.output(in_order[seq]) == raw.output(out_of_order[seq])
    for seq in (3, 6):
        assert raw.retrieve(in_order[seq]).json() == raw.retrieve(out_of_order[seq]).json()


def test_a_gap_is_waited_for_then_given_up_and_the_model_lives(hasty_server: Server) -> None:
    with Raw(hasty_server) as raw:
        model = raw.new_model()
        raw.output(raw.forward_backward(request(model, 1)))
        late = raw.forward_backward(request(model, 3))
        step = raw.optim_step(model, 4)
        raw.output(late)
        reason = raw.failure(step)
        assert "operation 2 never arrived" in reason
        lost = raw.forward_backward(request(model, 2))
        assert "2" in raw.failure(lost)
        assert raw.output(raw.forward_backward(request(model, 5))).metrics["loss:sum"] > 0
        assert "metrics" in raw.retrieve(raw.optim_step(model, 6)).json()


def test_a_gap_of_one_model_does_not_hold_up_another(raw: Raw) -> None:
    waiting, other = raw.new_model(), raw.new_model()
    stuck = raw.forward_backward(request(waiting, 2))
    assert raw.output(raw.forward_backward(request(other, 1))).metrics["loss:sum"] > 0
    filler = raw.forward_backward(request(waiting, 1))
    assert raw.output(filler) == raw.output(stuck)


@pytest.mark.parametrize("seq_id", [0, -1, -(2**31)])
def test_a_number_below_one_is_refused(raw: Raw, seq_id: int) -> None:
    model = raw.new_model()
    answer = raw.post_bytes("/forward_backward", request(model, seq_id).SerializeToString())
    assert answer.status_code == 400
    assert "seq_id" in answer.json()["detail"]
    assert raw.output(raw.forward_backward(request(model, 1))).metrics["loss:sum"] > 0


# --------------------------------------------------------------------------- polling


def test_a_pending_result_is_told_with_408(hasty_server: Server) -> None:
    with Raw(hasty_server) as raw:
        model = raw.new_model()
        promise = raw.forward_backward(request(model, 2))
        answer = raw.retrieve_once(promise)
        assert answer.status_code == 408
        assert answer.json()["type"] == "try_again"
        assert answer.json()["request_id"] == promise
        assert answer.json()["queue_state"] == "active"
        raw.forward_backward(request(model, 1))
        raw.output(promise)


def test_a_long_poll_ends_with_the_result_not_with_its_time(raw: Raw, fake_server: Server) -> None:
    """The poll may last 5 s (the fixture's setting); the result comes while it is open."""
    model = raw.new_model()
    promise = raw.forward_backward(request(model, 2))
    answers = []

    def poll() -> None:
        with Raw(fake_server) as other:
            answers.append(other.retrieve_once(promise))

    poller = threading.Thread(target=poll)
    poller.start()
    time.sleep(0.5)
    raw.forward_backward(request(model, 1))
    poller.join()
    assert answers[0].status_code == 200, "the poll ran into its time limit"


def test_failures_and_pending_are_json_whatever_was_accepted(raw: Raw) -> None:
    model = raw.new_model()
    promise = raw.forward_backward(request(model, 1, loss_fn="nonsense"))
    answer = raw.http.post(
        "/retrieve_future",
        json={"request_id": promise},
        headers={"Accept": "application/x-protobuf"},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/json")
    assert "nonsense" in answer.json()["error"]


def test_an_unknown_request_is_404(raw: Raw) -> None:
    answer = raw.retrieve_once("req-never-given-out")
    assert answer.status_code == 404
    assert "req-never-given-out" in answer.json()["detail"]


def test_a_success_never_has_the_key_error(raw: Raw) -> None:
    """The SDK takes any answer with that key, even null, for a failure."""
    model = raw.new_model()
    raw.forward_backward(request(model, 1))
    step = raw.optim_step(model, 2)
    save = raw.post("/save_weights", {"model_id": model, "path": "s", "seq_id": 3})
    for promise in (step, save.json()["request_id"]):
        assert "error" not in raw.retrieve(promise).json()


def test_many_polls_at_once_wake_together(fake_server: Server, raw: Raw) -> None:
    model = raw.new_model()
    promise = raw.forward_backward(request(model, 2))
    contents: list[bytes] = []

    def poll() -> None:
        with Raw(fake_server) as other:
            contents.append(other.retrieve(promise).content)

    pollers = [threading.Thread(target=poll) for _ in range(30)]
    for poller in pollers:
        poller.start()
    raw.forward_backward(request(model, 1))
    for poller in pollers:
        poller.join()
    assert len(contents) == 30
    assert len(set(contents)) == 1


def test_fields_of_a_newer_sdk_are_ignored(raw: Raw) -> None:
    model = raw.new_model()
    message = request(model, 1)
    unknown_field = b"\xfa\x3e\x03abc"  # field 1007, length-delimited
    answer = raw.post_bytes("/forward_backward", message.SerializeToString() + unknown_field)
    assert answer.status_code == 200
    raw.output(answer.json()["request_id"])
    body = {
        "model_id": model,
        "seq_id": 2,
        "adam_params": {"learning_rate": 1e-3, "novelty": 1},
        "future": {"x": [1]},
    }
    step = raw.post("/optim_step", body)
    assert step.status_code == 200
    assert "metrics" in raw.retrieve(step.json()["request_id"]).json()


def test_healthz_says_ok(raw: Raw) -> None:
    assert raw.http.get("/healthz").json()["status"] == "ok"
