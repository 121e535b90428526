"""Curves of training: tokens per second and memory against batch, length, tenants and rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from benchmarks import baselines as theirs
from benchmarks import service
from benchmarks.baselines import WRITTEN, tuned
from benchmarks.curve import Curve, settled_s
from benchmarks.memory import memory_of, reset_peak
from benchmarks.run import Bench, Values
from benchmarks.workload import OURS, RANK, RECOMPUTING, RECOMPUTING_ENGINE, Shape

DOUBLING = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
TENANT_RANKS = (4, 8, 16, 32)
"""Tenants get them in turn: 15 on average. """
LONE_RANK = 16
LONG = 2048
"""More than a micro-batch."""
LENGTH_TOKENS = 2048
"""Of the batches of different lengths, but for sequences that are longer."""
LIMIT = "bfloat16"
THEIR_BATCHES = (1, 8, 16)
THEIR_LENGTHS = (128, 512, 2048)
THEIR_RANKS = (1, 32, 128)
THEIR_TENANTS = (1, 8)


def batch(bench: Bench) -> Values:
    points = {size: Shape(size, 128) for size in bench.some(DOUBLING)}
    curve = speeds(bench, "sequences of 128 tokens", points, THEIR_BATCHES)
    limit = bench.costs.train_tokens_per_s(bench.limits.gemm_flops, 128, RANK)
    return curve.values([(x, limit) for x in points], LIMIT)


def length(bench: Bench) -> Values:
    points = {
        length: Shape(max(1, LENGTH_TOKENS // length), length) for length in bench.some(LENGTHS)
    }
    curve = speeds(bench, "tokens of a sequence", points, THEIR_LENGTHS, recomputing_from=LONG)
    flops = bench.limits.gemm_flops
    limits = [(x, bench.costs.train_tokens_per_s(flops, x, RANK)) for x in points]
    return curve.values(limits, LIMIT)


def speeds(
    bench: Bench,
    x_name: str,
    points: Mapping[int, Shape],
    theirs_at: Sequence[int],
    recomputing_from: float = math.inf,
) -> Curve:
    curve = Curve(x_name, "tokens/s", bench.console)
    with ExitStack() as stack:
        trainer = bench.service(stack).trainer()
        if recomputing_from < math.inf:
            recomputing = bench.service(stack, **RECOMPUTING_ENGINE).trainer()
        for x, shape in points.items():
            seconds = settled_s(service.training(trainer, shape))
            curve.add(OURS, x, shape.num_tokens / seconds)
            if x >= recomputing_from:
                seconds = settled_s(service.training(recomputing, shape))
                curve.add(RECOMPUTING, x, shape.num_tokens / seconds)
            if x in theirs_at:
                add_theirs(curve, bench, x, shape)
    return curve


def add_theirs(curve: Curve, bench: Bench, x: int, shape: Shape, rank: int = RANK) -> None:
    """Each has a process of its own for each point: what its allocator keeps of one could else
    leave no memory for the next."""
    for variant in (WRITTEN, tuned(shape.length)):
        with bench.baselines.peft(variant) as child:
            seconds = settled_s(theirs.training(child, shape, rank))
        curve.add(variant.name, x, shape.num_tokens / seconds)


def tenants(bench: Bench) -> Values:
    """One sequence of 128 tokens for each tenant, beside one tenant with as many."""
    points = bench.some(DOUBLING)
    curve = Curve("tenants, 128 tokens each", "tokens/s", bench.console)
    with ExitStack() as stack:
        ours = bench.service(stack)
        ranks = [TENANT_RANKS[seed % len(TENANT_RANKS)] for seed in range(max(points))]
        trainers = [ours.trainer(each, seed) for seed, each in enumerate(ranks)]
        lone = ours.trainer(LONE_RANK)
        child = stack.enter_context(bench.baselines.peft(WRITTEN))
        for num in points:
            seconds = settled_s(service.tenants(trainers[:num], 128))
            curve.add(OURS, num, num * 128 / seconds)
            seconds = settled_s(service.training(lone, Shape(num, 128)))
            curve.add(f"{OURS}, one tenant", num, num * 128 / seconds)
            if num in THEIR_TENANTS:
                seconds = settled_s(theirs.tenants(child, ranks[:num], 128))
                curve.add("PEFT, one after another", num, num * 128 / seconds)
    mean_rank = sum(TENANT_RANKS) // len(TENANT_RANKS)
    limit = bench.costs.train_tokens_per_s(bench.limits.gemm_flops, 128, mean_rank)
    return curve.values([(x, limit) for x in points], LIMIT)


def rank(bench: Bench) -> Values:
    shape, points = Shape(8, 128), bench.some(RANKS)
    curve = Curve("rank, 8 x 128 tokens", "tokens/s", bench.console)
    with ExitStack() as stack:
        ours = bench.service(stack)
        for x in points:
            seconds = settled_s(service.training(ours.trainer(x), shape))
            curve.add(OURS, x, shape.num_tokens / seconds)
            if x in THEIR_RANKS:
                add_theirs(curve, bench, x, shape, rank=x)
    flops = bench.limits.gemm_flops
    return curve.values([(x, bench.costs.train_tokens_per_s(flops, 128, x)) for x in points], LIMIT)


# --------------------------------------------------------------------------- memory


def memory_batch(bench: Bench) -> Values:
    points = {size: Shape(size, 256) for size in bench.some((1, 4, 8, 16, 32))}
    return memory(bench, "sequences of 256 tokens", points, (1, 4, 16)).values()


def memory_length(bench: Bench) -> Values:
    points = {length: Shape(1, length) for length in bench.some(LENGTHS)}
    return memory(bench, "tokens of one sequence", points, (128, 1024, 4096)).values()


def memory(
    bench: Bench, x_name: str, points: Mapping[int, Shape], theirs_at: Sequence[int]
) -> Curve:
    """The most that is resident during two steps. Points ascend: what an allocator keeps from an
    earlier one is no more than the next one needs."""
    curve = Curve(x_name, "MiB", bench.console)
    with ExitStack() as stack:
        servers = {
            OURS: bench.service(stack),
            RECOMPUTING: bench.service(stack, **RECOMPUTING_ENGINE),
        }
        trainers = {name: server.trainer() for name, server in servers.items()}
        child = stack.enter_context(bench.baselines.peft(WRITTEN))
        for x, shape in points.items():
            ways = {
                name: (server.engine_pid, service.training(trainers[name], shape))
                for name, server in servers.items()
                if name is OURS or shape.length >= LONG
            }
            if x in theirs_at:
                ways[WRITTEN.name] = (child.pid, theirs.training(child, shape))
            for way, (pid, work) in ways.items():
                reset_peak(pid)
                work()
                work()
                curve.add(way, x, memory_of(pid).peak_mib)
    return curve
