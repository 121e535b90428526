"""Who runs next and who gives way, seen from outside: steps until a request ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.sampler_cases import (
    CPU,
    ask,
    make_adapter,
    make_model_directory,
    make_sampler,
    random_prompt,
    sample_one,
)
from tests.engine.test_sampler import assert_same
from training.backends.base import LoraSpec, SampleRequest, SampleResult
from training.engine.model import Transformer
from training.engine.sampler import Sampler


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model_directory(tmp_path_factory.mktemp("model"))
    model = Transformer.from_directory(path, CPU, torch.float32)
    for seed, name in enumerate("ab"):
        make_adapter(model, path / name, LoraSpec(rank=4, seed=seed))
    return path


def open_sampler(directory: Path, **limits: Any) -> Sampler:
    sampler = make_sampler(directory, **limits)
    for name in "ab":
        sampler.publish(name, directory / name)
    return sampler


def short(
    name: str, snapshot: str | None = None, num_tokens: int = 8, tenant: str = ""
) -> SampleRequest:
    return ask(
        random_prompt(10, seed=sum(name.encode())),
        name,
        snapshot_id=snapshot,
        max_tokens=num_tokens,
        tenant=tenant,
    )


def crowd(name: str, snapshot: str | None = None, num_samples: int = 60) -> SampleRequest:
    prompt = random_prompt(40, seed=sum(name.encode()))
    return ask(prompt, name, snapshot_id=snapshot, num_samples=num_samples, max_tokens=60)


def steps_until(sampler: Sampler, name: str) -> int:
    for step in range(1, 100_000):
        if name in dict(sampler.step()):
            return step
        sampler.check_integrity()
    raise AssertionError("never ended")


@pytest.mark.parametrize("snapshot", [None, "a"], ids=["same snapshot", "another snapshot"])
def test_a_request_of_many_samples_shuts_nobody_out(directory: Path, snapshot: str | None) -> None:
    """The newcomer's one sample takes the place of the youngest of the crowd at once, though all
    places are taken."""
    sampler = open_sampler(directory, max_running_sequences=8)
    sampler.submit(crowd("crowd"))
    for _ in range(10):
        sampler.step()
    assert sampler.num_running == 8
    sampler.submit(short("newcomer", snapshot))
    assert steps_until(sampler, "newcomer") <= 10


def test_many_requests_of_one_snapshot_shut_no_other_out(directory: Path) -> None:
    sampler = open_sampler(directory, max_running_sequences=8)
    for index in range(40):
        sampler.submit(ask(random_prompt(20, seed=index), f"r{index}", max_tokens=50))
    for _ in range(5):
        sampler.step()
    sampler.submit(short("other", "a"))
    assert steps_until(sampler, "other") <= 10


def test_snapshots_run_equally_many(directory: Path) -> None:
    """Four requests of one and one of the other: their samples take turns."""
    sampler = open_sampler(directory, max_running_sequences=8, prefill_chunk_tokens=1000)
    for index in range(4):
        sampler.submit(crowd(f"a{index}", "a"))
    sampler.submit(crowd("b", "b"))
    for _ in range(4):
        sampler.step()
    running = [sequence.job.request.request_id for sequence in sampler._running]
    assert sorted(running) == ["a0", "a1", "a2", "a3", "b", "b", "b", "b"]


def test_a_full_cache_shuts_nobody_out(directory: Path) -> None:
    """The crowd holds every block; the newcomer gets its share of them."""
    sampler = open_sampler(directory, kv_cache_tokens=20 * 32, max_running_sequences=60)
    sampler.submit(crowd("crowd"))
    for _ in range(10):
        sampler.step()
    num_running = sampler.num_running
    sampler.submit(short("newcomer", "a"))
    assert steps_until(sampler, "newcomer") <= 10
    assert num_running > 5


def test_who_never_has_to_give_way_to_the_younger(directory: Path) -> None:
    """The oldest of all runs from beginning to end whatever comes after it."""
    sampler = open_sampler(directory, kv_cache_tokens=8 * 32, max_running_sequences=8)
    sampler.submit(short("oldest", num_tokens=100))
    for index in range(12):
        sampler.submit(short(f"r{index}", (None, "a", "b")[index % 3], num_tokens=100))
    steps = steps_until(sampler, "oldest")
    assert sampler.num_given_way > 0
    assert steps == 100


def test_a_long_prompt_is_not_overtaken_for_ever(directory: Path) -> None:
    """It needs more than half of the cache while short requests keep coming."""
    sampler = open_sampler(directory, kv_cache_tokens=16 * 32, max_running_sequences=8)
    for index in range(8):
        sampler.submit(short(f"first{index}", num_tokens=40))
    sampler.step()
    sampler.submit(ask(random_prompt(300), "long", max_tokens=5))
    for index in range(400):
        sampler.submit(short(f"later{index}", num_tokens=40))
        if "long" in dict(sampler.step()):
            break
    else:
        raise AssertionError("the long prompt was shut out")


def test_a_short_prompt_does_not_wait_for_a_long_one(directory: Path) -> None:
    sampler = open_sampler(directory, prefill_chunk_tokens=32)
    sampler.submit(ask(random_prompt(1500), "long", max_tokens=2))
    sampler.step()
    sampler.submit(short("short", "a", num_tokens=4))
    assert steps_until(sampler, "short") <= 6
    assert steps_until(sampler, "long") <= 50


def test_requests_of_one_prompt_compute_it_once(directory: Path) -> None:
    """All but the first wait for its blocks, also when they are requests of their own."""
    sampler = open_sampler(directory, prefill_chunk_tokens=50)
    prompt = random_prompt(200)
    for index in range(6):
        sampler.submit(ask(prompt, f"r{index}", snapshot_id="a", seed=index, max_tokens=10))
    sampler.submit(short("other"))
    hits: dict[str, int] = {}
    while sampler.has_work:
        for name, result in sampler.step():
            assert isinstance(result, SampleResult)
            hits[name] = result.prompt_cache_hit_tokens
        sampler.check_integrity()
    assert hits.pop("r0") == 0
    assert hits.pop("other") == 0
    assert set(hits.values()) == {199}


def test_who_waits_for_a_prompt_goes_on_when_that_is_cancelled(directory: Path) -> None:
    sampler = open_sampler(directory, prefill_chunk_tokens=16)
    prompt = random_prompt(200)
    for name in ("first", "second"):
        sampler.submit(ask(prompt, name, max_tokens=3))
    sampler.step()
    assert (sampler.num_running, sampler.num_waiting) == (1, 1)
    sampler.cancel("first")
    assert steps_until(sampler, "second") <= 20


# --------------------------------------------------------------------------- tenants


def submit_many(sampler: Sampler, tenant: str, num: int, snapshot: str | None = None) -> None:
    for index in range(num):
        request = ask(random_prompt(20, seed=index), f"{tenant}{index}", max_tokens=50)
        sampler.submit(replace(request, tenant=tenant, snapshot_id=snapshot))


def running_of(sampler: Sampler) -> Counter[str]:
    return Counter(sequence.job.request.tenant for sequence in sampler._running)


@pytest.mark.parametrize("snapshot", [None, "a"], ids=["base model", "one snapshot"])
def test_a_tenant_of_a_thousand_requests_shuts_nobody_out(
    directory: Path, snapshot: str | None
) -> None:
    """The other's sample, of the same weights, takes the place of one of the many at once."""
    sampler = open_sampler(directory, max_running_sequences=8)
    submit_many(sampler, "many", 1000, snapshot)
    for _ in range(5):
        sampler.step()
    assert running_of(sampler) == {"many": 8}
    sampler.submit(short("only", snapshot, tenant="few"))
    sampler.step()
    assert running_of(sampler) == {"many": 7, "few": 1}
    assert steps_until(sampler, "only") <= 9


