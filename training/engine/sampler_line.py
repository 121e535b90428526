"""Who runs next: turns between tenants, then between the snapshots that a tenant samples from, then
between the requests for one.

Next is always the one that has fewest sequences running; of those that have nothing running, the
one that has waited longest. So neither a request of 500 samples, nor a snapshot with 500 requests,
nor a tenant with as many snapshots shuts another out, and everybody's turn comes: who has had one
stands behind all who wait.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from training.engine.sampler_state import Group, Job, Sequence, Tenant
from training.engine.turns import Turns


class WaitingLine:
    """Sequences that wait to run for the first time, or again after they had to give way.

    While the first sequence of a request passes over the prompt, the others are not offered: they
    will share its blocks. A tenant with ``max_deferred`` requests that wait for prompts of others
    is not offered.
    """

    def __init__(self, max_deferred: int) -> None:
        self._max_deferred = max_deferred
        self._tenants: WeakValueDictionary[str, Tenant] = WeakValueDictionary()
        self._groups: WeakValueDictionary[tuple[str, int], Group] = WeakValueDictionary()
        self._turns: Turns[Tenant] = Turns()
        self._deferred: list[Job] = []

    def group(self, tenant: str, version: int) -> Group:
        owner = self._tenants.setdefault(tenant, Tenant())
        return self._groups.setdefault((tenant, version), Group(owner, version))

    def next(self) -> Sequence | None:
        """Whose turn it is. It stays where it is until ``start``, ``defer`` or ``remove``."""
        return self._turns.next().groups.next().jobs.next().waiting[0] if self._turns else None

    def add(self, job: Job) -> None:
        self._place(job)

    def start(self, sequence: Sequence) -> None:
        """It runs."""
        job = sequence.job
        job.waiting.remove(sequence)
        self._count(job, 1)
        group, tenant = job.group, job.group.tenant
        group.jobs.had_turn(job)
        tenant.groups.had_turn(group)
        self._turns.had_turn(tenant)

    def end(self, sequence: Sequence) -> None:
        """It runs no more and does not wait."""
        self._count(sequence.job, -1)

    def give_way(self, sequence: Sequence) -> None:
        """It runs no more and waits at the head of its request, which waits at the head of its
        snapshot's, and so on."""
        sequence.job.waiting.appendleft(sequence)
        self._count(sequence.job, -1, first=True)

    def prefilled(self, job: Job) -> None:
        """The other sequences of the request may start."""
        self._place(job)

    def remove(self, job: Job) -> None:
        """Nothing of it waits any more."""
        job.waiting.clear()
        self._place(job)

    def defer(self, job: Job) -> None:
        """It is not offered until ``recall``."""
        job.is_deferred = True
        job.group.tenant.num_deferred += 1
        self._deferred.append(job)
        self._place(job)

    def recall(self) -> None:
        deferred, self._deferred = self._deferred, []
        for job in reversed(deferred):
            job.is_deferred = False
            job.group.tenant.num_deferred -= 1
            self._place(job, first=True)

    def _count(self, job: Job, change: int, first: bool = False) -> None:
        job.num_running += change
        job.group.num_running += change
        job.group.tenant.num_running += change
        self._place(job, first)

    def _place(self, job: Job, first: bool = False) -> None:
        group, tenant = job.group, job.group.tenant
        waits = bool(job.waiting) and not job.is_deferred
        waits = waits and (job.is_prefilled or job.num_running == 0)
        group.jobs.place(job, waits, first)
        tenant.groups.place(group, bool(group.jobs), first)
        offered = bool(tenant.groups) and tenant.num_deferred < self._max_deferred
        self._turns.place(tenant, offered, first)
