"""What idle tenants cost: speed of a busy one beside them, and memory for each.

    python -m benchmarks.idle_tenants MODEL_DIRECTORY [--tenants 200] [--out idle_tenants.json]

Every tenant has a rank-32 adapter and has made a step, so that it has weights, moments and a form
that the kernels read. The busy one trains through the engine's loop, alone, beside tenants that
have just become idle and are on their way to disk, and beside those that have arrived there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.memory import memory_of
from benchmarks.workload import RANK, Case, Shape, clocked, take_turns, training_rows
from training.backends import ipc
from training.backends.base import AdamParams, Datum, LoraSpec, TrainOp, TrainUnit
from training.backends.child import child_environment
from training.config import EMBEDDED_MODEL, EngineConfig
from training.engine.loop import EngineLoop, Inbox
from training.engine.process import load
from training.engine.sampler import Sampler
from training.engine.trainer import Trainer

SETTLED = "BENCHMARK_ENVIRONMENT_IS_SET"
COUNTS = (1, 2, 10, 50, 100, 200, 500, 1000)
"""Of tenants, at which memory is looked at."""
BUSY = 0
FIRST_STEP = Shape(1, 16)
SPILLED_BYTES = 180_000_000
"""Room for a tenant on disk: without it, it stays in memory and is never at rest."""
LEAVING = 3
"""Tenants that have just become idle: what the busy one's turns leave time for is less."""


class Point(NamedTuple):
    """Resident MiB of the process with ``tenants`` of them: just after the last one's step, and
    when all have been idle for a while."""

    tenants: int
    active_mib: float
    idle_mib: float


class LoopDriver:
    """An engine's loop without its process: commands in, and turns until they are answered."""

    def __init__(self, trainer: Trainer, sampler: Sampler) -> None:
        self._trainer = trainer
        self._inbox: Inbox = queue.SimpleQueue()
        self._replies: list[ipc.Reply] = []
        self._loop = EngineLoop(trainer, sampler, self._inbox, self._reply, sampling_share=0.5)

    def _reply(self, reply: ipc.Reply | ipc.Written) -> None:
        assert isinstance(reply, ipc.Reply)  # nothing is saved here
        self._replies.append(reply)

    def run(self, *commands: ipc.Command) -> None:
        self._replies.clear()
        for number, command in enumerate(commands):
            self._inbox.put(ipc.Call(number, command))
        while len(self._replies) < len(commands):
            self._loop.turn(wait=False)
        for reply in self._replies:
            if reply.error is not None:
                raise reply.error

    def rest(self) -> None:
        """Until all tenants are on disk, nothing is kept for them, and nothing for a next pass."""
        trainer = self._trainer
        while trainer.slots.memory.num_bytes or not trainer.idle_memory.is_released:
            self._loop.turn(wait=True)


def step_of(driver: LoopDriver, slot: int, shape: Shape) -> Callable[[], None]:
    data = [
        Datum(row[:-1].astype(np.int32), row[1:], {"weights": np.ones(len(row) - 1, np.float32)})
        for row in training_rows(shape)
    ]
    unit = TrainUnit([TrainOp(slot, "cross_entropy", {}, data)])

    def step() -> None:
        driver.run(ipc.ForwardBackward(unit), ipc.OptimStep({slot: AdamParams(1e-4)}))

    return step


def join(driver: LoopDriver, slot: int) -> None:
    """A new tenant makes its first step."""
    driver.run(ipc.LoadSlot(slot, LoraSpec(RANK, seed=slot), None, True))
    step_of(driver, slot, FIRST_STEP)()


def resident_mib() -> float:
    gc.collect()
    return memory_of(os.getpid()).steady_mib


def memory_curve(driver: LoopDriver, shape: Shape, tenants: int) -> list[Point]:
    """The first tenant trains as the busy one will, so that its working memory is there already."""
    points: list[Point] = []
    join(driver, BUSY)
    step_of(driver, BUSY, shape)()
    joined = 1
    for count in [*(count for count in COUNTS if count < tenants), tenants]:
        for slot in range(joined, count):
            join(driver, slot)
        joined = count
        active_mib = resident_mib()
        driver.rest()
        points.append(Point(count, active_mib, resident_mib()))
    return points


