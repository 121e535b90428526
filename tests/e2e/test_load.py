"""Many clients at once, whose every answer is known beforehand; and clients over their quotas."""

from __future__ import annotations

from pathlib import Path

from benchmarks.load import measure
from tests.e2e.clients import PROMPT, SEEDED, loss_of, next_token, service_client, train, trainer_of
from tests.servers import FAKE_MODEL, running_server

DATA = [next_token([1, 9, 30, 4, 11])]


def test_sixty_clients_get_every_answer_right_and_once(tmp_path: Path) -> None:
    report = measure(tmp_path, clients=60, seconds=1.0, ramp_s=2.0, delay_s=0.02, steps=4)
    assert report.problems() == []
    counts = report.counts
    assert counts["steps"] == 60 * 4
    assert counts["samples"] >= 60
    assert min(counts["sent_twice"], counts["asked_twice"]) > 0
    assert counts["answered"] == counts["accepted"] == sum(report.stored.values())
    assert all(values["num"] > 0 for values in report.probes_ms.values())


def test_a_load_over_every_quota_waits_and_loses_nothing(tmp_path: Path) -> None:
    quota = {"max_pending_operations": 2, "max_pending_samples": 1, "max_pending_bytes": 1500}
    settings = {"quota": quota}
    report = measure(
        tmp_path, clients=24, seconds=1.0, ramp_s=1.0, delay_s=0.02, steps=2, more=settings
    )
    assert report.problems() == []
    assert report.counts["steps"] == 24 * 2
    assert report.counts["busy"] > 0
    assert set(report.counts["retry_after"]) <= {"1", "6"}


def test_the_sdk_comes_again_until_there_is_room(tmp_path: Path) -> None:
    """Two trainings and 20 samples at once, where one operation and two samples may wait."""
    quota = {"max_pending_operations": 1, "max_pending_samples": 2}
    model = {"name": FAKE_MODEL, "backend": "fake", "delay_s": 0.05}
    losses: list[list[float]] = []
    texts: list[list[int]] = []
    for limits in ({}, {"quota": quota}):
        directory = tmp_path / str(len(losses))
        directory.mkdir()
        config = {"supported_models": [model], **limits}
        with running_server(directory, config) as server, service_client(server) as service:
            first, second = trainer_of(service), trainer_of(service, seed=2)
            pending = [
                trainer.forward_backward(DATA * number, "cross_entropy")
                for trainer in (first, second)
                for number in range(1, 4)
            ]
            steps = train(first, DATA, 2) + train(second, DATA, 2)
            losses.append([loss_of(each.result()) for each in pending] + steps)
            sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
            asked = [SEEDED.model_copy(update={"seed": seed}) for seed in range(20)]
            waiting = [sampler.sample(PROMPT, 1, params) for params in asked]
            texts.append([token for each in waiting for token in each.result().sequences[0].tokens])
    assert losses[0] == losses[1]
    assert texts[0] == texts[1]
