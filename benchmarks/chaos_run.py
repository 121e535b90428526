"""One server, its clients in processes of their own, and whoever kills it meanwhile."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_audit import (
    Data,
    Kept,
    Run,
    copied_database,
    differing_lines,
    differing_runs,
    lines_of,
)
from benchmarks.chaos_moments import IN_RECOVERY, MOMENTS, Scene
from benchmarks.chaos_relay import Relay
from benchmarks.chaos_server import KilledServer, Target, until
from tests.servers import REPOSITORY, server_in

STUCK_S = 300.0
"""Without any new result for so long, a client is stuck: the SDK's longest pause is 30 s."""
MOMENT_S = 30.0
_LOOK_S = 0.05


class ClientFailed(Exception):
    """It gave up, or hears nothing any more; the text says what is known."""


@dataclass(frozen=True)
class Workload:
    """A client program (``benchmarks.chaos_<name>``) and its size."""

    name: str
    model: str
    steps: int
    batch: int
    length: int
    rank: int = 4

    def command(self, results: Path) -> list[str]:
        options = {"model": self.model, "steps": self.steps, "batch": self.batch}
        options |= {"length": self.length, "rank": self.rank}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", f"benchmarks.chaos_{self.name}", str(results), *words]


@dataclass
class Kill:
    moment: str
    target: Target
    at_s: float = 0.0
    recovery_s: float | None = None
    """Until every client has received a result that it had not had; None where the next kill came
    before that."""


@dataclass
class Outcome:
    """``seconds``: of each workload's rounds."""

    lines: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    kept: Mapping[Run, list[Kept]] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    wall_s: float = 0.0
    num_starts: int = 0
    num_engines: int = 0
    replays: list[int] = field(default_factory=list)
    """Of each model that was brought back: operations that were run again for that."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What shall be killed, how often and when."""

    kills: int
    seed: int
    targets: Sequence[Target]
    moments: Sequence[str]
    spread_s: float
    restart_s: float


