"""The fake's arithmetic against finite differences, torch's AdamW, and its knobs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backends.harness import datum, op, reinforced, request, spec, unit
from tests.backends.steps import written
from tests.backends.tiny import VOCAB_SIZE as VOCAB_SIZE_OF_TINY
from training.backends.base import AdamParams, TrainOp
from training.backends.fake import FakeBackend
from training.backends.fake.model import BaseWeights, HeadView
from training.backends.fake.trainer import Slot, adamw_step, add_gradient, compute_op, new_slot
from training.config import ModelConfig, TrainingConfig
from training.core.errors import BackendDead

VOCAB_SIZE = 48
MODEL = ModelConfig(name="tests/fake", backend="fake")


def random_slot(base: BaseWeights) -> Slot:
    """All of A and B random, so that no gradient is zero."""
    slot = new_slot(base, spec(rank=3))
    rng = np.random.default_rng(0)
    for name, weight in slot.adapter.items():
        slot.adapter[name] = (0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
    slot.view = HeadView(base, slot.spec, slot.adapter)
    return slot


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling"])
def test_gradients_equal_finite_differences(loss: str) -> None:
    base = BaseWeights(VOCAB_SIZE)
    slot = random_slot(base)
    make = datum if loss == "cross_entropy" else reinforced
    operation = op(0, make(VOCAB_SIZE, 30, 1), make(VOCAB_SIZE, 5, 2), loss=loss)
    add_gradient(slot, compute_op(slot, operation, 100).gradient_VD)
    rng = np.random.default_rng(1)
    for name, weight in slot.adapter.items():
        direction = rng.standard_normal(weight.shape)
        slope = directional_slope(slot, operation, name, direction)
        assert slope == pytest.approx(float((slot.gradients[name] * direction).sum()), rel=2e-3)


def directional_slope(slot: Slot, operation: TrainOp, name: str, direction: np.ndarray) -> float:
    """(loss(w + h d) - loss(w - h d)) / 2h for one tensor of the adapter."""
    step, losses = 1e-3, []
    for sign in (1, -1):
        moved = (slot.adapter[name] + sign * step * direction).astype(np.float32)
        adapter = {**slot.adapter, name: moved}
        other = Slot(slot.spec, adapter, HeadView(slot.view.base, slot.spec, adapter), {})
        losses.append(compute_op(other, operation, 100).output.metrics["loss:sum"])
    return (losses[0] - losses[1]) / (2 * step)


def test_steps_equal_torch_adamw() -> None:
    params = AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    base = BaseWeights(VOCAB_SIZE)
    slot = random_slot(base)
    names = sorted(slot.adapter)
    weights = [torch.nn.Parameter(torch.from_numpy(slot.adapter[n].copy())) for n in names]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for seed in range(5):
        operation = op(0, datum(VOCAB_SIZE, 20, seed))
        add_gradient(slot, compute_op(slot, operation, 100).gradient_VD)
        for name, weight in zip(names, weights, strict=True):
            weight.grad = torch.from_numpy(slot.gradients[name].astype(np.float32))
        optimizer.step()
        adamw_step(slot, params)
        for name, weight in zip(names, weights, strict=True):
            np.testing.assert_allclose(
                slot.adapter[name], weight.detach().numpy(), rtol=1e-4, atol=1e-6
            )


async def test_a_crash_is_told_as_an_engine_tells_it(tmp_path: Path) -> None:
    backend = FakeBackend(MODEL, TrainingConfig(), delay_s=0.01)
    await backend.start()
    await backend.load_slot(0, spec())
    await written(backend.save_state(0, tmp_path / "state"))
    await backend.publish("kept", tmp_path / "state")
    work = [
        asyncio.create_task(backend.forward_backward(unit(op(0, datum(512, 9, 0))))),
        asyncio.create_task(backend.sample(request((1, 2), max_tokens=1000))),
    ]
    saving = await backend.save_state(0, tmp_path / "second")
    backend.crash()
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendDead, BackendDead]
    with pytest.raises(BackendDead):
        await saving.written()
    assert backend.health().alive
    assert backend.health().generation == 2
    with pytest.raises(BackendDead, match="load it again"):
        await backend.optim_step({0: AdamParams()})
    await backend.load_slot(0, spec(), tmp_path / "state")
    assert await backend.optim_step({0: AdamParams()})
    assert (await backend.sample(request((1, 2), snapshot_id="kept"))).sequences
    await backend.close()
    with pytest.raises(BackendDead):
        await backend.sample(request((1, 2)))


async def test_a_directory_gives_the_fake_its_vocabulary(tiny_llama: Path) -> None:
    model = ModelConfig(name="tests/fake", backend="fake", path=tiny_llama)
    backend = FakeBackend(model, TrainingConfig())
    await backend.start()
    assert backend.capabilities().vocab_size == VOCAB_SIZE_OF_TINY
    free = await backend.sample(request((1, 2), max_tokens=6))
    tokens = free.sequences[0].tokens.tolist()
    stopped = await backend.sample(
        request((1, 2), max_tokens=6, stop_strings=(f"<{tokens[1]}><{tokens[2]}>",))
    )
    assert stopped.sequences[0].tokens.tolist() == tokens[:3]
    await backend.close()


async def test_a_tenant_of_many_samples_shuts_nobody_out() -> None:
    """The other's only sample is done when each of the many has had a few turns at most."""
    backend = FakeBackend(MODEL, TrainingConfig())
    await backend.start()
    ended: list[str] = []

    async def sample(tenant: str) -> None:
        await backend.sample(replace(request((1, 2), max_tokens=200), tenant=tenant))
        ended.append(tenant)

    many = [asyncio.create_task(sample("many")) for _ in range(100)]
    for _ in range(5):
        await asyncio.sleep(0)
    few = asyncio.create_task(sample("few"))
    cancelled = asyncio.create_task(sample("few"))
    await asyncio.sleep(0)
    cancelled.cancel()  # nobody waits for its turn
    await few
    assert ended == ["few"]
    await asyncio.gather(*many)
    await backend.close()
