"""Imports point one way. Every import statement of the package counts: at the top of a module,
inside a function, and below ``TYPE_CHECKING``."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.servers import REPOSITORY

SEAMS = frozenset(
    {"core.errors", "core.ids", "core.records", "core.threads", "core.metrics", "backends.base"}
)

ALLOWED: dict[str, frozenset[str]] = {
    "core.errors": frozenset(),
    "core.ids": frozenset({"core.errors"}),
    "core.threads": frozenset({"core.errors"}),
    "core.metrics": frozenset(),
    "backends.base": frozenset(),
    "core.records": frozenset({"core.errors", "core.ids", "backends.base"}),
    "logs": frozenset(),
    "losses": SEAMS,
    "config": frozenset({"core.errors"}),
    "wire": SEAMS,
    "models": SEAMS | {"config"},
    "backends": SEAMS | {"config", "losses", "models"},
    "engine": SEAMS | {"config", "losses", "models", "backends"},
    "storage": SEAMS,
    "core": SEAMS | {"losses", "wire"},
    "services": SEAMS | {"config", "wire", "models", "backends", "storage", "core"},
    "console": frozenset(),
    "routers": SEAMS | {"config", "wire", "models", "core", "services", "console"},
    "api": SEAMS | {"config", "logs", "models", "services", "routers"},
    "cli": SEAMS | {"config", "logs", "models", "storage", "services", "api"},
}
"""Unit -> the units it may import, lowest first. A module belongs to the unit with the longest
matching name: ``core.records`` is a seam, ``core.planner`` belongs to ``core``."""

THIRD_PARTY: dict[str, frozenset[str]] = {
    "fastapi": frozenset({"api", "routers"}),
    "starlette": frozenset({"api", "routers"}),
    "uvicorn": frozenset({"cli"}),
    "typer": frozenset({"cli"}),
    "sqlalchemy": frozenset({"storage"}),
    "alembic": frozenset({"storage"}),
    "asyncpg": frozenset({"storage"}),
    "fsspec": frozenset({"storage"}),
    "torch": frozenset({"engine"}),
    "transformers": frozenset({"engine"}),
    "gguf": frozenset({"engine"}),
    "ray": frozenset({"backends"}),
    "vllm": frozenset({"backends"}),
    "tinker": frozenset(),
}
"""Packages that only some units may import. The SDK is for tests and examples alone."""

NEVER_IN_THE_API_PROCESS = ("torch", "transformers", "tinker", "peft", "ray", "vllm")


class Import(NamedTuple):
    """``target`` is dotted, below ``training`` for our own modules."""

    module: str
    line: int
    target: str
    ours: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY / "training").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports() -> Iterator[Import]:
    for path in sorted((REPOSITORY / "training").rglob("*.py")):
        module = module_name(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                ours = target.split(".")[0] == "training"
                name = target.removeprefix("training.") if ours else target
                yield Import(module, node.lineno, name, ours)


def unit_of(module: str) -> str | None:
    """None for the package's own ``__init__`` and for modules that the table does not know."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ALLOWED), None)


def test_the_table_itself_points_one_way() -> None:
    units = list(ALLOWED)
    for unit, allowed in ALLOWED.items():
        later = [other for other in allowed if units.index(other) >= units.index(unit)]
        assert not later, f"{unit} is listed before {later}"


def test_every_module_has_a_place_in_the_table() -> None:
    modules = {module_name(path) for path in (REPOSITORY / "training").rglob("*.py")}
    assert {module for module in modules if module and unit_of(module) is None} == set()


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_point_one_way(unit: str) -> None:
    wrong = [
        f"training.{item.module} line {item.line}: {item.target}"
        for item in imports()
        if item.ours
        and unit_of(item.module) == unit
        and item.target != "__version__"
        and unit_of(item.target) not in ALLOWED[unit] | {unit}
    ]
    assert wrong == []


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_packages_stay_where_they_belong(package: str) -> None:
    wrong = [
        f"training.{item.module} line {item.line}: {item.target}"
        for item in imports()
        if not item.ours
        and item.target.split(".")[0] == package
        and unit_of(item.module) not in THIRD_PARTY[package]
    ]
    assert wrong == []


def test_what_is_imported_is_declared() -> None:
    """Directly, not only by way of what needs it too."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {
        re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
        for group in groups
        for requirement in group
    }
    providers = packages_distributions()
    packages = {item.target.split(".")[0] for item in imports() if not item.ours}
    undeclared = [
        package
        for package in packages - sys.stdlib_module_names
        if not {name.lower().replace("_", "-") for name in providers.get(package, [])} & declared
    ]
    assert undeclared == []


def test_the_rules_notice_an_import_inside_a_function() -> None:
    found = {item.target for item in imports() if item.module == "cli.serve" and item.ours}
    assert "api.create_app" in found  # imported only when the command runs


@pytest.mark.parametrize("module", ["training.api", "training.cli"])
def test_the_api_process_loads_no_torch(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert set(json.loads(output)) & set(NEVER_IN_THE_API_PROCESS) == set()
