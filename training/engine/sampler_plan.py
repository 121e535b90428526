"""Which rows one sampler step computes, and who gives way: pure functions of the running
sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from training.engine.sampler_state import Sequence, Tenant


class Work(NamedTuple):
    """The next ``num_rows`` rows of a sequence."""

    sequence: Sequence
    num_rows: int


def plan_step(running: Iterable[Sequence], prefill_rows: int) -> list[Work]:
    """Every sequence that misses one row gets it: decoding never waits for a prompt. The others
    share ``prefill_rows``: the oldest may take half of them, so that it cannot starve. Tenants have
    equal shares, that half included; each tenant's goes to those that miss fewest, so that a short
    prompt does not wait for a long one.

    The result is packed for the model: sequences of one adapter side by side.
    """
    works: list[Work] = []
    prompts: list[Sequence] = []
    for sequence in running:
        num_missing = sequence.num_wanted - sequence.num_computed
        if num_missing == 1:
            works.append(Work(sequence, 1))
        elif num_missing > 1:
            prompts.append(sequence)
    if prompts:
        works += _share_prefill(prompts, prefill_rows)
    works.sort(key=_packing)
    return works


def _share_prefill(prompts: SequenceOf[Sequence], num_rows: int) -> list[Work]:
    oldest = min(prompts, key=lambda each: each.order)
    reserved = min(oldest.num_missing, -(-num_rows // 2))
    left = _tenant_shares(prompts, num_rows, oldest.tenant, reserved)
    left[oldest.tenant] -= reserved
    works: list[Work] = []
    for sequence in sorted(prompts, key=lambda each: (each.num_missing, each.order)):
        share = reserved if sequence is oldest else 0
        more = min(sequence.num_missing - share, left[sequence.tenant])
        left[sequence.tenant] -= more
        if share + more:
            works.append(Work(sequence, share + more))
    return works


def _tenant_shares(
    prompts: SequenceOf[Sequence], num_rows: int, first: Tenant, reserved: int
) -> dict[Tenant, int]:
    """Rows of each tenant; ``first`` has no fewer than ``reserved``."""
    missing: Counter[Tenant] = Counter()
    for sequence in prompts:
        missing[sequence.tenant] += sequence.num_missing
    shares = _even_shares(missing, num_rows)
    if shares[first] < reserved:
        del missing[first]
        shares = {first: reserved} | _even_shares(missing, num_rows - reserved)
    return shares


def _even_shares(wanted: Mapping[Tenant, int], num_rows: int) -> dict[Tenant, int]:
    """Equal ones; what somebody does not want goes to the others."""
    shares = {}
    for num_before, tenant in enumerate(sorted(wanted, key=lambda each: wanted[each])):
        share = min(wanted[tenant], num_rows // (len(wanted) - num_before))
        shares[tenant] = share
        num_rows -= share
    return shares


def _packing(work: Work) -> tuple[int, bool, tuple[int, int]]:
    return (work.sequence.version, work.num_rows > 1, work.sequence.order)


def choose_victim(running: Iterable[Sequence]) -> Sequence:
    """Who gives its blocks back when there are none left: the youngest sequence of the request
    with most running, of the snapshot with most, of the tenant with most. The oldest sequence of
    all is chosen only when it is alone, and alone it fits."""
    return max(running, key=_weight)


def choose_yielder(running: Iterable[Sequence], waiting: Sequence) -> Sequence | None:
    """Who makes room for ``waiting`` although it could go on: where a tenant has nothing running, a
    sequence of one that has several; else where a snapshot has nothing running, one of a snapshot
    of the same tenant that has several; else the same of requests of one snapshot. Later turns
    even out the rest."""
    job, group, tenant = waiting.job, waiting.group, waiting.tenant
    if tenant.num_running == 0:
        eligible = [each for each in running if each.tenant.num_running > 1]
    elif group.num_running == 0:
        mine = [each for each in running if each.tenant is tenant]
        eligible = [each for each in mine if each.group.num_running > 1]
    elif job.num_running == 0:
        eligible = [each for each in running if each.group is group and each.job.num_running > 1]
    else:
        return None
    return max(eligible, key=_weight, default=None)


def _weight(sequence: Sequence) -> tuple[int, int, int, tuple[int, int]]:
    return (
        sequence.tenant.num_running,
        sequence.group.num_running,
        sequence.job.num_running,
        sequence.order,
    )
