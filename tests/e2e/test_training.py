"""Models, chunks, pipelines, the optimizer, and checkpoints of training state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.clients import (
    CLOSE,
    RATE,
    logprobs_of,
    loss_of,
    next_token,
    rest_client,
    service_client,
    train,
    trainer_of,
)
from tests.servers import FAKE_MODEL, Server, running_server

DATA = [next_token([1, 9, 30, 4, 11]), next_token([1, 8, 8, 2])]


@pytest.fixture(scope="module")
def service(any_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(any_server) as client:
        yield client


# --------------------------------------------------------------------------- models


def test_get_info_tells_what_was_asked_for(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(
        service, rank=7, train_mlp=False, train_unembed=False, user_metadata={"run": "a"}
    )
    info = trainer.get_info()
    assert info.model_id == trainer.model_id
    assert info.lora_rank == 7
    assert info.is_lora
    assert info.model_data.model_name == FAKE_MODEL
    assert info.optimizer_config == types.AdamOptimizerConfig()


def test_models_of_a_session_are_numbered(any_server: Server) -> None:
    with service_client(any_server) as service:
        ids = [trainer_of(service).model_id for _ in range(3)]
    session_id = ids[0].split(":")[0]
    assert ids == [f"{session_id}:train:{index}" for index in range(3)]


def test_the_seed_decides_the_adapter(service: tinker.ServiceClient) -> None:
    def losses(seed: int) -> list[float]:
        return train(trainer_of(service, seed=seed), DATA, 3)

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_layer_groups_are_honoured(service: tinker.ServiceClient) -> None:
    flags: tuple[dict[str, Any], ...] = (
        {"train_mlp": False},
        {"train_attn": False, "train_unembed": False},
        {},
    )
    trainers = [trainer_of(service, **flag) for flag in flags]
    losses = [train(trainer, DATA, 3)[2] for trainer in trainers]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("rank", [0, -1, 100_000])
def test_an_impossible_rank_is_refused(service: tinker.ServiceClient, rank: int) -> None:
    with pytest.raises(tinker.TinkerError, match=rf"rank.*{rank}"):
        trainer_of(service, rank=rank)


def test_another_optimizer_is_refused_by_name(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.TinkerError, match="dimuon"):
        trainer_of(service, optimizer=types.DimuonOptimizerConfig())
    trainer = trainer_of(service)
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        trainer.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    train(trainer, DATA)


# --------------------------------------------------------------------------- order


def test_pipelined_calls_equal_patient_ones(service: tinker.ServiceClient) -> None:
    patient = train(trainer_of(service), DATA, 5)
    trainer = trainer_of(service)
    waiting = []
    for _ in range(5):
        waiting.append(trainer.forward_backward(DATA, "cross_entropy"))
        trainer.optim_step(RATE)
    assert [loss_of(future.result()) for future in waiting] == patient


def test_gradients_add_up_until_a_step(service: tinker.ServiceClient) -> None:
    together, apart = trainer_of(service), trainer_of(service)
    together.forward_backward(DATA, "cross_entropy")
    for item in DATA:
        apart.forward_backward([item], "cross_entropy")
    norms = [
        trainer.optim_step(RATE).result().metrics["grad_norm"]  # type: ignore[index]
        for trainer in (together, apart)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=CLOSE)
    after = [
        loss_of(trainer.forward(DATA, "cross_entropy").result()) for trainer in (together, apart)
    ]
    assert after[0] == pytest.approx(after[1], rel=CLOSE)


@pytest.mark.parametrize("parallel", [True, False])
def test_chunks_in_any_order_equal_one_request(tmp_path: Path, parallel: bool) -> None:
    """The SDK sends the first chunk last; the server sorts them by their numbers."""
    data = [next_token([1, 3 + i, 40 - i, 5, i + 7][: 3 + i % 3]) for i in range(23)]
    outputs = {}
    for size in (4, 1000):
        directory = tmp_path / str(size)
        directory.mkdir()
        flags = {"fwdbwd_max_chunk_len": size, "parallel_fwdbwd_chunks": parallel}
        with (
            running_server(directory, {"client": flags}) as server,
            service_client(server) as service,
        ):
            trainer = trainer_of(service)
            first = trainer.forward_backward(data, "cross_entropy")
            trainer.optim_step(RATE)
            outputs[size] = (first.result(), trainer.forward(data, "cross_entropy").result())
    for chunked, whole in zip(outputs[4], outputs[1000], strict=True):
        assert loss_of(chunked) == pytest.approx(loss_of(whole), rel=CLOSE)
        for one, other in zip(logprobs_of(chunked), logprobs_of(whole), strict=True):
            np.testing.assert_allclose(one, other, atol=CLOSE)


def test_compressed_requests_are_read(tmp_path: Path) -> None:
    with (
        running_server(tmp_path, {"client": {"proto_compress_fwdbwd": True}}) as server,
        service_client(server) as service,
    ):
        assert train(trainer_of(service), DATA, 2)[0] > 0


def test_async_calls(any_server: Server) -> None:
    async def run() -> list[float]:
        service = service_client(any_server)
        trainer = await service.create_lora_training_client(FAKE_MODEL, rank=4, seed=1)
        losses = []
        for _ in range(3):
            loss, step = trainer.forward_backward(DATA, "cross_entropy"), trainer.optim_step(RATE)
            losses.append(loss_of(await loss))
            await step
        sampler = await trainer.save_weights_and_get_sampling_client()
        reply = await sampler.sample(
            types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=3)
        )
        assert len(reply.sequences[0].tokens) <= 3
        await service.close("success")
        return losses

    with service_client(any_server) as service:
        assert asyncio.run(run()) == train(trainer_of(service), DATA, 3)


# --------------------------------------------------------------------------- the optimizer


def test_every_field_of_a_step_counts(service: tinker.ServiceClient) -> None:
    base = {"learning_rate": 1e-2, "weight_decay": 0.1}
    variants: tuple[dict[str, float], ...] = (
        {},
        {"learning_rate": 2e-2},
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"eps": 10.0},
        {"weight_decay": 0.5},
        {"grad_clip_norm": 0.01, "eps": 1e-2},
    )
    losses = set()
    for variant in variants:
        trainer = trainer_of(service)
        for data in (DATA, [next_token([4, 5, 6])]):
            trainer.forward_backward(data, "cross_entropy")
            trainer.optim_step(types.AdamParams(**(base | variant)))
        losses.add(loss_of(trainer.forward(DATA, "cross_entropy").result()))
    assert len(losses) == len(variants)


def test_clipping_bounds_the_step_and_the_norm_is_told_before_it(
    service: tinker.ServiceClient,
) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        trainer = trainer_of(service)
        trainer.forward_backward(DATA, "cross_entropy")
        params = types.AdamParams(learning_rate=1e-2, grad_clip_norm=clip)
        metrics = trainer.optim_step(params).result().metrics
        assert metrics is not None
        norms.append(metrics["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


def test_a_rate_of_zero_changes_nothing(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    before = loss_of(trainer.forward_backward(DATA, "cross_entropy").result())
    trainer.optim_step(types.AdamParams(learning_rate=0.0))
    assert loss_of(trainer.forward(DATA, "cross_entropy").result()) == before


@pytest.mark.parametrize("field", ["learning_rate", "beta1", "beta2", "eps", "weight_decay"])
def test_a_negative_setting_is_refused_by_name(service: tinker.ServiceClient, field: str) -> None:
    trainer = trainer_of(service)
    trainer.forward_backward(DATA, "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match=rf"{field}.*-1"):
        trainer.optim_step(types.AdamParams(**{field: -1.0})).result()
    train(trainer, DATA)


# --------------------------------------------------------------------------- checkpoints


def test_resuming_with_the_optimizer_repeats_the_run_exactly(
    service: tinker.ServiceClient,
) -> None:
    trainer = trainer_of(service)
    train(trainer, DATA, 3)
    path = trainer.save_state("exact").result().path
    assert path == f"tinker://{trainer.model_id}/weights/exact"
    uninterrupted = train(trainer, DATA, 3)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.model_id != trainer.model_id
    assert resumed.get_info().lora_rank == 4
    assert train(resumed, DATA, 3) == uninterrupted


def test_resuming_without_the_optimizer_starts_it_afresh(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    train(trainer, DATA, 3)
    path = trainer.save_state("weights-only").result().path
    uninterrupted = train(trainer, DATA, 3)
    resumed = service.create_training_client_from_state(path).result()
    losses = train(resumed, DATA, 3)
    assert losses[0] == uninterrupted[0], "the same weights"
    assert losses[1:] != uninterrupted[1:], "but other moments"


def test_a_checkpoint_outlives_its_session(any_server: Server) -> None:
    with service_client(any_server) as first:
        trainer = trainer_of(first)
        train(trainer, DATA, 3)
        path = trainer.save_state("outlives").result().path
        expected = train(trainer, DATA, 2)
    with service_client(any_server) as second:
        resumed = second.create_training_client_from_state_with_optimizer(path).result()
        assert train(resumed, DATA, 2) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_loading_into_a_model_replaces_its_weights(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    train(trainer, DATA, 2)
    path = trainer.save_state("point").result().path
    expected = train(trainer, DATA, 2)
    train(trainer, DATA, 4)
    trainer.load_state_with_optimizer(path).result()
    assert train(trainer, DATA, 2) == expected
    trainer.load_state(path).result()
    weights_only = train(trainer, DATA, 2)
    assert weights_only[0] == expected[0]
    assert weights_only[1] != expected[1]


def test_a_name_is_taken_once_unless_overwritten(service: tinker.ServiceClient) -> None:
    trainer = trainer_of(service)
    trainer.save_state("taken").result()
    with pytest.raises(tinker.RequestFailedError, match="taken"):
        trainer.save_state("taken").result()
    train(trainer, DATA, 2)
    path = trainer.save_state("taken", overwrite=True).result().path
    expected = train(trainer, DATA, 2)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert train(resumed, DATA, 2) == expected


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 300, "a b"])
def test_a_name_that_is_no_path_segment_is_refused(
    service: tinker.ServiceClient, name: str
) -> None:
    trainer = trainer_of(service)
    with pytest.raises(tinker.TinkerError, match="name"):
        trainer.save_state(name).result()
    train(trainer, DATA)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tinker://{model}/weights/none", "none"),
        ("tinker://nobody:train:0/weights/x", "nobody"),
        ("/etc/passwd", "not a checkpoint path"),
        ("tinker://a/b/c/d", "not a checkpoint path"),
    ],
)
def test_loading_what_is_not_there_says_so(
    service: tinker.ServiceClient, path: str, message: str
) -> None:
    trainer = trainer_of(service)
    with pytest.raises(tinker.TinkerError, match=message):
        service.create_training_client_from_state(path.format(model=trainer.model_id)).result()
    train(trainer, DATA)


def test_sampler_weights_are_not_a_training_state(service: tinker.ServiceClient) -> None:
    path = trainer_of(service).save_weights_for_sampler("half").result().path
    with pytest.raises(tinker.TinkerError, match="sampler"):
        service.create_training_client_from_state(path).result()


# --------------------------------------------------------------------------- listings


def test_runs_and_checkpoints_are_listed(any_server: Server) -> None:
    rest = rest_client(any_server)
    with service_client(any_server) as service:
        trainer = trainer_of(service, user_metadata={"purpose": "listing"})
        saved = trainer.save_state("l1", user_metadata={"step": "1"}).result().path
        sampler = trainer.save_weights_for_sampler("l1").result().path
        trainer.save_weights_and_get_sampling_client().result()

        run = rest.get_training_run(trainer.model_id).result()
        assert run.base_model == FAKE_MODEL
        assert run.lora_rank == 4
        assert run.user_metadata == {"purpose": "listing"}
        assert run.last_checkpoint is not None
        assert run.last_checkpoint.tinker_path == saved
        assert run.last_sampler_checkpoint is not None
        assert run.last_sampler_checkpoint.tinker_path == sampler
        listed = rest.list_checkpoints(trainer.model_id).result().checkpoints
        assert {item.tinker_path for item in listed} == {saved, sampler}, "no ephemeral ones"
        assert all(item.time.tzinfo is not None for item in listed)
        by_path = {item.tinker_path: item for item in listed}
        assert by_path[saved].user_metadata == {"step": "1"}
        assert (by_path[saved].size_bytes or 0) > 0
        mine = rest.list_user_checkpoints(limit=2).result()
        assert [item.tinker_path for item in mine.checkpoints] == [sampler, saved]
        assert mine.cursor is not None
        assert mine.cursor.total_count >= 2
        runs = rest.list_training_runs(limit=1).result()
        assert [item.training_run_id for item in runs.training_runs] == [trainer.model_id]

        rest.delete_checkpoint_from_tinker_path(saved).result()
        listed = rest.list_checkpoints(trainer.model_id).result().checkpoints
        assert [item.tinker_path for item in listed] == [sampler]
        with pytest.raises(tinker.TinkerError, match="l1"):
            service.create_training_client_from_state(saved).result()


def test_a_time_to_live_is_kept_and_changed(any_server: Server) -> None:
    rest = rest_client(any_server)
    with service_client(any_server) as service:
        trainer = trainer_of(service)
        path = trainer.save_state("ttl", ttl_seconds=7200).result().path
        (item,) = rest.list_checkpoints(trainer.model_id).result().checkpoints
        assert item.expires_at is not None
        assert abs((item.expires_at - item.time).total_seconds() - 7200) < 60
        rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
        (item,) = rest.list_checkpoints(trainer.model_id).result().checkpoints
        assert item.expires_at is None
        with pytest.raises(tinker.TinkerError, match="ttl_seconds"):
            trainer.save_state("short", ttl_seconds=10).result()


def test_weights_info(any_server: Server) -> None:
    with service_client(any_server) as service:
        trainer = trainer_of(service, rank=3, train_mlp=False)
        path = trainer.save_state("info").result().path
        info = rest_client(any_server).get_weights_info_by_tinker_path(path).result()
        assert info.base_model == FAKE_MODEL
        assert info.lora_rank == 3
        assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)
