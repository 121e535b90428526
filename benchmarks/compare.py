"""This server beside the baselines, in turn, in one run: ``scripts/bench compare``.

    python -m benchmarks.compare MODEL_DIRECTORY [--only train] [--vllm-python PATH]

Ours go through the official SDK and HTTP to a server process; transformers + PEFT and vLLM run in
processes of their own, without HTTP, stopped while they are not measured. Medians and ratios are
printed, every time is kept in docs/performance/compare.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from benchmarks import baselines as theirs
from benchmarks import service
from benchmarks.baselines import GENERATE, TRIED, TUNED, VLLM, WRITTEN
from benchmarks.memory import memory_of, reset_peak
from benchmarks.run import Bench, Part, Values, parser_of, run_parts
from benchmarks.service import Service
from benchmarks.workload import (
    IN_BACKEND,
    LOW_TENANT_RANKS,
    NEW_TOKENS,
    OURS,
    PROMPT_TOKENS,
    RANK,
    RECOMPUTING,
    RECOMPUTING_ENGINE,
    TENANT_RANKS,
    Case,
    Shape,
    Work,
    as_in_a_loop,
    clocked,
    take_turns,
)
from tests.servers import FAKE_MODEL

CONCURRENCY = (1, 8, 32)
LARGE_SHAPES = (Shape(256, 32), Shape(1, 8192))
LONG_SHAPE = LARGE_SHAPES[-1]
BLOCK_STEPS = 20
"""Smallest steps whose sum is compared with the server's own clocks."""


def turns(bench: Bench, name: str, ways: Mapping[str, Work], num_tokens: int) -> Case:
    looped = {way: as_in_a_loop(work) for way, work in ways.items()}
    options = bench.options
    case = Case(name, take_turns(looped, options.rounds, options.budget), num_tokens)
    bench.console.print(f"[bold]{name}[/]")
    for way in case.seconds:
        ratio = "" if way == OURS else f"  ({OURS} is {case.ratio(OURS, way):.2f}x)"
        bench.console.print(f"  {way:28} {case.shown(way)}{ratio}")
    return case


# --------------------------------------------------------------------------- training


def train(bench: Bench) -> Values:
    cases, limits = [], {}
    for text in bench.options.shapes:
        shape = Shape.parse(text)
        with ExitStack() as stack:
            trainer = bench.service(stack).trainer()
            ways = {OURS: service.training(trainer, shape)}
            for variant in (WRITTEN, TUNED):
                child = stack.enter_context(bench.baselines.peft(variant))
                ways[variant.name] = theirs.training(child, shape)
            name = f"training step, {shape.batch} x {shape.length} tokens"
            cases.append(turns(bench, name, ways, shape.num_tokens))
            flops = bench.limits.gemm_flops
            limits[name] = bench.costs.train_tokens_per_s(flops, shape.length, RANK)
    return {"cases": cases, "rank": RANK, "machine": limits}


def tuning(bench: Bench) -> Values:
    """What was tried to make PEFT fast; one process at a time, for two times as many would not fit
    into memory."""
    shape = Shape(8, 128)
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, Values] = {}
    for variant in TRIED:
        with bench.baselines.peft(variant) as child:
            way = {variant.name: theirs.training(child, shape)}
            seconds |= take_turns(way, bench.options.rounds)
            sizes[variant.name] = memory_of(child.pid)._asdict()
        case = Case("training step, 8 x 128 tokens", seconds, shape.num_tokens)
        bench.console.print(f"{variant.name:32} {case.shown(variant.name)}")
    return {"cases": [case], "sizes": sizes}


def tenants(bench: Bench) -> Values:
    """One tenant with a batch of 8, and 8 tenants with one sequence each (PEFT: in one case)."""
    cases = []
    with ExitStack() as stack:
        ours = bench.service(stack)
        alone = service.training(ours.trainer(), Shape(8, 128))
        one = stack.enter_context(bench.baselines.peft(WRITTEN))
        many = stack.enter_context(bench.baselines.peft(WRITTEN))
        peft = {
            WRITTEN.name: theirs.training(one, Shape(8, 128)),
            f"{WRITTEN.name}, 8 tenants": theirs.tenants(many, TENANT_RANKS, 128),
        }
        for ranks, baseline in ((TENANT_RANKS, peft), (LOW_TENANT_RANKS, {})):
            trainers = [ours.trainer(rank, seed) for seed, rank in enumerate(ranks)]
            together = service.tenants(trainers, 128)
            ways = {
                OURS: alone,
                f"{OURS}, 8 tenants": together,
                IN_BACKEND: ours.in_backend(alone),
                f"{IN_BACKEND}, 8 tenants": ours.in_backend(together),
                **baseline,
            }
            cases.append(turns(bench, f"ranks {ranks[0]} to {ranks[-1]}", ways, 8 * 128))
    return {"cases": cases}


# --------------------------------------------------------------------------- sampling


def sample(bench: Bench) -> Values:
    with ExitStack() as stack:
        samplers = [bench.service(stack).sampler()]
        transformers = stack.enter_context(bench.baselines.peft(WRITTEN))
        vllm = stack.enter_context(bench.baselines.maybe_vllm())
        cases = []
        for requests in CONCURRENCY:
            ways = {OURS: service.sampling(samplers, requests)}
            if vllm is not None:
                ways[VLLM] = theirs.sampling(vllm, requests)
            ways[GENERATE] = theirs.sampling(transformers, requests)
            cases.append(turns(bench, sampling_name(requests), ways, requests * NEW_TOKENS))
    return {"cases": cases, "machine": sampling_limits(bench, cases, with_adapters=False)}


