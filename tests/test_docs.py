"""The documents name every route, setting, loss and metric, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import REGISTRY

from training.api import create_app
from training.config import ENVIRONMENT, ModelConfig, TrainingConfig
from training.losses import LOSSES

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return REFERENCE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_route_is_described_and_every_described_route_exists() -> None:
    config = TrainingConfig(supported_models=(ModelConfig(name="test/fake", backend="fake"),))
    served = {
        f"{method.upper()} {path}"
        for path, methods in create_app(config).openapi()["paths"].items()
        if not path.startswith("/hf")
        for method in methods
    }
    described = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`]*)`", section("Routes")))
    extra = {"GET /docs", "GET /redoc", "GET /openapi.json"}
    described = {item for item in described if not item.startswith("GET /hf")}
    assert described - extra == served


def test_every_environment_variable_is_described() -> None:
    described = dict(re.findall(r"\| `([A-Z_]+)` \| `([a-z_.]+)` \|", section("Settings")))
    assert described == {name: ".".join(place) for name, place in ENVIRONMENT.items()}


def test_every_loss_is_described_with_its_defaults() -> None:
    rows = {
        name: row
        for row in section("Losses").splitlines()
        for name in re.findall(r"^\| `(\w+)` ", row)
    }
    assert set(rows) == set(LOSSES)
    for name, spec in LOSSES.items():
        for key, default in spec.config.items():
            assert f"`{key}` {default}" in rows[name]


def test_every_metric_is_described() -> None:
    described = set(re.findall(r"\| `(tinkercloud_\w+)` \|", section("Metrics")))
    collected = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in REGISTRY.collect()
        if metric.name.startswith("tinkercloud_")
    }
    assert described == collected


def test_the_quickstart_of_the_readme_is_the_one_that_is_run() -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert script == (ROOT / "examples/quickstart.py").read_text(encoding="utf-8")
