"""The kill test, in short: clients train while the server is killed again and again.

Afterwards every loss, metric, sample and file must be the same to the last bit as without kills,
and nothing may be left over. ``python -m benchmarks.chaos --kills 100`` is the long form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos import CONFIG
from benchmarks.chaos_run import Outcome, Plan, Trial, Workload, differences
from benchmarks.chaos_server import Target
from tests.servers import FAKE_MODEL, merged
from training.config import EMBEDDED_MODEL

API_MOMENTS = (
    "random",
    "mid-body",
    "mid-checkpoint",
    "mid-snapshot",
    "before-answer",
    "before-result",
)


def kill_test(
    folder: Path, config: Mapping[str, Any], workloads: Sequence[Workload], plan: Plan
) -> Outcome:
    """Raises ``AssertionError`` with everything that is not as it would be without kills."""
    outcomes = []
    for name, each in (("undisturbed", None), ("killed", plan)):
        (folder / name).mkdir()
        outcomes.append(asyncio.run(Trial(folder / name, config, workloads).run(each)))
    undisturbed, killed = outcomes
    assert undisturbed.problems == []
    assert killed.problems == []
    assert differences(undisturbed, killed) == []
    assert len(killed.kills) == plan.kills
    return killed


def test_clients_do_not_notice_that_the_server_is_killed(tmp_path: Path) -> None:
    """On exact arithmetic, both clients at once."""
    workloads = [Workload("sft", FAKE_MODEL, 12, 6, 24), Workload("rl", FAKE_MODEL, 4, 3, 16)]
    plan = Plan(6, 1, (Target.API,), (*API_MOMENTS, "in-recovery"), 0.3, 1.5)
    killed = kill_test(tmp_path, CONFIG, workloads, plan)
    assert killed.num_starts == 1 + plan.kills


def test_clients_do_not_notice_that_server_and_engine_are_killed(
    tmp_path: Path, embedded_model: Path
) -> None:
    """On the embedded model: the engine, the server, both within milliseconds, or it is told to
    stop."""
    config = merged(
        CONFIG,
        {
            "supported_models": [{"name": EMBEDDED_MODEL, "path": str(embedded_model)}],
            "engine": {"num_threads": 1, "kv_cache_tokens": 4096},
        },
    )
    workloads = [Workload("sft", EMBEDDED_MODEL, 6, 3, 12)]
    plan = Plan(6, 4, tuple(Target), (*API_MOMENTS, "mid-batch"), 0.5, 4.0)
    killed = kill_test(tmp_path, config, workloads, plan)
    assert {kill.target for kill in killed.kills} == set(Target)
