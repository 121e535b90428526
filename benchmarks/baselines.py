"""The baselines by name, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.children import Child
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, RANK, Shape, Work

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc keeps freed memory instead of giving each large block back to the kernel."""


@dataclass(frozen=True)
class Variant:
    """A way to use transformers + PEFT."""

    name: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


WRITTEN = Variant("PEFT, as written")
"""bfloat16, ``get_peft_model``, AdamW, a plain loop."""
TUNED = Variant("PEFT, tuned", ("--narrow", "--fused", "--attention", "eager"), ALLOCATOR)
"""The fastest of ``TRIED`` that needs no compiler."""
TUNED_LONG = Variant(TUNED.name, ("--narrow", "--fused"), ALLOCATOR)
"""For long sequences, where the scores of eager attention cost more than that backward pass: 420
tokens/s instead of 298 at 2048 tokens."""
LONG = 2048
TRIED = (
    WRITTEN,
    Variant("float32", ("--dtype", "float32")),
    Variant("allocator", (), ALLOCATOR),
    Variant("allocator, autocast", ("--autocast",), ALLOCATOR),
    Variant("allocator, bfloat16 adapters", ("--narrow",), ALLOCATOR),
    Variant("the same, fused AdamW", ("--narrow", "--fused"), ALLOCATOR),
    TUNED,
    Variant("tuned, compiled", (*TUNED.arguments, "--compile"), ALLOCATOR),
)
"""``TUNED`` is the one before it with eager attention instead of SDPA, whose backward pass is slow
in bfloat16 on CPUs."""
GENERATE = "transformers generate"
VLLM = "vLLM"


@dataclass(frozen=True)
class Baselines:
    """Where the baselines find what they need. ``vllm_python`` None: vLLM is left out."""

    model: Path
    num_threads: int
    vllm_python: Path | None = None

    def peft(self, variant: Variant = WRITTEN) -> Child:
        threads = str(self.num_threads)
        return Child(
            variant.name,
            [
                *(sys.executable, "-m", "benchmarks.peft_child", str(self.model.absolute())),
                *("--threads", threads, *variant.arguments),
            ],
            {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **variant.environment},
        )

    def vllm(self, num_adapters: int = 0, context_length: int = 2048) -> Child:
        """Takes a minute: it compiles its model first. Only where ``vllm_python`` is known."""
        assert self.vllm_python is not None
        environment = {
            "OMP_NUM_THREADS": str(self.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.num_threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: 46 thousand tokens
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # As its manual advises. For 32 requests on 2 cores: 240 tokens/s without, 630 with it.
        openmp = self.vllm_python.parent.parent / "lib" / "libiomp5.so"
        if openmp.exists():
            environment["LD_PRELOAD"] = str(openmp.absolute())
        command = [
            *(str(self.vllm_python.absolute()), "-m", "benchmarks.vllm_child"),
            *(str(self.model.absolute()), "--context", str(context_length)),
            *("--adapters", str(num_adapters)),
        ]
        return Child(VLLM, command, environment)

    @contextmanager
    def maybe_vllm(
        self, num_adapters: int = 0, context_length: int = 2048
    ) -> Iterator[Child | None]:
        if self.vllm_python is None:
            yield None
            return
        with self.vllm(num_adapters, context_length) as child:
            yield child


def tuned(length: int) -> Variant:
    """The fastest without a compiler for sequences of this length."""
    return TUNED_LONG if length >= LONG else TUNED


def training(child: Child, shape: Shape, rank: int = RANK) -> Work:
    def work() -> float:
        seconds: float = child.ask("train", shape=str(shape), rank=rank)["seconds"]
        return seconds

    return work


def tenants(child: Child, ranks: Sequence[int], length: int) -> Work:
    def work() -> float:
        seconds: float = child.ask("tenants", ranks=list(ranks), length=length)["seconds"]
        return seconds

    return work


def sampling(
    child: Child, requests: int, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> Work:
    """Prompts are new ones every time."""
    seed = 1000 * requests

    def work() -> float:
        nonlocal seed
        seed += 1
        answer = child.ask(
            "generate",
            requests=requests,
            new_tokens=new_tokens,
            seed=seed,
            prompt_tokens=prompt_tokens,
        )
        assert answer["num_tokens"] == requests * new_tokens
        seconds: float = answer["seconds"]
        return seconds

    return work
