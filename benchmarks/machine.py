"""What the machine can do at most: ``python -m benchmarks.machine [--threads 2]``.

The limits that figures are compared with, found by trying. Machines drift from minute to minute
(other guests, clock speed), so every measurement takes them anew in its own run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 2**30
GEMM_SHAPES = ((4096, 4096, 4096), (2048, 1536, 576), (2048, 576, 1536))
"""Rows, outputs, inputs: a large cube, and the MLP of SmolLM2-135M in a training pass."""
STREAM_BYTES = 2 * GIB
WEIGHT_BYTES = 256 * 2**20
"""As much as the model's weights: what a decode step reads over and over, partly from caches."""


@dataclass(frozen=True)
class Limits:
    """Rates are the best of several tries, on ``threads`` threads."""

    processor: str
    threads: int
    gemm_flops: float
    """bfloat16, 2 per multiply and add; the best library or native kernel at any shape."""
    gemm_flops_by: dict[str, float]
    memory_bytes_s: float
    """Read from memory that no cache holds."""
    weights_bytes_s: float
    """Read again and again from as much memory as the weights take."""


def limits(threads: int) -> Limits:
    """Measured in a process of its own, so that nothing of it stays here. About 5 s."""
    command = [sys.executable, "-m", "benchmarks.machine", "--json", "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Limits(**json.loads(done.stdout))


def measure(threads: int) -> Limits:
    import torch

    torch.set_num_threads(threads)
    by = {
        f"torch {'x'.join(map(str, shape))}": gemm_flops(*shape) for shape in GEMM_SHAPES
    } | native_flops(threads)
    return Limits(
        processor_name(),
        threads,
        max(by.values()),
        by,
        read_bytes_s(STREAM_BYTES),
        read_bytes_s(WEIGHT_BYTES),
    )


def gemm_flops(num_rows: int, num_out: int, num_in: int) -> float:
    import torch

    rows = torch.randn(num_rows, num_in).bfloat16()
    weight = torch.randn(num_out, num_in).bfloat16()
    flops = 2 * num_rows * num_out * num_in
    repeats = max(1, int(2e10 / flops))

    def products() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(rows, weight)

    return repeats * flops / best_s(products)


def native_flops(threads: int) -> dict[str, float]:
    """Of the native library's own test of the tile units, where it is built and has one:
    ``double tc_amx_peak(int threads, double seconds)``, operations per second."""
    from training.engine.native import library

    kernels = library.load()
    if not hasattr(kernels, "tc_amx_peak"):
        return {}
    peak = kernels.tc_amx_peak
    peak.argtypes, peak.restype = (ctypes.c_int, ctypes.c_double), ctypes.c_double
    return {"native tiles": float(peak(threads, 0.5))}


def read_bytes_s(num_bytes: int) -> float:
    import torch

    memory = torch.ones(num_bytes // 4)  # written once: pages never touched are all one zero page
    repeats = max(1, GIB // num_bytes)

    def read() -> None:
        for _ in range(repeats):
            memory.sum()

    return repeats * num_bytes / best_s(read)


def best_s(function: Callable[[], object], tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.threads)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.processor}, {found.threads} threads")
    for name, flops in found.gemm_flops_by.items():
        print(f"bfloat16 products, {name}: {flops / 1e12:.2f} TFLOP/s")
    print(f"memory read: {found.memory_bytes_s / 1e9:.1f} GB/s")
    print(f"{WEIGHT_BYTES >> 20} MiB read again: {found.weights_bytes_s / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