def adapters(bench: Bench) -> Values:
    """A different adapter for each request."""
    num = max(CONCURRENCY)
    with ExitStack() as stack:
        ours = bench.service(stack)
        samplers, plain = ours.adapter_samplers(num), [ours.sampler()]
        vllm = stack.enter_context(bench.baselines.maybe_vllm(num_adapters=num))
        cases = []
        for requests in CONCURRENCY:
            ways = {
                OURS: service.sampling(samplers, requests),
                f"{OURS}, base model": service.sampling(plain, requests),
            }
            if vllm is not None:
                ways[VLLM] = theirs.sampling(vllm, requests)
            name = f"{sampling_name(requests)}, an adapter each"
            cases.append(turns(bench, name, ways, requests * NEW_TOKENS))
    limits = sampling_limits(bench, cases, with_adapters=True)
    return {"cases": cases, "rank": RANK, "machine": limits}


def sampling_limits(bench: Bench, cases: Sequence[Case], with_adapters: bool) -> dict[str, float]:
    """Tokens per second that memory and products allow, of the cases of ``CONCURRENCY``."""
    flops, bytes_s = bench.limits.gemm_flops, bench.limits.weights_bytes_s
    return {
        case.name: bench.costs.sample_tokens_per_s(
            flops, bytes_s, num, PROMPT_TOKENS, NEW_TOKENS, num if with_adapters else 0
        )
        for num, case in zip(CONCURRENCY, cases, strict=True)
    }


def sampling_name(requests: int) -> str:
    return f"sampling, {requests} at once, {PROMPT_TOKENS} + {NEW_TOKENS} tokens"


# --------------------------------------------------------------------------- fixed costs, memory


def fixed(bench: Bench) -> Values:
    """Of forward_backward + optim_step with one token: all of it, the backend's part, and what the
    service adds to that."""
    cases = []
    with ExitStack() as stack:
        fake = stack.enter_context(service.service_of({}, FAKE_MODEL))
        for name, where in (("engine", bench.service(stack)), ("fake backend", fake)):
            step = service.smallest_step(where.trainer(rank=4))
            seconds = fixed_cost(where, step, bench.options.rounds)
            case = Case(f"forward_backward + optim_step of one token, {name}", seconds)
            cases.append(case)
            for way in seconds:
                bench.console.print(f"{case.name}: {way} {case.shown(way)}")
    return {"cases": cases}


def fixed_cost(where: Service, step: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step: as the client sees it, in the backend, and the difference."""
    seconds: dict[str, list[float]] = {"client": [], "backend": [], "service": []}
    client = 0.0

    def steps() -> None:
        nonlocal client
        start = time.perf_counter()
        for _ in range(BLOCK_STEPS):
            step()
        client = (time.perf_counter() - start) / BLOCK_STEPS

    for number in range(rounds + 1):
        backend = where.in_backend(clocked(steps))() / BLOCK_STEPS
        if number:
            for key, value in zip(seconds, (client, backend, client - backend), strict=True):
                seconds[key].append(value)
    return seconds


def memory(bench: Bench) -> Values:
    """After steps of 8x128 tokens, of a server that has done nothing else; then of larger ones."""
    shape, steps = Shape(8, 128), bench.options.memory_steps
    sizes: dict[str, Values] = {}
    with ExitStack() as stack:
        ours = bench.service(stack)
        idle_mib = memory_of(ours.engine_pid).steady_mib
        trainer = ours.trainer()
        work = service.training(trainer, shape)
        for _ in range(steps):
            work()
        for name, pid in (("engine", ours.engine_pid), ("API", ours.api_pid)):
            sizes[f"{OURS}, {name}"] = memory_of(pid)._asdict()
        sizes[f"{OURS}, engine"]["idle_mib"] = idle_mib
        for large in LARGE_SHAPES:
            reset_peak(ours.engine_pid)
            for _ in range(2):
                service.training(trainer, large)()
            sizes[f"{OURS}, engine, {large} tokens"] = memory_of(ours.engine_pid)._asdict()
    with ExitStack() as stack:
        ours = bench.service(stack, **RECOMPUTING_ENGINE)
        work = service.training(ours.trainer(), LONG_SHAPE)
        for _ in range(2):
            work()
        sizes[f"{RECOMPUTING}, engine, {LONG_SHAPE} tokens"] = memory_of(ours.engine_pid)._asdict()
    for variant in (WRITTEN, TUNED):
        with bench.baselines.peft(variant) as child:
            for _ in range(steps):
                child.ask("train", shape=str(shape))
            sizes[variant.name] = memory_of(child.pid)._asdict()
    for name, size in sizes.items():
        shown = ", ".join(f"{key[:-4]} {value:,.0f} MiB" for key, value in size.items())
        bench.console.print(f"{name}: {shown}")
    return {"sizes": sizes, "steps": steps, "shape": str(shape)}


PARTS: Mapping[str, Part] = {
    "train": train,
    "tuning": tuning,
    "tenants": tenants,
    "sample": sample,
    "adapters": adapters,
    "fixed": fixed,
    "memory": memory,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="*", default=["8x128"])
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument(
        "--budget", type=float, default=90.0, help="seconds after which no further round begins"
    )
    parser.add_argument("--memory-steps", type=int, default=20)
    run_parts("compare", PARTS, parser.parse_args())


if __name__ == "__main__":
    main()
