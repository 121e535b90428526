"""Every example runs as a user runs it: a process of its own against a real server."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import common
from tests.e2e.clients import next_token, service_client, train, trainer_of
from tests.servers import REPOSITORY, Server, assert_client_ended, running_server
from training.config import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    """The fake model under the embedded one's name and with its tokenizer: fast, and it learns."""
    model = {"name": EMBEDDED_MODEL, "path": str(embedded_model), "backend": "fake"}
    with running_server(
        tmp_path_factory.mktemp("examples"), {"supported_models": [model]}
    ) as running:
        yield running


def run(server: Server, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *arguments],
        cwd=REPOSITORY,
        env=server.client_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert_client_ended(done)
    return done.stdout


def metrics(server: Server, directory: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
    file = directory / f"{name}.json"
    run(server, name, *arguments, "--json", str(file))
    steps: list[dict[str, Any]] = json.loads(file.read_text())
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
    return steps


def column(steps: list[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in steps if name in step]


# --------------------------------------------------------------------------- the protocol, fast


def test_sft(server: Server, tmp_path: Path) -> None:
    steps = metrics(server, tmp_path, "sft", "--steps", "4", "--batch", "4", "--eval-every", "2")
    assert len(column(steps, "loss")) == 4
    held_out = column(steps, "held_out_loss")
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]


def test_rl_grpo(server: Server, tmp_path: Path) -> None:
    """The fake model cannot add, so only the turns are counted here; learning is proved below."""
    steps = metrics(server, tmp_path, "rl_grpo", "--steps", "2", "--questions", "2", "--group", "3")
    rewards = column(steps, "reward")
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
    assert len(column(steps, "held_out_reward")) == 2


def test_dpo(server: Server, tmp_path: Path) -> None:
    steps = metrics(server, tmp_path, "dpo", "--steps", "5", "--pairs", "3")
    losses = column(steps, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert column(steps, "held_out_accuracy")[0] > 0.9


def test_distillation(server: Server, tmp_path: Path) -> None:
    """The fake model sees one token back: a prompt teaches it nothing, a trained teacher does."""
    with service_client(server) as service:
        teacher = trainer_of(service, EMBEDDED_MODEL)
        train(teacher, [next_token([198, 198, 198, 198])], 5)
        path = teacher.save_weights_for_sampler("teacher").result().path
    steps = metrics(
        server, tmp_path, "distillation", "--steps", "3", "--prompts", "4", "--teacher-path", path
    )
    divergence = column(steps, "reverse_kl")
    assert len(divergence) == 3
    assert divergence[0] > 0
    assert len(column(steps, "held_out_reverse_kl")) == 1


def test_custom_loss(server: Server, tmp_path: Path) -> None:
    first, *steps = metrics(server, tmp_path, "custom_loss", "--steps", "4", "--batch", "4")
    assert first["focal_with_gamma_0"] == pytest.approx(first["cross_entropy"], rel=1e-5)
    losses = column(steps, "focal_loss")
    assert losses[-1] < losses[0]


def test_checkpoint_resume(server: Server, tmp_path: Path) -> None:
    steps = metrics(server, tmp_path, "checkpoint_resume", "--steps", "3")
    assert len(steps) == 3
    assert column(steps, "resumed") == column(steps, "uninterrupted")


def test_demo(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    output = run(server, "demo", "--steps", "4", "--batch", "4", "--json", str(file))
    steps = json.loads(file.read_text())
    assert steps[-1]["held_out_after"] < steps[-1]["held_out_before"]
    for part in ("before", "after", "Japan", "held-out loss", "examples/quickstart.py"):
        assert part in output


def test_quickstart(server: Server) -> None:
    losses = re.findall(r"^\d (\S+)$", run(server, "quickstart"), re.MULTILINE)
    assert len(losses) == 8
    assert float(losses[-1]) < float(losses[0])


# --------------------------------------------------------------------------- the truth, slower


def test_a_real_model_learns_the_cards(real_server: Server, tmp_path: Path) -> None:
    steps = metrics(
        real_server, tmp_path, "sft", "--steps", "6", "--batch", "4", "--eval-every", "100"
    )
    before, after = column(steps, "held_out_loss")
    assert after < 0.6 * before


def test_dpo_on_a_real_model_begins_at_ln_2(real_server: Server, tmp_path: Path) -> None:
    """The policy and the reference are two adapters of different rank; both change nothing yet."""
    steps = metrics(real_server, tmp_path, "dpo", "--steps", "3", "--pairs", "2")
    losses = column(steps, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[0]


def test_a_real_run_resumes_bit_for_bit(real_server: Server, tmp_path: Path) -> None:
    steps = metrics(real_server, tmp_path, "checkpoint_resume", "--steps", "2")
    assert column(steps, "resumed") == column(steps, "uninterrupted")


# --------------------------------------------------------------------------- the data


def test_the_data_set_is_whole() -> None:
    train, test = common.countries()
    assert (len(train), len(test)) == (172, 24)
    countries = [card.country for card in (*train, *test)]
    assert len(set(countries)) == len(countries)
    for card in (*train, *test):
        facts = json.loads(card.answer)
        assert set(facts) == {"country", "capital", "continent", "currency"}
        assert re.fullmatch(r"[A-Z]{3}", facts["currency"])


def test_every_card_comes_once_before_any_comes_again() -> None:
    train, _ = common.countries()
    drawn = [card for batch in common.batches(train, 43, 8, seed=3) for card in batch]
    assert len(set(drawn[:172])) == 172
    assert sorted(drawn[:172]) == sorted(drawn[172:])
    assert drawn == [card for batch in common.batches(train, 43, 8, seed=3) for card in batch]


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    script = (REPOSITORY / "examples" / "quickstart.py").read_text()
    assert len([line for line in script.splitlines() if line]) <= 15
    assert script in (REPOSITORY / "README.md").read_text()