def mib_per_tenant(points: list[Point]) -> dict[int, float]:
    """Of each further idle one, by the number of tenants."""
    first, *others = points
    return {each.tenants: (each.idle_mib - first.idle_mib) / (each.tenants - 1) for each in others}


def speed(alone: LoopDriver, crowded: LoopDriver, shape: Shape, rounds: int, idle_s: float) -> Case:
    """Both have a busy tenant of their own and the model in common."""
    join(alone, BUSY)
    steps = {driver: step_of(driver, BUSY, shape) for driver in (alone, crowded)}

    def timed(driver: LoopDriver) -> float:
        steps[driver]()  # its adapter has come back from disk
        return clocked(steps[driver])()

    def beside_settled() -> float:
        crowded.rest()
        return timed(crowded)

    def beside_leaving() -> float:
        for slot in range(1, 1 + LEAVING):
            step_of(crowded, slot, FIRST_STEP)()
        time.sleep(idle_s)
        return timed(crowded)

    ways = {
        "alone": lambda: timed(alone),
        "idle on disk": beside_settled,
        "idle on their way": beside_leaving,
    }
    return Case("busy tenant", take_turns(ways, rounds), shape.num_tokens)


def run(options: argparse.Namespace, config: EngineConfig) -> None:
    shape = Shape.parse(options.shape)
    engine = load(ipc.Configure(EMBEDDED_MODEL, options.model, None, config))
    crowded = LoopDriver(engine.trainer, engine.sampler)
    points = memory_curve(crowded, shape, options.tenants)
    each = mib_per_tenant(points)
    print("| tenants | RSS, MiB | all idle, MiB | MiB per further idle tenant |\n|---|---|---|---|")
    for point in points:
        further = f"{each[point.tenants]:.2f}" if point.tenants in each else ""
        print(f"| {point.tenants} | {point.active_mib:,.0f} | {point.idle_mib:,.0f} | {further} |")
    alone = LoopDriver(Trainer(engine.trainer.model, config, EMBEDDED_MODEL), engine.sampler)
    case = speed(alone, crowded, shape, options.rounds, config.idle_spill_s)
    print(f"\n| {options.tenants - 1} others | busy one, {shape} | of alone | best of each |")
    print("|---|---|---|---|")
    fastest = {way: min(seconds) for way, seconds in case.seconds.items()}
    for way, best_s in fastest.items():
        shares = 100 * case.ratio(way, "alone"), 100 * fastest["alone"] / best_s
        print(f"| {way} | {case.shown(way)} | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    if options.out is not None:
        found = {
            "tenants": options.tenants,
            "memory": [point._asdict() for point in points],
            "mib_per_tenant": each,
            "speed": case.to_json(),
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--shape", default="8x128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--idle-s", type=float, default=1.0, help="engine.idle_spill_s")
    parser.add_argument("--spill-dir", type=Path, help="where tenants go; see SPILLED_BYTES")
    parser.add_argument("--out", type=Path, help="where figures are written, as JSON")
    options = parser.parse_args()
    parent = options.spill_dir or Path(tempfile.gettempdir())
    if options.tenants <= LEAVING:
        parser.error(f"--tenants must be more than {LEAVING}")
    if shutil.disk_usage(parent).free < options.tenants * SPILLED_BYTES:
        parser.error(f"each of the tenants needs {SPILLED_BYTES / 1e6:.0f} MB in {parent}")
    config = EngineConfig(idle_spill_s=options.idle_s, spill_dir=parent / "idle-tenants")
    if SETTLED not in os.environ:  # the allocator reads its settings when a process starts
        environment = child_environment(config, os.environ) | {SETTLED: "1"}
        command = [sys.executable, "-m", "benchmarks.idle_tenants", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    run(options, config)


if __name__ == "__main__":
    main()
