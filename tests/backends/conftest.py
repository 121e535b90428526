"""Backends under test: each is started once for a module and shared by its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.backends import tiny
from tests.backends.harness import Harness
from tests.engine.devices import NEEDS_CUDA
from training.backends.registry import create_backend
from training.config import EngineConfig, ModelConfig, TrainingConfig
from training.engine.native import library
from training.engine.native.build import BuildError

BACKENDS = (
    "fake",
    "local-float32",
    "local-bfloat16",
    pytest.param("local-float32-cuda", marks=NEEDS_CUDA),
    pytest.param("local-bfloat16-cuda", marks=NEEDS_CUDA),
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def local_config(dtype: str = "float32", **engine: object) -> TrainingConfig:
    """Small micro-batches and caches, so that several are needed even for little data."""
    settings: dict[str, object] = {
        "device": "cpu",
        "dtype": dtype,
        "num_threads": 1,
        "max_slots": 8,
        "max_lora_rank": 16,
        "micro_batch_tokens": 64,
        "kv_cache_tokens": 4096,
        "max_running_sequences": 8,
        "prefill_chunk_tokens": 32,
    }
    return TrainingConfig(engine=EngineConfig.model_validate(settings | engine))


def has_kernels() -> bool:
    """Whether the engine computes in bfloat16 with its own kernels: then to the bit."""
    try:
        library.load()
    except BuildError:
        return False
    return True


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=BACKENDS)
async def harness(request: pytest.FixtureRequest, tiny_llama: Path) -> AsyncIterator[Harness]:
    given = str(request.param).split("-")
    kind, dtype, device = given + ["float32", "cpu"][len(given) - 1 :]
    if kind == "fake":
        model, config = ModelConfig(name="tests/fake", backend="fake"), TrainingConfig()
    else:
        model = ModelConfig(name="tests/tiny-llama", path=tiny_llama)
        config = local_config(dtype, device=device)
    exact = kind == "fake" or dtype == "float32"
    bitwise = kind == "fake" or (device == "cpu" and dtype == "bfloat16" and has_kernels())
    backend = create_backend(model, config)
    await backend.start()
    yield Harness(
        name=str(request.param),
        backend=backend,
        text=lambda tokens: "".join(chr(t) if kind == "fake" else f"<{t}>" for t in tokens),
        model_path=model.path,
        company=0.0 if bitwise else 1e-4 if exact else 5e-2,
        neighbours=0.0 if bitwise else 3e-5 if exact else 5e-2,
        sampler=0.0 if bitwise else 1e-4 if exact else 3e-1,  # either is up to 0.27 off float32
        gradient=1e-4 if exact else 5e-2,
    )
    await backend.close()
