"""What every backend keeps when an operation fails, and of what it writes to disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.backends.harness import (
    Harness,
    datum,
    joined,
    op,
    reinforced,
    spec,
    unit,
)
from tests.backends.steps import exported, logprobs, same_weights, some_data, train, written
from training.backends.base import AdamParams, Datum, Float32Array, LoraSpec
from training.core.errors import UnitError, UserError

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --------------------------------------------------------------------------- failures


async def test_a_failed_unit_names_its_operation_and_leaves_no_gradient(
    harness: Harness, tmp_path: Path
) -> None:
    """The second operation's loss overflows; the first one's gradient must not stay either."""
    good = some_data(harness)
    bad = reinforced(harness.vocab_size, 20, 4)
    inputs = dict(bad.inputs) | {"logprobs": np.full(20, -1e30, np.float32)}
    worse = Datum(bad.tokens, bad.targets, inputs)
    for slot in (0, 1):
        await harness.backend.load_slot(slot, spec())
        await harness.backend.forward_backward(unit(op(slot, *good)))
    with pytest.raises(UserError) as failure:
        await harness.backend.forward_backward(
            unit(op(0, *good), op(1, worse, loss="importance_sampling"), op(0, *good))
        )
    assert failure.value.op_index == 1
    assert "finite" in str(failure.value)
    await harness.backend.load_slot(2, spec())
    await harness.backend.forward_backward(unit(op(2, *good)))
    steps = await harness.backend.optim_step({slot: AdamParams() for slot in range(3)})
    assert steps[0].metrics == steps[1].metrics == steps[2].metrics
    weights = [await exported(harness, slot, tmp_path / str(slot)) for slot in range(3)]
    same_weights(weights[0], weights[2])
    same_weights(weights[1], weights[2])


async def test_a_gradient_that_is_not_finite_refuses_its_step_alone(
    harness: Harness, tmp_path: Path
) -> None:
    """The loss is finite in float64, its gradient overflows float32."""
    huge = datum(harness.vocab_size, 24, 1, weight=3e38)
    tokens, targets = np.full(24, 5, np.int32), np.full(24, 9, np.int64)
    for slot in (0, 1):
        await harness.backend.load_slot(slot, spec())
        await train(harness, slot, *some_data(harness))
    before = await exported(harness, 0, tmp_path / "before")
    await harness.backend.forward_backward(
        unit(op(0, Datum(tokens, targets, huge.inputs)), op(1, *some_data(harness)))
    )
    steps = await harness.backend.optim_step({slot: AdamParams() for slot in (0, 1)})
    assert steps[0].error is not None
    assert "finite" in steps[0].error
    assert steps[1].error is None
    same_weights(before, await exported(harness, 0, tmp_path / "after"))
    again = await harness.backend.optim_step({0: AdamParams(learning_rate=0.0)})
    assert again[0].error is None
    assert again[0].metrics["grad_norm"] == 0.0


async def test_wrong_operations_are_refused(harness: Harness) -> None:
    good = datum(harness.vocab_size, 6, 0)
    await harness.backend.load_slot(0, spec())
    outside = Datum(good.tokens, good.targets + harness.vocab_size, good.inputs)
    strange = Datum(good.tokens + np.int32(harness.vocab_size), good.targets, good.inputs)
    for wrong in (
        op(0, good, loss="no_such_loss"),
        op(0, good, loss="ppo"),
        op(0, outside),
        op(0, strange),
    ):
        with pytest.raises(UserError) as failure:
            await harness.backend.forward_backward(unit(op(0, good), wrong))
        assert failure.value.op_index == 1
    steps = await harness.backend.optim_step({0: AdamParams()})
    assert steps[0].metrics["grad_norm"] == 0.0


async def test_an_empty_slot_fails_its_unit(harness: Harness) -> None:
    """The service never asks for that; nothing else may be changed by it."""
    good = datum(harness.vocab_size, 6, 0)
    await harness.backend.load_slot(0, spec())
    await harness.backend.unload_slot(1)
    with pytest.raises(UnitError):
        await harness.backend.forward_backward(unit(op(0, good), op(1, good)))
    with pytest.raises(UnitError):
        await harness.backend.optim_step({0: AdamParams(learning_rate=0.1), 1: AdamParams()})
    with pytest.raises(UnitError):
        await harness.backend.discard_grads(1)
    np.testing.assert_array_equal(
        await logprobs(harness, 0, good), await fresh_logprobs(harness, good)
    )


async def fresh_logprobs(harness: Harness, *data: Datum) -> Float32Array:
    await harness.backend.load_slot(2, spec())
    return await logprobs(harness, 2, *data)


async def test_ranks_over_the_limit_are_refused(harness: Harness) -> None:
    limits = harness.backend.capabilities()
    with pytest.raises(UserError):
        await harness.backend.load_slot(0, spec(rank=limits.max_lora_rank + 1))


# --------------------------------------------------------------------------- files


async def test_state_reproduces_the_next_step(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec())
    for seed in range(3):
        await train(harness, 0, *some_data(harness, seed))
    await written(harness.backend.save_state(0, tmp_path / "state"))
    await harness.backend.load_slot(1, spec(), tmp_path / "state")
    for slot in (0, 1):
        await train(harness, slot, *some_data(harness, 9))
    same_weights(
        await exported(harness, 0, tmp_path / "zero"), await exported(harness, 1, tmp_path / "one")
    )


async def test_state_without_optimizer_is_a_fresh_optimizer(
    harness: Harness, tmp_path: Path
) -> None:
    """Adam's first step after such a load moves by rate * sign of the gradient."""
    await harness.backend.load_slot(0, spec())
    for seed in range(3):
        await train(harness, 0, *some_data(harness, seed))
    await written(harness.backend.save_state(0, tmp_path / "state"))
    before = await exported(harness, 0, tmp_path / "before")
    await harness.backend.load_slot(1, spec(), tmp_path / "state", with_optimizer=False)
    same_weights(before, await exported(harness, 1, tmp_path / "loaded"))
    still = await harness.backend.optim_step({1: AdamParams(learning_rate=0.1)})
    assert still[1].error is None
    same_weights(before, await exported(harness, 1, tmp_path / "still"))  # no momentum came along
    await harness.backend.load_slot(1, spec(), tmp_path / "state", with_optimizer=False)
    await train(harness, 1, *some_data(harness, 9), learning_rate=1e-3)
    after = await exported(harness, 1, tmp_path / "after")
    change = np.abs(joined([after[name] - before[name] for name in before]))
    moved = change[change > 0]
    assert np.quantile(moved, 0.5) == pytest.approx(1e-3, rel=1e-2)


