"""Kills a server again and again while clients train on it, and compares with an undisturbed run.

    python -m benchmarks.chaos --kills 100 --seed 1 [--model real|fake] [--workload sft|rl|both]

The clients (``chaos_sft``, ``chaos_rl``) run in processes of their own through the official SDK,
round after round until all kills are done. Every number that they hear, every file that they save
and every row of the server's operations must be the same to the last bit as without kills. Exits
with 1 where something is not, and then keeps the servers' folders.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.chaos_moments import MOMENTS
from benchmarks.chaos_run import Outcome, Plan, Trial, Workload, differences
from benchmarks.chaos_server import Target
from tests.servers import FAKE_MODEL, REPOSITORY
from training.config import EMBEDDED_MODEL

CONFIG: Mapping[str, Any] = {
    # Chunks of a forward_backward are requests of their own: several of them to each.
    "client": {"fwdbwd_max_chunk_len": 4},
    "engine": {"max_restarts": 100_000},
    # Runs are short: with the usual settings they would see few snapshots.
    "durability": {"snapshot_steps": 3, "snapshot_pause_s": 0.2, "snapshot_share": 0.5},
}


MAKE_SERVE = ("make", "-C", str(REPOSITORY), "--no-print-directory", "serve")
"""The README's way; the settings come through the environment."""
FAKE_TARGETS = (Target.API, Target.STOP)
"""The fake model has no engine process."""


def fake_setup(workloads: Sequence[str]) -> tuple[dict[str, Any], list[Workload]]:
    sizes = {"sft": (24, 6, 24), "rl": (6, 3, 16)}
    return dict(CONFIG), [Workload(name, FAKE_MODEL, *sizes[name]) for name in workloads]


def real_setup(
    workloads: Sequence[str], model: Path, threads: int | None
) -> tuple[dict[str, Any], list[Workload]]:
    sizes = {"sft": (24, 6, 96), "rl": (6, 3, 48)}
    config = {
        **CONFIG,
        "supported_models": [{"name": EMBEDDED_MODEL, "path": str(model.absolute())}],
        "engine": {**CONFIG["engine"], "num_threads": threads, "kv_cache_tokens": 16384},
    }
    return config, [Workload(name, EMBEDDED_MODEL, *sizes[name], rank=8) for name in workloads]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of what is killed, and when")
    parser.add_argument("--model", choices=("real", "fake"), default="real")
    parser.add_argument("--workload", choices=("sft", "rl", "both"), default="both")
    parser.add_argument("--moments", nargs="*", choices=tuple(MOMENTS), default=tuple(MOMENTS))
    parser.add_argument("--make", action="store_true", help="start with `make serve`")
    parser.add_argument("--threads", type=int, help="of the engine; default: all")
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=REPOSITORY / "data" / "models" / EMBEDDED_MODEL,
        help="directory of the real model",
    )
    return parser


def main() -> None:
    options = parser().parse_args()
    console = Console()
    names = ("sft", "rl") if options.workload == "both" else (options.workload,)
    if options.model == "fake":
        config, workloads = fake_setup(names)
        plan = Plan(options.kills, options.seed, FAKE_TARGETS, options.moments, 0.5, 2.0)
    else:
        config, workloads = real_setup(names, options.model_dir, options.threads)
        plan = Plan(options.kills, options.seed, tuple(Target), options.moments, 2.0, 6.0)
    folder = Path(tempfile.mkdtemp(prefix="tinkercloud-chaos-"))
    command = MAKE_SERVE if options.make else ()
    trials = Trials(console, config, workloads, command)
    undisturbed = trials.run(folder / "undisturbed", None)
    killed = trials.run(folder / "killed", plan)
    problems = [f"undisturbed: {problem}" for problem in undisturbed.problems]
    problems += killed.problems + differences(undisturbed, killed)
    report(console, undisturbed, killed)
    for problem in problems:
        console.print(Text.assemble(("FAILED ", "red"), problem))
    if problems:
        raise SystemExit(f"{len(problems)} problems; everything is kept in {folder}")
    shutil.rmtree(folder)
    console.print("[green]every line, every file and every operation is the same[/]")


class Trials(NamedTuple):
    """What the undisturbed server and the killed one have in common."""

    console: Console
    config: Mapping[str, Any]
    workloads: Sequence[Workload]
    command: Sequence[str]

    def run(self, folder: Path, plan: Plan | None) -> Outcome:
        folder.mkdir()
        self.console.rule(folder.name)
        with self.console.status("starting") as status:
            done = 0

            def tell(event: str) -> None:
                nonlocal done
                done += event.startswith("killed")
                status.update(f"{done} of {plan.kills if plan else 0} kills; {event}")
                if not self.console.is_terminal:
                    self.console.print(f"{done}: {event}", highlight=False)

            trial = Trial(folder, self.config, self.workloads, tell, self.command)
            return asyncio.run(trial.run(plan))


def report(console: Console, undisturbed: Outcome, killed: Outcome) -> None:
    console.print(kills_table(killed))
    table = Table(title="runs")
    for column in ("client", "rounds", "lines a round", "undisturbed s", "killed s a round"):
        table.add_column(column, justify="right")
    for name, rounds in killed.lines.items():
        table.add_row(
            name,
            str(len(rounds)),
            str(len(undisturbed.lines[name][0])),
            f"{undisturbed.seconds[name][0]:.1f}",
            f"{statistics.mean(killed.seconds[name]):.1f}",
        )
    console.print(table)
    wasted = sum(killed.replays) / len(killed.kills) if killed.kills else 0.0
    console.print(
        f"server started {killed.num_starts} times, {killed.num_engines} engines; models brought "
        f"back {len(killed.replays)} times; operations run again for a kill: {wasted:.1f}"
    )


def kills_table(killed: Outcome) -> Table:
    """Recovery: from the kill until every client has a result that it had not had before."""
    table = Table(title=f"{len(killed.kills)} kills")
    for column in ("moment", *Target, "recovery s: median", "95 %", "max"):
        table.add_column(str(column), justify="right")
    for moment in [*dict.fromkeys(kill.moment for kill in killed.kills), "all"]:
        kills = [kill for kill in killed.kills if moment in ("all", kill.moment)]
        targets = Counter(kill.target for kill in kills)
        times = sorted(kill.recovery_s for kill in kills if kill.recovery_s is not None)
        table.add_row(moment, *(str(targets[each] or "") for each in Target), *quantiles(times))
    return table


def quantiles(times: Sequence[float]) -> list[str]:
    if not times:
        return ["", "", ""]
    late = times[min(len(times) - 1, int(0.95 * len(times)))]
    return [f"{value:.1f}" for value in (statistics.median(times), late, times[-1])]


if __name__ == "__main__":
    main()
