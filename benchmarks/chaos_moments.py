"""When to kill: each moment is a function that waits for it. What it caught stands still meanwhile.

The names are those that a user of ``--moments`` gives and that the figures are told by.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_relay import Held, Relay, Stage
from benchmarks.chaos_server import KilledServer, until

BODIES = ("/forward_backward", "/forward", "/optim_step", "/asample")
PROMISES = (*BODIES, "/create_model", "/save_weights", "/save_weights_for_sampler", "/load_weights")
_LOOK_S = 0.001


@dataclass(frozen=True, eq=False)
class Scene:
    """``spread_s``: about how long a client works on a step; random waits are up to that.
    ``restart_s``: the same of a server that comes back."""

    server: KilledServer
    relays: Sequence[Relay]
    random: random.Random
    spread_s: float
    restart_s: float

    @property
    def directory(self) -> Path:
        return self.server.server.directory

    async def sleep(self) -> None:
        await asyncio.sleep(self.random.uniform(0.0, self.spread_s))


Moment = Callable[[Scene], AbstractAsyncContextManager[Held | None]]
"""Inside the context it is that moment; at its end what was held goes on."""


@asynccontextmanager
async def at_random(scene: Scene) -> AsyncIterator[None]:
    await scene.sleep()
    yield


@asynccontextmanager
async def in_recovery(scene: Scene) -> AsyncIterator[None]:
    """The kill before this one has not been recovered from: nobody waited for that."""
    await asyncio.sleep(scene.random.uniform(0.0, scene.restart_s))
    yield


@asynccontextmanager
async def mid_batch(scene: Scene) -> AsyncIterator[None]:
    """A forward_backward was just accepted, so that it, or what is before it, is computed."""
    async with _trapped(scene, Stage.ANSWER, "/forward_backward") as held:
        held.let_go()
        await scene.sleep()
        yield


def mid_body(scene: Scene) -> AbstractAsyncContextManager[Held]:
    return _trapped(scene, Stage.BODY, *BODIES)


def before_answer(scene: Scene) -> AbstractAsyncContextManager[Held]:
    """The promise is committed, and the client has not heard of it."""
    return _trapped(scene, Stage.ANSWER, *PROMISES)


def before_result(scene: Scene) -> AbstractAsyncContextManager[Held]:
    """The same with an outcome."""
    return _trapped(scene, Stage.ANSWER, "/retrieve_future")


def at_the_end(scene: Scene) -> AbstractAsyncContextManager[Held]:
    """The session's end is committed, and the client has not heard of it."""
    return _trapped(scene, Stage.ANSWER, "/finish")


@asynccontextmanager
async def mid_checkpoint(scene: Scene) -> AsyncIterator[None]:
    await _being_written(scene, scene.directory / "checkpoints" / ".staging")
    yield


@asynccontextmanager
async def mid_snapshot(scene: Scene) -> AsyncIterator[None]:
    await _being_written(scene, scene.directory / "metadata" / "snapshots" / ".staging")
    yield


IN_RECOVERY = "in-recovery"
MOMENTS: Mapping[str, Moment] = {
    "random": at_random,
    "mid-body": mid_body,
    "mid-batch": mid_batch,
    "mid-checkpoint": mid_checkpoint,
    "mid-snapshot": mid_snapshot,
    "before-answer": before_answer,
    "before-result": before_result,
    "at-the-end": at_the_end,
    IN_RECOVERY: in_recovery,
}


@asynccontextmanager
async def _trapped(scene: Scene, stage: Stage, *suffixes: str) -> AsyncIterator[Held]:
    """Set for all clients; the first that comes is held."""
    with ExitStack() as stack:
        traps = [stack.enter_context(relay.trap(stage, *suffixes)) for relay in scene.relays]
        done, _ = await asyncio.wait(traps, return_when=asyncio.FIRST_COMPLETED)
        for trap in traps:
            if trap not in done:
                trap.cancel()
        yield min(done, key=traps.index).result()


async def _being_written(scene: Scene, staging: Path) -> None:
    """Until a directory is there, and then a little: its files are small."""
    await until(lambda: staging.is_dir() and any(staging.iterdir()), _LOOK_S)
    await asyncio.sleep(scene.random.uniform(0.0, 0.01))