def test_tenants_run_equally_many_whatever_they_sample_from(directory: Path) -> None:
    """A single request of many samples has taken all places; then come many requests for one
    snapshot and many for three. When the first samples end, all have their share."""
    sampler = open_sampler(directory, max_running_sequences=9, prefill_chunk_tokens=1000)
    sampler.submit(replace(crowd("crowd"), tenant="samples"))
    for _ in range(3):
        sampler.step()
    assert running_of(sampler) == {"samples": 9}
    submit_many(sampler, "single", 10, "a")
    for snapshot in ("a", "b", None):
        for index in range(10):
            name = f"s{index}-{snapshot}"
            request = ask(random_prompt(20, seed=index), name, max_tokens=50)
            sampler.submit(replace(request, tenant="several", snapshot_id=snapshot))
    sampler.step()
    assert running_of(sampler) == {"samples": 7, "single": 1, "several": 1}
    for _ in range(66):
        sampler.step()
    assert running_of(sampler) == {"samples": 3, "single": 3, "several": 3}
    mine = [each for each in sampler._running if each.job.request.tenant == "several"]
    assert {each.job.request.snapshot_id for each in mine} == {"a", "b", None}


def test_who_gives_way_is_of_the_tenant_with_most(directory: Path) -> None:
    """A cache too small for all: the one sequence of a tenant never pays for the many's, though
    each of those is the only one of its request."""
    sampler = open_sampler(directory, kv_cache_tokens=8 * 32, max_running_sequences=8)
    submit_many(sampler, "many", 30)
    sampler.step()
    sampler.submit(short("only", num_tokens=100, tenant="few"))
    sampler.step()
    num_given_way = sampler.num_given_way
    assert steps_until(sampler, "only") <= 100
    assert sampler.num_given_way > num_given_way


def test_a_prompt_that_many_wait_for_holds_up_no_other_tenant(directory: Path) -> None:
    """More requests wait for one long prompt than there are places."""
    sampler = open_sampler(directory, max_running_sequences=4, prefill_chunk_tokens=16)
    prompt = random_prompt(400)
    for index in range(20):
        sampler.submit(replace(ask(prompt, f"r{index}", seed=index), tenant="many"))
    sampler.step()
    assert sampler.num_running == 1
    for name in ("one", "two"):  # the second has as many running as the many have
        sampler.submit(short(name, tenant="few"))
    sampler.step()
    assert running_of(sampler) == {"many": 1, "few": 2}


def test_results_do_not_depend_on_the_tenant(directory: Path) -> None:
    requests = [crowd("crowd", num_samples=3), short("short", "a")]
    alone = [sample_one(open_sampler(directory), request) for request in requests]
    sampler = open_sampler(directory, kv_cache_tokens=12 * 32, max_running_sequences=3)
    submit_many(sampler, "many", 20)
    owned = [replace(request, tenant=request.request_id) for request in requests]
    for request in owned:
        sampler.submit(request)
    ended: dict[str, SampleResult | Exception] = {}
    while not {request.request_id for request in owned} <= set(ended):
        ended |= dict(sampler.step())
    for request, expected in zip(owned, alone, strict=True):
        result = ended[request.request_id]
        assert isinstance(result, SampleResult)
        assert_same(result, expected, 1e-4)
