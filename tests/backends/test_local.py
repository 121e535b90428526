"""The engine process around its work: start, death, restart, end.

On uvloop, as the server runs it; the conformance suite runs on asyncio's own loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import ParamSpec

import numpy as np
import pytest
import uvloop

from tests.backends.conftest import local_config
from tests.backends.ending import end
from tests.backends.harness import datum, op, request, spec, unit
from tests.backends.steps import written
from tests.backends.test_conformance_saving import slow_disk
from tests.backends.tiny import CONTEXT_LENGTH, VOCAB_SIZE
from training.backends.base import AdamParams, BackendState, TrainUnit
from training.backends.child import child_environment
from training.backends.death import count_oom_kills
from training.backends.local import LocalBackend, restart_delay
from training.config import EngineConfig, ModelConfig, TrainingConfig
from training.core.errors import BackendDead, ConfigError, DeathCause, StorageError, UserError

PROMPT = (5, 6, 7)
Given = ParamSpec("Given")


def on_uvloop(test: Callable[Given, Coroutine[None, None, None]]) -> Callable[Given, None]:
    @functools.wraps(test)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        uvloop.run(test(*args, **kwargs))

    return run


def backend_of(path: Path, config: TrainingConfig | None = None) -> LocalBackend:
    return LocalBackend(ModelConfig(name="tests/tiny", path=path), config or local_config())


@contextlib.asynccontextmanager
async def running(path: Path, config: TrainingConfig | None = None) -> AsyncIterator[LocalBackend]:
    """A started backend, closed whatever happens."""
    backend = backend_of(path, config)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


def long_unit() -> TrainUnit:
    """Hundreds of micro-batches: whoever looks a moment after its start finds it running."""
    data = [datum(VOCAB_SIZE, CONTEXT_LENGTH, seed) for seed in range(60)]
    return unit(op(0, *data))


def kill_engine(backend: LocalBackend) -> int:
    pid = backend.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def is_running(pid: int) -> bool:
    """False also for a process that ended and waits to be reaped by somebody else."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def engines_of_this_process() -> set[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        int(child)
        for child in children
        if is_running(int(child))
        and b"training.engine" in Path(f"/proc/{child}/cmdline").read_bytes()
    }


# --------------------------------------------------------------------------- death


