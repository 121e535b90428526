"""Which rows a step computes and who gives way: the planner alone, without a model."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.sampler_cases import ask, random_prompt
from training.engine.prompt_scores import PromptScores
from training.engine.sampler_plan import choose_victim, choose_yielder, plan_step
from training.engine.sampler_state import Group, Job, Sequence, Tenant
from training.engine.torch_vocabulary import TorchVocabulary


def running(group: Group, order: int, missing: SequenceOf[int]) -> list[Sequence]:
    """Sequences of one request, each with so many rows to compute."""
    request = ask(random_prompt(max(missing)), f"r{order}", num_samples=len(missing))
    job = Job(request, order, None, group, 10, PromptScores(request, TorchVocabulary()))
    job.sequences = [Sequence(job, index, None) for index in range(len(missing))]
    for sequence, num in zip(job.sequences, missing, strict=True):
        sequence.num_computed = sequence.num_wanted - num
        sequence.is_running = True
    job.num_running = len(missing)
    group.num_running += len(missing)
    group.tenant.num_running += len(missing)
    return job.sequences


@given(
    missing=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    budget=st.integers(1, 200),
    num_tenants=st.integers(1, 12),
)
def test_every_step_decodes_all_and_fills_the_budget(
    missing: list[int], budget: int, num_tenants: int
) -> None:
    tenants = [Tenant() for _ in range(num_tenants)]
    sequences = [
        running(Group(tenants[order % num_tenants], order % 3), order, [num])[0]
        for order, num in enumerate(missing)
    ]
    works = plan_step(sequences, budget)
    rows = {work.sequence.order[0]: work.num_rows for work in works}
    assert all(0 < rows[order] <= missing[order] for order in rows)
    assert all(rows[order] == 1 for order, num in enumerate(missing) if num == 1)
    prompts = [order for order, num in enumerate(missing) if num > 1]
    wanted = sum(missing[order] for order in prompts)
    assert sum(rows.get(order, 0) for order in prompts) == min(budget, wanted)
    if prompts:
        assert rows[prompts[0]] >= min(missing[prompts[0]], -(-budget // 2))
    got = dict.fromkeys(tenants, 0)
    for order in prompts:
        got[tenants[order % num_tenants]] += rows.get(order, 0)
    short_of_rows = {
        tenants[order % num_tenants] for order in prompts if rows.get(order, 0) < missing[order]
    }
    for tenant, num in got.items():
        if prompts and tenant is not sequences[prompts[0]].tenant:
            assert all(got[other] + 1 >= num for other in short_of_rows), "nobody has more"
    versions = [work.sequence.version for work in works]
    assert versions == sorted(versions)


@pytest.mark.parametrize(
    ("missing", "rows"),
    [
        ((100,), {0: 64}),
        ((100, 100), {0: 64}),
        ((100, 10, 50), {0: 32, 1: 10, 2: 22}),
        ((10, 100), {0: 10, 1: 54}),
        ((100, 1, 8), {0: 56, 1: 1, 2: 8}),
    ],
)
def test_half_for_the_oldest_the_rest_for_the_shortest(
    missing: tuple[int, ...], rows: dict[int, int]
) -> None:
    group = Group(Tenant(), 0)
    sequences = [running(group, order, [num])[0] for order, num in enumerate(missing)]
    works = plan_step(sequences, 64)
    assert {work.sequence.order[0]: work.num_rows for work in works} == rows


@pytest.mark.parametrize(
    ("missing", "rows"),
    [
        (("a100", "b100"), {0: 32, 1: 32}),
        (("a100", "b100", "c100"), {0: 32, 1: 16, 2: 16}),
        (("a100", "b10", "c100"), {0: 32, 1: 10, 2: 22}),
        (("a8", "a8", "a8", "a100", "b100"), {0: 8, 1: 8, 2: 8, 3: 8, 4: 32}),
        (("a100", "b9", "b9", "b9", "b9", "c30"), {0: 32, 1: 9, 2: 7, 5: 16}),
        (("a100", "b1", "b1", "b40"), {0: 32, 1: 1, 2: 1, 3: 32}),
    ],
)
def test_tenants_share_the_rows_of_prompts_equally(
    missing: tuple[str, ...], rows: dict[int, int]
) -> None:
    """However many prompts each has, and however short they are."""
    groups = {tenant: Group(Tenant(), 0) for tenant in "abc"}
    sequences = [
        running(groups[each[0]], order, [int(each[1:])])[0] for order, each in enumerate(missing)
    ]
    works = plan_step(sequences, 64)
    assert {work.sequence.order[0]: work.num_rows for work in works} == rows


def test_nothing_runs_nothing_is_planned() -> None:
    assert plan_step([], 64) == []


def groups_of_one_tenant(num: int) -> list[Group]:
    tenant = Tenant()
    return [Group(tenant, version) for version in range(num)]


def groups_of_as_many_tenants(num: int) -> list[Group]:
    """Of the same weights."""
    return [Group(Tenant(), 0) for _ in range(num)]


def waiting(group: Group, order: int) -> Sequence:
    (sequence,) = running(group, order, [5])
    sequence.job.num_running -= 1
    group.num_running -= 1
    group.tenant.num_running -= 1
    return sequence


LAYOUTS = pytest.mark.parametrize("groups_of", [groups_of_one_tenant, groups_of_as_many_tenants])
GroupsOf = Callable[[int], list[Group]]


@LAYOUTS
def test_the_youngest_of_the_most_gives_its_blocks(groups_of: GroupsOf) -> None:
    small, big = groups_of(2)
    alone = running(small, 9, [1])
    pair, crowd = running(big, 5, [1, 1]), running(big, 3, [1, 1, 1])
    assert choose_victim(alone + pair + crowd) is crowd[2]
    one, other = groups_of(2)
    oldest, younger = running(one, 0, [1]), running(other, 1, [1])
    assert choose_victim(oldest + younger) is younger[0]
    assert choose_victim(oldest) is oldest[0]


@LAYOUTS
def test_only_who_has_several_makes_room_and_only_for_who_has_none(groups_of: GroupsOf) -> None:
    mine, other, third = groups_of(3)
    crowd = running(other, 0, [1, 1, 1])
    single = running(mine, 1, [1])
    assert choose_yielder(crowd + single, waiting(third, 2)) is crowd[2]
    assert choose_yielder(single, waiting(third, 2)) is None
    assert choose_yielder(crowd + single, waiting(other, 3)) is crowd[2]
    assert choose_yielder(crowd + single, waiting(mine, 4)) is None


def test_tenants_count_before_snapshots_and_requests() -> None:
    """Many snapshots with one sequence each weigh what they weigh together; who has something
    running takes nothing from another tenant."""
    many, few = groups_of_one_tenant(4), groups_of_one_tenant(2)
    singles = [running(group, 10 + order, [1])[0] for order, group in enumerate(many[:3])]
    pair = running(few[0], 0, [1, 1])
    assert choose_victim(singles + pair) is singles[2]
    assert choose_yielder(singles + pair, waiting(Group(Tenant(), 0), 20)) is singles[2]
    assert choose_yielder(singles + pair, waiting(few[1], 20)) is pair[1]
    assert choose_yielder(singles + pair, waiting(many[3], 20)) is None