class Trial:
    """A server's life with its clients, from an empty folder to the audit of what is left."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        workloads: Sequence[Workload],
        on_event: Callable[[str], None] = lambda _: None,
        command: Sequence[str] = (),
    ) -> None:
        """``command`` starts the server; none: the usual way of the tests."""
        self._directory = directory
        self._server = KilledServer(server_in(directory, config), self._audit)
        if command:
            self._server.server.command = tuple(command)
        self._workloads = workloads
        self._tell = on_event
        port = int(self._server.server.base_url.rsplit(":", 1)[1])
        self._relays = {workload.name: Relay(port) for workload in workloads}
        self._enough = asyncio.Event()
        self._outcome = Outcome()

    async def run(self, plan: Plan | None = None) -> Outcome:
        """Without a plan each client runs once; with one, until all kills are done."""
        start = time.monotonic()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._server.running())
            for relay in self._relays.values():
                await stack.enter_async_context(relay.listening())
            try:
                await self._run_clients(plan)
            except* ClientFailed as failures:
                self._outcome.problems += map(str, failures.exceptions)
        outcome = self._outcome
        outcome.wall_s = time.monotonic() - start
        outcome.num_starts = self._server.num_starts
        outcome.num_engines = len(self._server.engines)
        outcome.replays = self._server.replays()
        data = Data(self._directory)
        outcome.kept = data.kept()
        outcome.problems += [*self._server.problems, *data.problems()]
        return outcome

    async def _run_clients(self, plan: Plan | None) -> None:
        async with asyncio.TaskGroup() as group:
            for workload in self._workloads:
                group.create_task(self._rounds(workload))
            if plan is None:
                self._enough.set()
            else:
                group.create_task(self._torment(plan))

    # ----------------------------------------------------------------- clients

    async def _rounds(self, workload: Workload) -> None:
        while True:
            number = len(self._outcome.lines.setdefault(workload.name, []))
            results = self._directory / f"{workload.name}-{number}.jsonl"
            start = time.monotonic()
            await self._client(workload, results)
            self._outcome.lines[workload.name].append(lines_of(results))
            self._outcome.seconds.setdefault(workload.name, []).append(time.monotonic() - start)
            if self._enough.is_set():
                return

    async def _client(self, workload: Workload, results: Path) -> None:
        """Raises ``ClientFailed``."""
        relay = self._relays[workload.name]
        environment = self._server.server.client_environment()
        environment["TINKER_BASE_URL"] = f"http://127.0.0.1:{relay.port}"
        log_file = results.with_suffix(".log")
        with log_file.open("wb") as log:
            client = await asyncio.create_subprocess_exec(
                *workload.command(results), cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )
        try:
            await self._watched(client, relay, workload.name)
        finally:
            if client.returncode is None:
                client.kill()
                await client.wait()
        # A program of the SDK may abort at its very end, see ``tests.servers.assert_client_ended``.
        # Whether all results were written before, the comparison tells.
        if client.returncode not in (0, -signal.SIGABRT):
            tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-25:])
            raise ClientFailed(f"client {workload.name} failed:\n{tail}")

    async def _watched(self, client: asyncio.subprocess.Process, relay: Relay, name: str) -> None:
        ended = asyncio.create_task(client.wait())
        outcomes, since = -1, time.monotonic()
        try:
            while not (await asyncio.wait({ended}, timeout=1.0))[0]:
                if relay.outcomes != outcomes:
                    outcomes, since = relay.outcomes, time.monotonic()
                elif time.monotonic() - since > STUCK_S:
                    raise ClientFailed(f"{name}: no result for {STUCK_S:g} s\n{self._pending()}")
        finally:
            ended.cancel()

    def _pending(self) -> str:
        with copied_database(self._directory) as database:
            rows = Data(self._directory, database).rows(
                "SELECT scope, seq, kind, request_id, created_at FROM futures "
                "WHERE status = 'pending' ORDER BY scope, seq"
            )
        told = "\n".join(" ".join(map(str, row)) for row in rows) or "none"
        return f"pending promises:\n{told}\nlog:\n{self._server.server.log_tail(25)}"

    def _audit(self, is_orderly: bool) -> list[str]:
        """Of an end between two starts; before its first database there is nothing to look at."""
        with copied_database(self._directory) as database:
            data = Data(self._directory, database)
            if not database.exists() or not data.rows("SELECT 1 FROM sqlite_master LIMIT 1"):
                return []
            return data.problems_between(is_orderly)

    # ----------------------------------------------------------------- kills

    async def _torment(self, plan: Plan) -> None:
        draw = random.Random(plan.seed)
        relays = list(self._relays.values())
        scene = Scene(self._server, relays, draw, plan.spread_s, plan.restart_s)
        kills = [
            Kill(draw.choice(plan.moments), draw.choice(plan.targets)) for _ in range(plan.kills)
        ]
        for kill, following in zip(kills, [*kills[1:], None], strict=True):
            if kill.moment != IN_RECOVERY:
                await scene.sleep()
            self._tell(f"waits for {kill.moment}")
            before = await self._strike(scene, kill)
            self._outcome.kills.append(kill)
            self._tell(f"killed {kill.target}: {kill.moment}")
            if following is None or following.moment != IN_RECOVERY:
                await self._recovered(kill, before)
        self._enough.set()

    async def _recovered(self, kill: Kill, before: Mapping[Relay, int]) -> None:
        """Clients that are stuck are found out where they are watched."""
        await until(lambda: all(relay.outcomes > number for relay, number in before.items()))
        kill.recovery_s = time.monotonic() - kill.at_s
        self._tell(f"{kill.target} is back after {kill.recovery_s:.1f} s")

    async def _strike(self, scene: Scene, kill: Kill) -> dict[Relay, int]:
        """Kills at the moment, or at any if that does not come; returns the outcomes by then."""
        try:
            async with asyncio.timeout(MOMENT_S) as patience, MOMENTS[kill.moment](scene) as held:
                patience.reschedule(None)
                await self._hit(kill, scene)
                if held is not None:
                    held.let_go(drop=kill.target in (Target.API, Target.BOTH))
        except TimeoutError:
            kill.moment = f"random ({kill.moment} did not come)"
            await self._hit(kill, scene)
        await asyncio.sleep(_LOOK_S)  # what was on its way is not news
        return {relay: relay.outcomes for relay in scene.relays}

    async def _hit(self, kill: Kill, scene: Scene) -> None:
        """What is just being restarted is waited for: there is nothing to kill yet."""
        gap_s = scene.random.uniform(0.0, 0.01)
        while not (victims := self._server.kill(kill.target, gap_s)):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        kill.at_s = time.monotonic()
        if kill.target is Target.BOTH and len(victims) == 1:
            (kill.target,) = victims  # the other one was not there
        if kill.target is not Target.STOP:
            await until(lambda: not any(victim.is_alive() for victim in victims.values()))


def differences(undisturbed: Outcome, killed: Outcome) -> list[str]:
    """Of every round of every client from the undisturbed one, and of what was stored."""
    problems = []
    for name, rounds in killed.lines.items():
        (expected,) = undisturbed.lines[name]
        for number, found in enumerate(rounds):
            problems += differing_lines(expected, found, f"{name}, round {number},")
    for run, kept in killed.kept.items():
        num_rounds = len(killed.lines.get(run.workload, ()))
        if len(kept) != num_rounds:
            problems.append(f"{run.workload} {run.model}: {len(kept)} runs of {num_rounds} rounds")
    return [*problems, *differing_runs(undisturbed.kept, killed.kept)]