@on_uvloop
async def test_a_killed_engine_comes_back_without_slots_and_with_snapshots(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        for _ in range(2):
            await backend.forward_backward(unit(op(0, datum(VOCAB_SIZE, 20, 1))))
            await backend.optim_step({0: AdamParams(learning_rate=2e-2)})
        await written(backend.save_state(0, tmp_path / "state"))
        await backend.publish("kept", tmp_path / "state")
        await backend.publish("dropped", tmp_path / "state")
        await backend.retire("dropped")
        sample = request(PROMPT, snapshot_id="kept", seed=3)
        before = await backend.sample(sample)

        in_flight = [
            asyncio.create_task(backend.forward_backward(long_unit())),
            asyncio.create_task(backend.optim_step({0: AdamParams()})),
            *(
                asyncio.create_task(backend.sample(request(PROMPT, max_tokens=400, num_samples=8)))
                for _ in range(4)
            ),
        ]
        await asyncio.sleep(0.3)
        first_pid = kill_engine(backend)
        outcomes = await asyncio.gather(*in_flight, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BackendDead] * 6
        assert "signal 9" in str(outcomes[0])

        with pytest.raises(BackendDead, match="load it again"):
            await backend.forward(unit(op(0, datum(VOCAB_SIZE, 5, 0))))  # waits for the restart
        assert backend.health().alive
        assert backend.health().generation == 2
        assert backend.engine_pid != first_pid
        after = await backend.sample(sample)
        np.testing.assert_array_equal(after.sequences[0].tokens, before.sequences[0].tokens)
        np.testing.assert_array_equal(after.sequences[0].logprobs, before.sequences[0].logprobs)
        await backend.load_slot(0, spec(), tmp_path / "state")
        assert len(await backend.forward(unit(op(0, datum(VOCAB_SIZE, 5, 0))))) == 1


@on_uvloop
async def test_an_engine_is_restarted_however_often_it_dies(tiny_llama: Path) -> None:
    """Calls that were running fail, those that come meanwhile wait."""
    async with running(tiny_llama, local_config(max_restarts=0)) as backend:
        for num_deaths in range(1, 4):
            await backend.load_slot(0, spec())
            await backend.forward(unit(op(0, datum(VOCAB_SIZE, 5, 0))))
            long = asyncio.create_task(backend.forward_backward(long_unit()))
            await end(backend, bool, signal.SIGKILL)
            with pytest.raises(BackendDead) as death:
                await long
            known = count_oom_kills() is not None
            # The engine may not have begun it yet.
            at_work = DeathCause.KILLED if known else DeathCause.CRASHED
            assert death.value.cause in (at_work, DeathCause.BYSTANDER)
            assert await backend.sample(request(PROMPT))
            health = backend.health()
            assert (health.state, health.alive) == (BackendState.RUNNING, True)
            assert (health.generation, health.num_restarts) == (num_deaths + 1, num_deaths)


@on_uvloop
async def test_a_model_that_is_gone_is_waited_for(tiny_llama: Path, tmp_path: Path) -> None:
    """Health says that the engine is failing, and why; nothing has to be done but to bring it
    back."""
    model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(tiny_llama, model)
    async with running(model, local_config(max_restarts=2)) as backend:
        assert backend.health().state is BackendState.RUNNING
        weights.rename(tmp_path / "elsewhere")
        kill_engine(backend)
        with pytest.raises(BackendDead):
            await backend.sample(request(PROMPT))
        waiting = asyncio.create_task(backend.load_slot(0, spec()))
        await backend.retire("went with the engine")  # does not wait for another
        assert not waiting.done()
        seen = set()
        while (health := backend.health()).state is not BackendState.FAILING:
            assert not health.alive
            seen.add(health.state)
            await asyncio.sleep(0.02)
        assert seen <= {BackendState.RUNNING, BackendState.RESTARTING}
        assert health.generation == 1
        assert health.num_restarts >= 2
        assert "has no model.safetensors" in health.detail
        assert not waiting.done()
        (tmp_path / "elsewhere").rename(weights)
        await waiting
        assert backend.health().state is BackendState.RUNNING
        assert backend.health().since > health.since
        assert backend.health().generation == 2


@on_uvloop
async def test_only_finished_work_makes_the_next_restart_quick_again(tiny_llama: Path) -> None:
    async with running(tiny_llama, local_config(max_restarts=2)) as backend:
        states = []
        for _ in range(3):  # each loads and dies; the first engine was no restart
            await backend.load_slot(0, spec())
            states.append(await state_after_a_kill(backend))
        failing = BackendState.FAILING
        assert states == [BackendState.RESTARTING, BackendState.RESTARTING, failing]
        await backend.sample(request(PROMPT))
        assert await state_after_a_kill(backend) is BackendState.RESTARTING
        assert backend.health().num_restarts == 3


async def state_after_a_kill(backend: LocalBackend) -> BackendState:
    kill_engine(backend)
    while (state := backend.health().state) is BackendState.RUNNING:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return state


@on_uvloop
async def test_an_engine_that_is_killed_while_it_loads_is_started_again(tiny_llama: Path) -> None:
    before = engines_of_this_process()
    backend = backend_of(tiny_llama)
    starting = asyncio.create_task(backend.start())
    while engines_of_this_process() == before:  # noqa: ASYNC110  it is only seen from outside
        await asyncio.sleep(0.02)
    (loading,) = engines_of_this_process() - before
    os.kill(loading, signal.SIGKILL)
    await starting
    assert backend.health().alive
    await backend.close()


@on_uvloop
async def test_an_engine_that_dies_while_it_loads_says_how(tiny_llama: Path) -> None:
    before = engines_of_this_process()
    backend = backend_of(tiny_llama)
    starting = asyncio.create_task(backend.start())
    while engines_of_this_process() == before:  # noqa: ASYNC110  it is only seen from outside
        await asyncio.sleep(0.02)
    (loading,) = engines_of_this_process() - before
    os.kill(loading, signal.SIGABRT)
    with pytest.raises(BackendDead, match=r"signal 6.* while loading") as death:
        await starting
    assert death.value.cause is DeathCause.CRASHED
    assert backend.health().state is BackendState.STOPPED
    await backend.close()


def test_restarts_wait_longer_while_they_come_to_nothing() -> None:
    delays = [restart_delay(num) for num in range(10)]
    assert delays == [0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert restart_delay(100_000) == 30.0


@on_uvloop
async def test_an_engine_that_breaks_says_what_broke(tiny_llama: Path) -> None:
    """A signal but SIGKILL is a crash, and was not asked for by anybody."""
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        work = asyncio.create_task(backend.forward_backward(long_unit()))
        await end(backend, {2}.__eq__)  # it may still be at work on the answer to call 1
        with pytest.raises(BackendDead, match="signal 6") as death:
            await work
        assert death.value.cause is DeathCause.CRASHED
        with pytest.raises(BackendDead, match="load it again") as after:
            await backend.optim_step({0: AdamParams()})
        assert after.value.cause is DeathCause.LOST  # that call was never run


# --------------------------------------------------------------------------- stalls


@contextlib.contextmanager
def stalling_files(directory: Path) -> Iterator[None]:
    """Who reads an adapter from ``directory`` stands still until the end, then finds it empty."""
    directory.mkdir()
    os.mkfifo(directory / "adapter_config.json")
    try:
        yield
    finally:
        # Both ends, so that this never waits for a reader.
        os.close(os.open(directory / "adapter_config.json", os.O_RDWR))


@on_uvloop
async def test_an_engine_that_does_not_get_on_is_ended_and_restarted(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tiny_llama, local_config(stall_timeout_s=0.5)) as backend:
        with stalling_files(tmp_path / "adapter"):
            with pytest.raises(BackendDead, match="stalled") as death:
                await backend.load_slot(0, spec(), tmp_path / "adapter")
            assert death.value.cause is DeathCause.STALLED
        assert await backend.sample(request(PROMPT))
        assert backend.health().generation == 2
    told = capsys.readouterr().out
    assert "one piece of work has taken 0.5 s" in told
    assert "read_adapter" in told  # the stacks say what stood still


@on_uvloop
async def test_an_engine_that_is_stopped_for_longer_than_a_stall_goes_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """As it is in a suspended machine, in the middle of a piece of work."""
    timeout_s = 4.0
    async with running(tiny_llama, local_config(stall_timeout_s=timeout_s)) as backend:
        pid = backend.engine_pid
        assert pid is not None
        with stalling_files(tmp_path / "adapter"):
            loading = asyncio.create_task(backend.load_slot(0, spec(), tmp_path / "adapter"))
            await asyncio.sleep(0.2)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1.25 * timeout_s)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.2)
        with pytest.raises(UserError):  # of what it has read: it lives
            await loading
        assert backend.engine_pid == pid
        assert await backend.sample(request(PROMPT))


