"""What the measuring programs share: their options, and running them part by part."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, results
from benchmarks.baselines import Baselines
from benchmarks.children import ChildFailed
from benchmarks.machine import Limits
from benchmarks.memory import children_of
from benchmarks.roofline import Costs
from benchmarks.service import Service, local_service

Values = dict[str, Any]


class Bench:
    """What a part may use. ``limits`` were measured just before it."""

    def __init__(self, options: argparse.Namespace, console: Console, limits: Limits) -> None:
        self.options = options
        self.console = console
        self.limits = limits
        self.costs = Costs.of(options.model)
        self.baselines = Baselines(options.model, options.threads, options.vllm_python)

    def service(self, stack: ExitStack, **engine: Any) -> Service:
        """A server of its own; ``engine``: settings of that section."""
        return stack.enter_context(local_service(self.options.model, self.options.threads, engine))

    def some(self, points: Sequence[int]) -> Sequence[int]:
        """The first ones, if that is all one wants to see."""
        return points[: self.options.points]


Part = Callable[[Bench], Values]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", default=[], help="parts; others keep their figures")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", type=Path, help="see benchmarks/setup_vllm; else none")
    parser.add_argument(
        "--directory", type=Path, default=results.DIRECTORY, help="where the JSON file is kept"
    )
    return parser


def run_parts(file: str, parts: Mapping[str, Part], options: argparse.Namespace) -> None:
    """Stores each part as soon as it is done."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: abandon())
    for part in selected(parts, options.only):
        start = time.perf_counter()
        limits = machine.limits(options.threads)
        console.rule(
            f"{part} (bfloat16 {limits.gemm_flops / 1e12:.2f} TFLOP/s, "
            f"memory {limits.memory_bytes_s / 1e9:.0f} GB/s)"
        )
        try:
            values = parts[part](Bench(options, console, limits))
        except ChildFailed as error:
            raise SystemExit(str(error)) from error
        results.store(file, part, values, limits, options.directory)
        console.print(f"{part} took {time.perf_counter() - start:.0f} s")


def abandon() -> None:
    """Ends servers and baselines with this process. In order it could take minutes: the SDK tries
    for long to say goodbye to a server that is gone."""
    print("told to end", file=sys.stderr, flush=True)
    for pid in children_of(os.getpid()):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    os._exit(1)


def selected(parts: Mapping[str, Any], only: list[str]) -> Iterator[str]:
    """Raises ``SystemExit`` for a part that does not exist."""
    if unknown := sorted(set(only) - set(parts)):
        raise SystemExit(f"no part {unknown[0]}; there are: {', '.join(parts)}")
    yield from (part for part in parts if not only or part in only)