async def test_loading_into_a_used_slot_inherits_nothing(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, LoraSpec(8, 77))
    await train(harness, 0, *some_data(harness, 1))
    await harness.backend.forward_backward(unit(op(0, *some_data(harness, 2))))
    await harness.backend.load_slot(1, spec())
    await harness.backend.load_slot(0, spec())
    for slot in (0, 1):
        await train(harness, slot, *some_data(harness, 3))
    same_weights(
        await exported(harness, 0, tmp_path / "used"), await exported(harness, 1, tmp_path / "new")
    )


async def test_seeds_make_adapters(harness: Harness, tmp_path: Path) -> None:
    """A fresh adapter changes nothing, depends on its seed alone, and B is zero."""
    for slot, seed in enumerate((1, 1, 2)):
        await harness.backend.load_slot(slot, spec(seed=seed))
    weights = [await exported(harness, slot, tmp_path / str(slot)) for slot in range(3)]
    same_weights(weights[0], weights[1])
    down = [name for name in weights[0] if "lora_A" in name]
    assert any(not np.array_equal(weights[0][name], weights[2][name]) for name in down)
    assert all(not weights[0][name].any() for name in weights[0] if "lora_B" in name)
    data = some_data(harness)
    np.testing.assert_array_equal(
        await logprobs(harness, 0, *data), await logprobs(harness, 2, *data)
    )


async def test_layer_groups_are_trained_as_asked(harness: Harness, tmp_path: Path) -> None:
    names = {}
    for group in ("attn", "mlp", "unembed"):
        flags = {f"train_{each}": each == group for each in ("attn", "mlp", "unembed")}
        await harness.backend.load_slot(0, LoraSpec(2, 0, **flags))
        await train(harness, 0, *some_data(harness))
        weights = await exported(harness, 0, tmp_path / group)
        assert any(weights[name].any() for name in weights if "lora_B" in name)
        names[group] = set(weights)
    assert not names["attn"] & names["mlp"]
    assert not names["mlp"] & names["unembed"]


async def test_state_of_another_shape_is_refused(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec(rank=4))
    await written(harness.backend.save_state(0, tmp_path / "state"))
    with pytest.raises(UserError):
        await harness.backend.load_slot(1, spec(rank=8), tmp_path / "state")
    with pytest.raises(UserError):
        await harness.backend.load_slot(1, spec(), tmp_path / "nothing-here")


async def test_exports_have_the_peft_layout(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec(rank=4))
    await written(harness.backend.export_adapter(0, tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 32
    assert config["target_modules"]