@on_uvloop
async def test_an_idle_engine_is_not_a_stalled_one(tiny_llama: Path) -> None:
    async with running(tiny_llama, local_config(stall_timeout_s=0.1)) as backend:
        pid = backend.engine_pid
        await asyncio.sleep(0.5)
        assert backend.engine_pid == pid
        assert backend.health().alive


# --------------------------------------------------------------------------- saving


@on_uvloop
async def test_a_state_that_is_being_written_dies_with_its_engine(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        with slow_disk(tmp_path / "first"):
            first = await backend.save_state(0, tmp_path / "first")
            second = await backend.save_state(0, tmp_path / "second")
            third = asyncio.create_task(backend.save_state(0, tmp_path / "third"))
            await asyncio.sleep(0)
            kill_engine(backend)
            for saving in (first, second):
                with pytest.raises(BackendDead, match="signal 9"):
                    await saving.written()
            with pytest.raises(BackendDead):
                await third
        await backend.load_slot(0, spec())
        await written(backend.save_state(0, tmp_path / "next"))


@on_uvloop
async def test_what_was_captured_is_written_before_the_engine_is_closed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        saving = await backend.save_state(0, tmp_path / "state")
        await backend.close()
        await saving.written()
        assert (tmp_path / "state" / "state.json").is_file()


@on_uvloop
async def test_a_disk_that_is_full_in_the_middle_of_the_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        assert backend.engine_pid is not None
        limits = resource.prlimit(backend.engine_pid, resource.RLIMIT_FSIZE, (10_000, -1))
        with pytest.raises(StorageError, match=r"cannot write the state: .*File too large"):
            await written(backend.save_state(0, tmp_path / "state"))
        resource.prlimit(backend.engine_pid, resource.RLIMIT_FSIZE, limits)
        await written(backend.save_state(0, tmp_path / "again"))


# --------------------------------------------------------------------------- end


@on_uvloop
async def test_close_leaves_no_process(tiny_llama: Path) -> None:
    async with running(tiny_llama) as backend:
        pid = backend.engine_pid
        assert pid is not None
        assert is_running(pid)
        await backend.close()
        assert not is_running(pid)
        assert not backend.health().alive
        assert backend.health().state is BackendState.STOPPED
        with pytest.raises(BackendDead, match="closed") as refused:
            await backend.sample(request(PROMPT))
        assert refused.value.cause is DeathCause.CLOSED


@on_uvloop
async def test_close_ends_work_in_flight(tiny_llama: Path) -> None:
    async with running(tiny_llama) as backend:
        await backend.load_slot(0, spec())
        work = asyncio.create_task(backend.forward_backward(long_unit()))
        await asyncio.sleep(0.2)
        await backend.close()
        with pytest.raises(BackendDead):
            await work


@on_uvloop
async def test_close_during_a_restart_leaves_no_process(tiny_llama: Path) -> None:
    async with running(tiny_llama) as backend:
        before = engines_of_this_process()
        pid = kill_engine(backend)
        while pid in (now := engines_of_this_process()) or len(now) < len(before):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the next engine is only seen from outside
        assert not backend.health().alive  # it is still loading
        await backend.close()
        assert len(engines_of_this_process()) == len(before) - 1


@on_uvloop
async def test_close_during_the_start_leaves_no_process(tiny_llama: Path) -> None:
    before = engines_of_this_process()
    backend = backend_of(tiny_llama)
    starting = asyncio.create_task(backend.start())
    while engines_of_this_process() == before:  # noqa: ASYNC110  it is only seen from outside
        await asyncio.sleep(0.02)
    await backend.close()
    with pytest.raises(BackendDead, match="closed"):
        await starting
    assert engines_of_this_process() == before


@on_uvloop
async def test_a_cancelled_start_leaves_no_process(tiny_llama: Path) -> None:
    before = engines_of_this_process()
    starting = asyncio.create_task(backend_of(tiny_llama).start())
    while engines_of_this_process() == before:  # noqa: ASYNC110  it is only seen from outside
        await asyncio.sleep(0.02)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert engines_of_this_process() == before


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.backends.test_local import backend_of, long_unit
from tests.backends.harness import spec

async def main():
    backend = backend_of(Path(sys.argv[1]))
    await backend.start()
    await backend.load_slot(0, spec())
    print("engine", backend.engine_pid, flush=True)
    await backend.forward_backward(long_unit())

asyncio.run(main())
"""


@on_uvloop
async def test_an_engine_does_not_outlive_its_server(tiny_llama: Path) -> None:
    """Also in the middle of a unit: the server is killed, its engine is busy."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tiny_llama), stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    line = b""
    while not line.startswith(b"engine "):  # log lines come first
        line = await server.stdout.readline()
        assert line, "the server ended before its engine was up"
    engine_pid = int(line.split()[1])
    assert is_running(engine_pid)
    server.kill()
    await server.communicate()
    while is_running(engine_pid):  # noqa: ASYNC110  it is not our child: there is no event
        await asyncio.sleep(0.02)


# --------------------------------------------------------------------------- start


@on_uvloop
async def test_a_path_without_a_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        await backend_of(tmp_path).start()


@on_uvloop
async def test_the_engine_tells_in_its_words_why_it_cannot_load(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        await backend_of(model).start()
    shutil.copytree(tiny_llama, model, dirs_exist_ok=True)
    (model / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot load tests/tiny"):
        await backend_of(model).start()


@on_uvloop
async def test_a_context_length_over_the_models_own_is_refused(tiny_llama: Path) -> None:
    model = ModelConfig(name="tests/tiny", path=tiny_llama, context_length=CONTEXT_LENGTH + 1)
    with pytest.raises(ConfigError, match="context_length"):
        await LocalBackend(model, local_config()).start()


@on_uvloop
async def test_a_shorter_context_length_holds(tiny_llama: Path) -> None:
    model = ModelConfig(name="tests/tiny", path=tiny_llama, context_length=32)
    backend = LocalBackend(model, local_config())
    await backend.start()
    try:
        assert backend.capabilities().context_length == 32
        assert backend.capabilities().base_model == "tests/tiny"
        await backend.load_slot(0, spec())
        with pytest.raises(UserError):
            await backend.forward(unit(op(0, datum(VOCAB_SIZE, 33, 0))))
    finally:
        await backend.close()


def test_the_engines_environment_keeps_its_memory_and_its_threads() -> None:
    inherited = {"HOME": "/home/somebody", "OMP_NUM_THREADS": "9"}
    environment = child_environment(EngineConfig(num_threads=3), inherited)
    assert environment["HOME"] == inherited["HOME"]
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 2**30
    assert environment["TRANSFORMERS_OFFLINE"] == "1"
