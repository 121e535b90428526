"""The pure parts of the measurements, and children that are asked over pipes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.baselines import TUNED, VLLM, WRITTEN
from benchmarks.children import Child, ChildFailed
from benchmarks.curve import settled_s
from benchmarks.machine import Limits
from benchmarks.memory import parse_status
from benchmarks.roofline import Costs
from benchmarks.workload import OURS, Case, Shape, as_in_a_loop, take_turns

SMOLLM2 = Costs(576, 1536, 30, 9, 3, 49152)
LIMITS = Limits("a processor", 2, 2e12, {"torch": 2e12}, 2e10, 3e10)


# --------------------------------------------------------------------------- turns


def test_ways_take_turns_and_the_first_turn_is_not_counted() -> None:
    calls: list[str] = []

    def way(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    seconds = take_turns({"a": lambda: way("a"), "b": lambda: way("b")}, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_one_round_is_counted_however_late_it_is() -> None:
    times = iter([0.0, 100.0])
    assert take_turns({"a": lambda: 1.0}, 3, budget_s=1.0, clock=lambda: next(times)) == {
        "a": [1.0]
    }


@pytest.mark.parametrize(
    ("durations", "median"),
    [
        ([31.0, 31.0, 8.0], 8.0),
        ([14.0, 9.0, 3.0], 3.0),
        ([0.5, 7.0, 0.2, 0.3, 0.4, 0.1, 0.9, 7.0], 0.3),
        ([1.0, 9.0, 1.2, 1.4, 0.9], 1.2),
    ],
)
def test_a_point_is_the_median_of_what_fits_into_its_time(
    durations: list[float], median: float
) -> None:
    left = iter(durations)
    assert settled_s(lambda: next(left), budget_s=3.0, most=5) == pytest.approx(median)


def test_work_is_counted_when_it_is_done_again() -> None:
    durations = iter([3.0, 1.0, 9.0, 2.0])
    ways = {"a": as_in_a_loop(lambda: next(durations))}
    assert take_turns(ways, rounds=2, warm_up=False) == {"a": [1.0, 2.0]}


def test_a_case_survives_its_file() -> None:
    case = Case("work", {OURS: [0.5, 0.25, 1.0], VLLM: [2.0]}, 100)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert case.figure(OURS) == 200
    assert case.ratio(OURS, VLLM) == 4.0
    assert Case("time", {OURS: [0.5]}).figure(OURS) == 500  # milliseconds


def test_shapes_are_read_as_they_are_written() -> None:
    assert Shape.parse("8x128") == Shape(8, 128)
    assert str(Shape(8, 128)) == "8x128"


# --------------------------------------------------------------------------- costs


def test_weights_are_those_of_the_published_model() -> None:
    num_norms = (2 * 30 + 1) * 576
    assert SMOLLM2.num_weights + num_norms == 134_515_008


def test_a_decode_step_is_bound_by_reading_when_alone_and_by_computing_in_company() -> None:
    flops, bytes_s = 1e12, 2e10
    alone = SMOLLM2.decode_step_s(flops, bytes_s, requests=1, position=0)
    assert alone == pytest.approx(2 * SMOLLM2.num_weights / bytes_s)
    many = SMOLLM2.decode_step_s(flops, bytes_s, requests=10_000, position=0)
    assert many == pytest.approx(10_000 * 2 * SMOLLM2.num_weights / flops)


def test_attention_is_counted_product_by_product() -> None:
    """Of each position with itself and all before it: scores and values, every head and layer."""
    costs = Costs(8, 16, 2, 2, 1, 10)
    flops = sum(2 * (2 * 4) * 2 for _layer in range(2) for q in range(5) for k in range(q + 1))
    assert costs.attention_flops(5) == flops


# --------------------------------------------------------------------------- files and tables


def test_a_part_is_stored_beside_the_others(tmp_path: Path) -> None:
    results.store("compare", "one", {"cases": [Case("a", {OURS: [1.0]}, 5)]}, LIMITS, tmp_path)
    results.store("compare", "two", {"x": 1.23456789}, LIMITS, tmp_path)
    stored = results.load("compare", tmp_path)
    assert list(stored) == ["one", "two"]
    assert stored["two"]["x"] == 1.2346
    assert stored["one"]["limits"]["gemm_flops"] == 2e12
    assert results.load("curves", tmp_path) == {}


def test_tables_replace_what_is_between_their_marks() -> None:
    text = "before\n<!-- table: a -->\nold\n<!-- end -->\nafter\n"
    new = tables.filled(text, {"a": "| new |"})
    assert new == "before\n<!-- table: a -->\n| new |\n<!-- end -->\nafter\n"
    assert tables.filled(new, {"a": "| new |"}) == new
    with pytest.raises(KeyError):
        tables.filled(text, {})


def test_the_share_of_a_limit_is_that_of_time_where_less_is_better() -> None:
    part = {
        "x": "prompt",
        "unit": "ms",
        "series": {OURS: [[32, 20.0], [64, 50.0]], VLLM: [[32, 40.0]]},
        "machine": {"limit": "products", "points": [[32, 10.0], [64, 20.0]]},
    }
    rows = tables.curve(part).splitlines()
    assert rows[2:] == ["| 32 | 20 | 40 | 10 | 50 % |", "| 64 | 50 |  | 20 | 40 % |"]


def test_every_comparison_tells_ratios() -> None:
    case = Case("step", {OURS: [1.0], WRITTEN.name: [4.0], TUNED.name: [2.0]}, 1024)
    assert tables.train({"cases": [case.to_json()], "machine": {"step": 2048.0}}).splitlines()[
        2
    ] == ("| step | 1,024 tokens/s | 256 tokens/s | 512 tokens/s | 4.00x | 2.00x | 2,048 | 50 % |")


def test_documents_hold_the_figures_that_are_stored() -> None:
    """Run ``python -m benchmarks.tables`` where this fails."""
    made = tables.made()
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert tables.filled(text, made) == text, document


def test_resident_memory_is_read_in_mib() -> None:
    status = "Name:\tx\nVmHWM:\t  4096 kB\nVmRSS:\t  2048 kB\nThreads:\t1\n"
    assert parse_status(status) == (2.0, 4.0)


# --------------------------------------------------------------------------- children

ECHO = """
from benchmarks.children import serve

def twice(number):
    print("noise on stdout")
    return {"number": 2 * number}

def leave():
    raise SystemExit("gone")

serve(lambda: {"twice": twice, "leave": leave})
"""


def test_a_child_answers_fails_and_ends() -> None:
    with Child("echo", [sys.executable, "-c", ECHO], {}) as child:
        assert child.ask("twice", number=21) == {"number": 42}
        with pytest.raises(ChildFailed, match=r"echo: KeyError: 'thrice'"):
            child.ask("thrice")
        assert child.ask("twice", number=1) == {"number": 2}
        with pytest.raises(ChildFailed, match=r"echo ended:\n(?s:.*)gone"):
            child.ask("leave")


def test_a_child_that_waits_is_stopped() -> None:
    with Child("echo", [sys.executable, "-c", ECHO], {}) as child:
        child.ask("twice", number=1)
        status = Path(f"/proc/{child.pid}/status")
        while "State:\tT (stopped)" not in status.read_text():
            time.sleep(0.001)  # the signal is on its way
        assert child.ask("twice", number=2) == {"number": 4}
