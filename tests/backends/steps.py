"""Steps that the training tests take again and again."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.backends.harness import (
    Harness,
    datum,
    joined,
    op,
    unit,
)
from training.backends.base import AdamParams, Datum, Float32Array, Saving

LENGTHS = (5, 33, 1, 17, 64, 90, 2)  # odd number, unequal, some longer than a micro-batch


async def written(saving: Awaitable[Saving]) -> None:
    await (await saving).written()


async def exported(harness: Harness, slot: int, directory: Path) -> dict[str, Float32Array]:
    await written(harness.backend.export_adapter(slot, directory))
    return load_file(directory / "adapter_model.safetensors")


async def logprobs(harness: Harness, slot: int, *data: Datum) -> Float32Array:
    outputs = await harness.backend.forward(unit(op(slot, *data)))
    return joined(outputs[0].logprobs)


async def train(harness: Harness, slot: int, *data: Datum, **params: float) -> None:
    await harness.backend.forward_backward(unit(op(slot, *data)))
    await harness.backend.optim_step({slot: AdamParams(**{"learning_rate": 1e-2} | params)})


def some_data(harness: Harness, seed: int = 0) -> list[Datum]:
    return [datum(harness.vocab_size, length, seed) for length in LENGTHS]


def same_weights(
    one: dict[str, Float32Array], other: dict[str, Float32Array], relative: float = 0.0
) -> None:
    """Equal up to ``relative`` of the largest weight of each tensor."""
    assert one.keys() == other.keys()
    for name, weight in one.items():
        bound = relative * float(np.abs(weight).max())
        np.testing.assert_allclose(other[name], weight, rtol=0, atol=bound, err_msg=name)
