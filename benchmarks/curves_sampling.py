"""Curves of sampling: tokens per second, time to the first token, latency beside training."""

from __future__ import annotations

import statistics
import threading
from contextlib import ExitStack

from benchmarks import baselines as theirs
from benchmarks import service
from benchmarks.baselines import VLLM
from benchmarks.curve import Curve, settled_s
from benchmarks.run import Bench, Values
from benchmarks.workload import NEW_TOKENS, OURS, PROMPT_TOKENS, Shape

REQUESTS = (1, 2, 4, 8, 16, 32, 64)
NUM_ADAPTERS = 32
PROMPTS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8000)
THEIR_PROMPTS = (32, 128, 512, 2048, 8000)
CONTEXT_LENGTH = 8192
NUM_LATENCIES = 20
SAMPLE_TOKENS = 16


def concurrency(bench: Bench) -> Values:
    """Of the base model, and with one of 32 adapters for each request."""
    points = bench.some(REQUESTS)
    curve = Curve("requests at once", "tokens/s", bench.console)
    with ExitStack() as stack:
        ours = bench.service(stack)
        samplers = {
            OURS: [ours.sampler()],
            f"{OURS}, {NUM_ADAPTERS} adapters": ours.adapter_samplers(NUM_ADAPTERS),
        }
        vllm = stack.enter_context(bench.baselines.maybe_vllm())
        for num in points:
            ways = {way: service.sampling(each, num) for way, each in samplers.items()}
            if vllm is not None:
                ways[VLLM] = theirs.sampling(vllm, num)
            for way, work in ways.items():
                curve.add(way, num, num * NEW_TOKENS / settled_s(work))
    flops, bytes_s = bench.limits.gemm_flops, bench.limits.weights_bytes_s
    limits = [
        (num, bench.costs.sample_tokens_per_s(flops, bytes_s, num, PROMPT_TOKENS, NEW_TOKENS))
        for num in points
    ]
    return curve.values(limits, "memory, bfloat16")


def first_token(bench: Bench) -> Values:
    """A request alone, for one token."""
    points = bench.some(PROMPTS)
    curve = Curve("tokens of the prompt", "ms", bench.console)
    with ExitStack() as stack:
        samplers = [bench.service(stack).sampler()]
        vllm = stack.enter_context(bench.baselines.maybe_vllm(context_length=CONTEXT_LENGTH))
        for num in points:
            ways = {OURS: service.sampling(samplers, 1, num, 1)}
            if vllm is not None and num in THEIR_PROMPTS:
                ways[VLLM] = theirs.sampling(vllm, 1, num, 1)
            for way, work in ways.items():
                curve.add(way, num, 1000 * settled_s(work))
    flops, bytes_s = bench.limits.gemm_flops, bench.limits.weights_bytes_s
    read_s = 2 * bench.costs.num_weights / bytes_s
    limits = [(num, 1000 * max(read_s, bench.costs.prefill_s(flops, num))) for num in points]
    return curve.values(limits, "memory, bfloat16")


def while_training(bench: Bench) -> Values:
    """One request after another, alone and while another tenant trains without a pause; and what
    the training loses."""
    shape = Shape(8, 128)
    with ExitStack() as stack:
        ours = bench.service(stack)
        samplers = [ours.sampler()]
        step = service.training(ours.trainer(), shape)
        works = {
            "first token": service.sampling(samplers, 1, PROMPT_TOKENS, 1),
            f"{SAMPLE_TOKENS} tokens": service.sampling(samplers, 1, PROMPT_TOKENS, SAMPLE_TOKENS),
        }
        latencies_ms: dict[str, dict[str, list[float]]] = {name: {} for name in works}
        steps_s = {"alone": [settled_s(step)]}
        for name, work in works.items():
            work()
            latencies_ms[name]["alone"] = [1000 * work() for _ in range(NUM_LATENCIES)]
        stop = threading.Event()
        during: list[float] = []

        def train() -> None:
            while not stop.is_set():
                during.append(step())

        thread = threading.Thread(target=train)
        thread.start()
        try:
            for name, work in works.items():
                work()
                while_s = [1000 * work() for _ in range(NUM_LATENCIES)]
                latencies_ms[name]["while another tenant trains"] = while_s
        finally:
            stop.set()
            thread.join()
        steps_s["while another tenant samples"] = during
    for name, states in latencies_ms.items():
        for state, each in states.items():
            bench.console.print(
                f"{name}, {state}: median {statistics.median(each):.0f} ms, most {max(each):.0f} ms"
            )
    for state, each in steps_s.items():
        bench.console.print(f"training step, {state}: median {statistics.median(each):.2f} s")
    return {"latencies_ms": latencies_ms, "steps_s": steps_s, "shape": str(shape)}
