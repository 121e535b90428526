"""Room for everybody: what an owner may hold, what is left for others, and that all of it comes
back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.services.test_server import (
    ME,
    MODEL,
    Client,
    config,
    dumped,
    running,
    sample_request,
    train_body,
)
from training.config import AuthConfig, EngineConfig, QuotaConfig, SchedulerConfig, TrainingConfig
from training.core.errors import Busy, OverQuota
from training.core.ids import TinkerPath
from training.core.records import FutureKind, FutureResult, FutureStatus
from training.services.quotas import (
    ARRIVAL_FREE_BYTES,
    CREATION_RETRY_S,
    RETRY_S,
    Arrival,
    Quotas,
    Room,
)
from training.services.server import Server
from training.wire.requests import (
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    LoraConfigJson,
    SaveWeightsForSamplerRequest,
)

ALL = 60


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5)), max_size=200),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_whoever_comes_last_finds_room(wishes: Sequence[tuple[str, int]], each: int | None) -> None:
    """However the others pressed, somebody new gets one in, and all together never hold more than
    there is."""
    room = Room("things", each, ALL, is_shared=True)
    held = dict.fromkeys("abcd", 0)
    for owner, amount in wishes:
        if room.why_not(owner, amount) is None:
            room.take(owner, amount)
            held[owner] += amount
        room.check_integrity()
        assert sum(held.values()) <= ALL
        for number in range(3):
            assert room.why_not(f"new{number}", 1) is None
    if each is not None:
        assert max(held.values()) <= max(each, 5)
    for owner, amount in held.items():
        room.give_back(owner, amount)
    room.check_integrity()
    assert room.why_not("a", ALL) is None


def test_one_owner_fills_half_of_a_shared_room_and_all_of_its_own() -> None:
    for is_shared, fits in ((True, ALL // 2), (False, ALL)):
        room = Room("things", None, ALL, is_shared)
        while room.why_not("greedy", 1) is None:
            room.take("greedy", 1)
        assert room.why_not("greedy", 1) is not None
        room.give_back("greedy", fits)
        room.check_integrity()
        assert room.why_not("other", ALL) is None


def test_a_large_request_of_somebody_who_holds_nothing_is_let_in() -> None:
    room = Room("bytes", 10, ALL, is_shared=True)
    assert room.why_not("a", 50) is None
    room.take("a", 50)
    assert room.why_not("a", 1) is not None
    assert room.why_not("b", 20) is not None
    assert room.why_not("b", 10) is None


def test_a_body_holds_room_from_its_announcement_to_its_answer() -> None:
    room = Room("bytes", 50_000, 100_000, is_shared=True)
    with Arrival(room, "a") as first:
        first.hold(40_000)
        with Arrival(room, "a") as second:
            with pytest.raises(Busy, match="40000 bytes of this key") as busy:
                second.hold(20_000)
            assert busy.value.retry_after_s == RETRY_S
            second.hold(ARRIVAL_FREE_BYTES)  # what is small always passes, and is not counted
        assert room.why_not("b", 60_000) is None
        first.hold(90_000)  # unpacked: alone it may be more than its part
        assert room.why_not("b", 10_001) is not None
        first.hold(1000)
        assert room.why_not("b", 100_000) is None
        first.hold(30_000)
    broken = Arrival(room, "a")
    broken.hold(30_000)
    with pytest.raises(KeyError), broken:
        raise KeyError
    room.check_integrity()
    assert room.why_not("b", 100_000) is None


def test_a_creation_is_told_to_wait_for_longer() -> None:
    quota = QuotaConfig(max_pending_operations=1)
    quotas = Quotas(quota, SchedulerConfig(), is_shared=False)
    quotas.take(ME, FutureKind.OPTIM_STEP, 10)
    for kind, retry_s in (
        (FutureKind.FORWARD_BACKWARD, RETRY_S),
        (FutureKind.CREATE_MODEL, CREATION_RETRY_S),
    ):
        with pytest.raises(Busy, match="1 operations of this key are waiting, and 1 may") as busy:
            quotas.check(ME, kind, 10)
        assert busy.value.retry_after_s == retry_s
    quotas.check(ME, FutureKind.SAMPLE, 10)
    quotas.give_back(ME, FutureKind.OPTIM_STEP, 10)
    quotas.check(ME, FutureKind.FORWARD_BACKWARD, 10)
    quotas.check_integrity()


def limited(tmp_path: Path, *keys: str, **limits: int) -> TrainingConfig:
    plain = config(tmp_path)
    auth = AuthConfig.model_validate({"api_keys": keys or ("one",)})
    return plain.model_copy(update={"quota": QuotaConfig(**limits), "auth": auth})


async def stopped(server: Server) -> None:
    """Nothing runs any more: what is accepted from here on waits."""
    await server.hosts.get(MODEL).tasks.close()


async def test_operations_over_the_quota_are_sent_away_but_never_the_awaited_one(
    tmp_path: Path,
) -> None:
    async with running(limited(tmp_path, max_pending_operations=3)) as server:
        first, second = [await Client.connect(server) for _ in range(2)]
        await first.create()
        await second.create()
        await stopped(server)
        for seq in (2, 3, 4):
            await server.training.forward_backward(ME, train_body(first.model_id, seq))
        for client, seq in ((first, 5), (second, 2)):
            with pytest.raises(Busy):
                await server.training.forward_backward(ME, train_body(client.model_id, seq))
        with pytest.raises(Busy):  # nothing waits for this one
            await server.training.forward_backward(ME, train_body(second.model_id, 1))
        await server.training.forward_backward(ME, train_body(first.model_id, 1))
        assert server.promises.num_pending() == 4


async def test_operations_that_others_wait_for_are_bounded_and_get_in_one_after_another(
    tmp_path: Path,
) -> None:
    size, num = len(train_body("x" * 60, 2)), 8
    scheduler = SchedulerConfig(max_pending_bytes=num * size)
    engine = EngineConfig(max_slots=num)
    settings = limited(tmp_path).model_copy(update={"scheduler": scheduler, "engine": engine})
    async with running(settings) as server:
        clients = [await Client.connect(server) for _ in range(num)]
        for client in clients:
            await client.create()
        for client in clients:
            await server.training.forward_backward(ME, train_body(client.model_id, 2))
        held, num_busy = server.quotas._bytes, 0
        assert held._total > (num - 1) * size

        async def send_first(client: Client) -> str:
            nonlocal num_busy
            body = train_body(client.model_id, 1, "no such loss" + " " * 4 * size)
            while True:
                try:
                    request_id, _ = await server.training.forward_backward(ME, body)
                except Busy:
                    num_busy += 1
                    await asyncio.sleep(0.01)
                    continue
                assert held._total <= 2 * num * size
                return request_id

        for request_id in await asyncio.gather(*map(send_first, clients)):
            await clients[0].result(request_id)
        assert num_busy > 0
        server.quotas.check_integrity()


async def test_refused_creations_are_counted_too(tmp_path: Path) -> None:
    async with running(limited(tmp_path, max_pending_operations=1)) as server:
        client = await Client.connect(server)
        await client.create()
        await stopped(server)
        await server.training.forward_backward(ME, train_body(client.model_id, 1))
        request = CreateModelRequest(
            session_id=client.session_id,
            model_seq_id=1,
            base_model="no/model",
            lora_config=LoraConfigJson(),
        )
        with pytest.raises(Busy):
            await server.models.create(ME, request, b"{}")


async def test_bytes_that_wait_are_counted_until_they_are_done(tmp_path: Path) -> None:
    body = train_body("x" * 60, 1)
    async with running(limited(tmp_path, max_pending_bytes=3 * len(body))) as server:
        client = await Client.connect(server)
        await client.create()
        tasks = [
            server.training.forward_backward(ME, train_body(client.model_id, seq)) for seq in (2, 3)
        ]
        accepted = await asyncio.gather(*tasks)
        with pytest.raises(Busy, match="bytes"):
            await server.training.forward_backward(ME, train_body(client.model_id, 4, "x" * 200))
        assert (await client.train()).status is FutureStatus.DONE
        client.seq = 3
        for request_id, _ in accepted:
            await client.result(request_id)
        server.quotas.check_integrity()
        assert (await client.train()).status is FutureStatus.DONE


async def test_samples_over_the_quota_are_sent_away(tmp_path: Path) -> None:
    async with running(limited(tmp_path, max_pending_samples=2)) as server:
        client = await Client.connect(server)
        wanted = CreateSamplingSessionRequest(
            session_id=client.session_id, sampling_session_seq_id=0, base_model=MODEL
        )
        sampler = (await server.sampling.create_session(ME, wanted)).sampling_session_id
        asked = [
            server.sampling.sample(ME, sample_request(sampler, seq, 3000), b"{}")
            for seq in range(5)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, Busy) for answer in answers) == 3
        for answer in answers:
            if not isinstance(answer, BaseException):
                await client.result(answer[0])
        assert (await client.sample(sampler, 2)).status is FutureStatus.DONE


async def test_one_model_too_many_fails_for_its_owner_and_not_for_another(tmp_path: Path) -> None:
    async with running(limited(tmp_path, "one", "two")) as server:
        client = await Client.connect(server)  # of four slots
        for number in range(2):
            assert (await client.create(number)).status is FutureStatus.DONE
        refused = await client.create(2)
        assert refused.status is FutureStatus.FAILED
        assert refused.category == "user"
        assert "kept for other keys" in refused.error
        assert server.hosts.get(MODEL).slots.available == 2


async def test_a_key_has_as_many_models_as_it_may(tmp_path: Path) -> None:
    async with running(limited(tmp_path, max_models=1)) as server:
        client = await Client.connect(server)
        assert (await client.create()).status is FutureStatus.DONE
        assert "its limit is 1" in (await client.create(1)).error
        await server.sessions.finish(ME, client.session_id, "success", None)
        client = await Client.connect(server)
        assert (await client.create()).status is FutureStatus.DONE


async def test_sessions_are_counted_over_a_restart(tmp_path: Path) -> None:
    settings = limited(tmp_path, max_sessions=2)
    async with running(settings) as server:
        first, _ = [await Client.connect(server) for _ in range(2)]
        with pytest.raises(OverQuota, match="2 sessions, its limit is 2"):
            await Client.connect(server)
        await server.sessions.create("you", CreateSessionRequest())
    async with running(settings) as server:
        with pytest.raises(OverQuota):
            await Client.connect(server)
        for _ in range(2):  # the second changes nothing
            await server.sessions.finish(ME, first.session_id, "success", None)
        await Client.connect(server)
        with pytest.raises(OverQuota):
            await Client.connect(server)


async def test_a_full_store_of_checkpoints_takes_no_more_until_one_is_deleted(
    tmp_path: Path,
) -> None:
    async with running(limited(tmp_path, max_checkpoint_bytes=1)) as server:
        client = await Client.connect(server)
        await client.create()
        saved = await client.save("one")
        refused = await client.save("two")
        assert refused.status is FutureStatus.FAILED
        assert refused.category == "user"
        assert "delete some or finish a session" in refused.error
        path = orjson.loads(saved.body)["path"]
        checkpoint = await server.checkpoints.readable(ME, TinkerPath.parse(path))
        await server.checkpoints.delete(ME, checkpoint.path)
        assert (await client.save("two")).status is FutureStatus.DONE


async def test_weights_without_a_name_are_counted_while_samplers_use_them(tmp_path: Path) -> None:
    settings = limited(tmp_path, max_checkpoint_bytes=1)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        sampler = await client.save_for_sampler(0, "inflight")
        for refused in (await client.save("a"), await unnamed(client, 1), await unnamed(client, 2)):
            assert refused.status is FutureStatus.FAILED
            assert "delete some or finish a session" in refused.error
        assert len(server.files.names()) == 1
    async with running(settings) as server:
        client.server = server
        assert (await unnamed(client, 3)).status is FutureStatus.FAILED
        assert (await client.sample(sampler)).status is FutureStatus.DONE
        server.weights.check_integrity()
        await server.sessions.finish(ME, client.session_id, "success", None)
        server.weights.check_integrity()
        client = await Client.connect(server)
        await client.create()
        assert (await client.save("a")).status is FutureStatus.DONE


async def unnamed(client: Client, number: int) -> FutureResult:
    client.seq += 1
    request = SaveWeightsForSamplerRequest(
        model_id=client.model_id,
        sampling_session_seq_id=number,
        kind="inflight",
        seq_id=client.seq,
    )
    checkpoints = client.server.checkpoints
    return await client.result(await checkpoints.save_for_sampler(ME, request, dumped(request)))


async def test_a_key_has_as_many_samplers_as_it_may_until_their_sessions_end(
    tmp_path: Path,
) -> None:
    settings = limited(tmp_path, max_samplers=3)

    async def make(client: Client, number: int) -> None:
        wanted = CreateSamplingSessionRequest(
            session_id=client.session_id, sampling_session_seq_id=number, base_model=MODEL
        )
        await client.server.sampling.create_session(ME, wanted)

    async with running(settings) as server:
        client, other = [await Client.connect(server) for _ in range(2)]
        await other.create()
        await unnamed(other, 0)
        for _ in range(2):  # repetitions are the same samplers
            asked = (make(client, number) for number in range(5))
            made = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(each) for each in made if each is not None] == [OverQuota] * 3
        assert "3 samplers, its limit is 3" in (await unnamed(other, 1)).error
    async with running(settings) as server:
        client.server = server
        with pytest.raises(OverQuota):
            await make(client, 9)
        await server.sessions.finish(ME, other.session_id, "success", None)
        await make(client, 9)
        with pytest.raises(OverQuota):
            await make(client, 10)
