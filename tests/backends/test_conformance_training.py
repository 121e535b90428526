"""What every backend's training half keeps, whatever computes behind it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.backends.harness import (
    Harness,
    datum,
    joined,
    numpy_loss,
    op,
    reinforced,
    spec,
    unit,
)
from training.backends.base import AdamParams, Datum, Float32Array, LoraSpec
from training.core.errors import UnitError, UserError
from training.losses import LOSSES

pytestmark = pytest.mark.asyncio(loop_scope="module")

LENGTHS = (5, 33, 1, 17, 64, 90, 2)  # odd number, unequal, some longer than a micro-batch


async def exported(harness: Harness, slot: int, directory: Path) -> dict[str, Float32Array]:
    await harness.backend.export_adapter(slot, directory)
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


# --------------------------------------------------------------------------- forward


async def test_capabilities_name_what_is_served(harness: Harness) -> None:
    capabilities = harness.backend.capabilities()
    assert capabilities.base_model.startswith("tests/")
    assert capabilities.vocab_size > 0
    assert capabilities.losses == frozenset(LOSSES)
    assert harness.backend.health().alive
    assert harness.backend.health().generation == 1


async def test_outputs_come_in_order_of_operations_and_data(harness: Harness) -> None:
    """Shuffled slots, unequal lengths, odd sizes: each datum gets what it gets alone."""
    for slot in range(3):
        await harness.backend.load_slot(slot, spec(rank=2 + slot, seed=slot))
        await train(harness, slot, *some_data(harness, slot))
    slots = (2, 0, 1, 0, 2)
    data = [some_data(harness, 10 + i)[: 1 + i] for i in range(len(slots))]
    together = await harness.backend.forward(
        unit(*(op(slot, *part) for slot, part in zip(slots, data, strict=True)))
    )
    assert len(together) == len(slots)
    for slot, part, output in zip(slots, data, together, strict=True):
        assert [len(each) for each in output.logprobs] == [each.num_tokens for each in part]
        for each, found in zip(part, output.logprobs, strict=True):
            assert found.dtype == np.float32
            alone = await logprobs(harness, slot, each)
            np.testing.assert_allclose(found, alone, rtol=0, atol=harness.company)


async def test_logprobs_are_of_a_distribution(harness: Harness) -> None:
    """All targets of one position, given as [N, K], have probabilities that sum to one."""
    await harness.backend.load_slot(0, spec())
    await train(harness, 0, *some_data(harness))
    vocab_size = harness.vocab_size
    tokens = np.array([3, 1, 4], np.int32)
    targets = np.tile(np.arange(vocab_size, dtype=np.int64), (3, 1))
    weights = np.zeros(targets.shape, np.float32)
    outputs = await harness.backend.forward(
        unit(op(0, Datum(tokens, targets, {"weights": weights})))
    )
    found = outputs[0].logprobs[0]
    assert found.shape == targets.shape
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(1), 1.0, atol=1e-3)


async def test_forward_changes_nothing(harness: Harness, tmp_path: Path) -> None:
    """Neither weights nor gradients; and it tells what forward_backward tells."""
    data = some_data(harness)
    for slot in (0, 1):
        await harness.backend.load_slot(slot, spec())
    trained = await harness.backend.forward_backward(unit(op(0, *data)))
    before = await exported(harness, 0, tmp_path / "before")
    only = await harness.backend.forward(unit(op(0, *data)))
    same_weights(before, await exported(harness, 0, tmp_path / "after"))
    np.testing.assert_array_equal(joined(only[0].logprobs), joined(trained[0].logprobs))
    assert only[0].metrics["loss:sum"] == trained[0].metrics["loss:sum"]
    await harness.backend.forward_backward(unit(op(1, *data)))
    steps = await harness.backend.optim_step({slot: AdamParams() for slot in (0, 1)})
    assert steps[0].metrics["grad_norm"] == steps[1].metrics["grad_norm"]
    same_weights(
        await exported(harness, 0, tmp_path / "zero"), await exported(harness, 1, tmp_path / "one")
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
async def test_losses_equal_a_numpy_reference(harness: Harness, name: str) -> None:
    """Recomputed from the returned logprobs by formulas written down a second time."""
    await harness.backend.load_slot(0, spec())
    make = datum if name == "cross_entropy" else reinforced
    data = [make(harness.vocab_size, length, 3) for length in LENGTHS]
    config = dict(LOSSES[name].config)
    outputs = await harness.backend.forward_backward(unit(op(0, *data, loss=name)))
    expected = sum(
        numpy_loss(name, logprob, each.inputs, config)
        for logprob, each in zip(outputs[0].logprobs, data, strict=True)
    )
    assert outputs[0].metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    await harness.backend.discard_grads(0)


async def test_loss_settings_are_honoured(harness: Harness) -> None:
    await harness.backend.load_slot(0, spec())
    data = [reinforced(harness.vocab_size, 40, 5)]
    narrow = {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}
    outputs = await harness.backend.forward(
        unit(op(0, *data, loss="ppo"), op(0, *data, loss="ppo", **narrow))
    )
    expected = numpy_loss("ppo", outputs[1].logprobs[0], data[0].inputs, narrow)
    assert outputs[1].metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert outputs[0].metrics["loss:sum"] != outputs[1].metrics["loss:sum"]


# --------------------------------------------------------------------------- gradients and steps


async def test_two_backwards_equal_one_with_the_data_together(
    harness: Harness, tmp_path: Path
) -> None:
    data = some_data(harness)
    for slot in range(3):
        await harness.backend.load_slot(slot, spec())
    await harness.backend.forward_backward(unit(op(0, *data)))
    await harness.backend.forward_backward(unit(op(1, *data[:3])))
    await harness.backend.forward_backward(unit(op(1, *data[3:])))
    await harness.backend.forward_backward(unit(op(2, *data[:2]), op(2, *data[2:])))
    before = await exported(harness, 0, tmp_path / "before")
    # With a large eps the step is linear in the gradient, so that its size shows in the weights.
    params = AdamParams(learning_rate=1.0, eps=1e3)
    steps = await harness.backend.optim_step(dict.fromkeys(range(3), params))
    norms = [steps[slot].metrics["grad_norm"] for slot in range(3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=harness.gradient)
    changes = []
    for slot in range(3):
        after = await exported(harness, slot, tmp_path / str(slot))
        changes.append({name: after[name] - before[name] for name in before})
    same_weights(changes[0], changes[1], harness.gradient)
    same_weights(changes[0], changes[2], harness.gradient)


async def test_training_lowers_the_loss(harness: Harness) -> None:
    data = [datum(harness.vocab_size, 12, 1), datum(harness.vocab_size, 7, 2)]
    await harness.backend.load_slot(0, spec(rank=8))
    losses = []
    for _ in range(25):
        outputs = await harness.backend.forward_backward(unit(op(0, *data)))
        losses.append(outputs[0].metrics["loss:sum"])
        await harness.backend.optim_step({0: AdamParams(learning_rate=2e-2)})
    assert losses[-1] < 0.5 * losses[0]


async def test_slots_are_isolated_bit_for_bit(harness: Harness, tmp_path: Path) -> None:
    """Slot 1 trains the same whether or not slot 0 does something in between."""
    mine, theirs = some_data(harness, 1), some_data(harness, 2)
    weights = []
    for busy in (False, True):
        await harness.backend.load_slot(0, spec(seed=5))
        await harness.backend.load_slot(1, spec(seed=6))
        before = await logprobs(harness, 1, *mine)
        await harness.backend.forward_backward(unit(op(1, *mine)))
        if busy:
            await train(harness, 0, *theirs, learning_rate=0.1)
            await harness.backend.forward_backward(unit(op(0, *theirs)))
            await harness.backend.discard_grads(0)
            np.testing.assert_array_equal(await logprobs(harness, 1, *mine), before)
        steps = await harness.backend.optim_step({1: AdamParams(learning_rate=1e-2)})
        weights.append((steps[1], await exported(harness, 1, tmp_path / f"busy-{busy}")))
    assert weights[0][0] == weights[1][0]
    same_weights(weights[0][1], weights[1][1])


async def test_a_unit_of_many_slots_equals_units_of_one(harness: Harness, tmp_path: Path) -> None:
    data = {slot: some_data(harness, slot) for slot in range(3)}
    for slot in range(6):
        await harness.backend.load_slot(slot, spec(rank=2 + slot % 3, seed=slot % 3))
    await harness.backend.forward_backward(unit(*(op(slot, *data[slot]) for slot in (2, 0, 1))))
    for slot in range(3):
        await harness.backend.forward_backward(unit(op(3 + slot, *data[slot])))
    steps = await harness.backend.optim_step({slot: AdamParams() for slot in range(6)})
    for slot in range(3):
        together, alone = steps[slot].metrics["grad_norm"], steps[3 + slot].metrics["grad_norm"]
        assert together == pytest.approx(alone, rel=harness.gradient)


async def test_zero_learning_rate_leaves_weights(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec())
    before = await exported(harness, 0, tmp_path / "before")
    await train(harness, 0, *some_data(harness), learning_rate=0.0)
    same_weights(before, await exported(harness, 0, tmp_path / "after"))


async def test_optimizer_parameters_belong_to_the_call(harness: Harness, tmp_path: Path) -> None:
    """One call, three slots, three parameter sets: as if each slot had been stepped alone."""
    params = {
        0: AdamParams(learning_rate=1e-3),
        1: AdamParams(learning_rate=5e-2, beta1=0.5, beta2=0.5, eps=1e-3),
        2: AdamParams(learning_rate=1e-2, weight_decay=0.5, grad_clip_norm=0.1),
    }
    data = some_data(harness)
    for slot in range(6):
        await harness.backend.load_slot(slot, spec())
    for _ in range(2):
        for slot in range(6):
            await harness.backend.forward_backward(unit(op(slot, *data)))
        await harness.backend.optim_step(params)
        for slot in range(3):
            await harness.backend.optim_step({3 + slot: params[slot]})
    weights = [await exported(harness, slot, tmp_path / str(slot)) for slot in range(6)]
    for slot in range(3):
        same_weights(weights[slot], weights[3 + slot])
    assert not np.array_equal(joined(list(weights[0].values())), joined(list(weights[1].values())))


async def test_weight_decay_is_decoupled(harness: Harness, tmp_path: Path) -> None:
    """Without a gradient the step only decays: w * (1 - rate * decay)."""
    await harness.backend.load_slot(0, spec())
    before = await exported(harness, 0, tmp_path / "before")
    steps = await harness.backend.optim_step({0: AdamParams(learning_rate=0.1, weight_decay=0.5)})
    assert steps[0].metrics["grad_norm"] == 0.0
    after = await exported(harness, 0, tmp_path / "after")
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight * 0.95, rtol=1e-5, atol=1e-7)


async def test_gradients_are_clipped_and_told_unclipped(harness: Harness, tmp_path: Path) -> None:
    """With a large eps a step is nearly linear in the gradient, so clipping shows in its size."""
    moved = {}
    for clip in (0.0, 1e-3, 1e9):
        await harness.backend.load_slot(0, spec())
        before = await exported(harness, 0, tmp_path / f"before-{clip}")
        await harness.backend.forward_backward(unit(op(0, *some_data(harness))))
        step = await harness.backend.optim_step(
            {0: AdamParams(learning_rate=1e-2, eps=1e3, grad_clip_norm=clip)}
        )
        after = await exported(harness, 0, tmp_path / f"after-{clip}")
        change = joined([after[name] - before[name] for name in before])
        moved[clip] = (step[0].metrics["grad_norm"], float(np.abs(change.astype(float)).sum()))
    assert moved[0.0] == moved[1e9]
    assert moved[1e-3][0] == moved[0.0][0] > 1.0
    assert moved[1e-3][1] < 0.05 * moved[0.0][1]


async def test_a_step_without_gradients_is_adam_with_zero(harness: Harness, tmp_path: Path) -> None:
    """A fresh adapter stays; one with momentum moves on."""
    await harness.backend.load_slot(0, spec())
    fresh = await exported(harness, 0, tmp_path / "fresh")
    await harness.backend.optim_step({0: AdamParams(learning_rate=0.1)})
    same_weights(fresh, await exported(harness, 0, tmp_path / "still"))
    await train(harness, 0, *some_data(harness))
    one = await exported(harness, 0, tmp_path / "one")
    steps = await harness.backend.optim_step({0: AdamParams(learning_rate=0.1)})
    assert steps[0].error is None
    two = await exported(harness, 0, tmp_path / "two")
    assert any(not np.array_equal(one[name], two[name]) for name in one)


async def test_discarded_gradients_are_gone(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec())
    before = await exported(harness, 0, tmp_path / "before")
    await harness.backend.forward_backward(unit(op(0, *some_data(harness))))
    await harness.backend.discard_grads(0)
    steps = await harness.backend.optim_step({0: AdamParams(learning_rate=0.1)})
    assert steps[0].metrics["grad_norm"] == 0.0
    same_weights(before, await exported(harness, 0, tmp_path / "after"))


async def test_a_step_clears_the_gradients(harness: Harness) -> None:
    await harness.backend.load_slot(0, spec())
    await train(harness, 0, *some_data(harness))
    steps = await harness.backend.optim_step({0: AdamParams()})
    assert steps[0].metrics["grad_norm"] == 0.0


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
    await harness.backend.save_state(0, tmp_path / "state")
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
    await harness.backend.save_state(0, tmp_path / "state")
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
    await harness.backend.save_state(0, tmp_path / "state")
    with pytest.raises(UserError):
        await harness.backend.load_slot(1, spec(rank=8), tmp_path / "state")
    with pytest.raises(UserError):
        await harness.backend.load_slot(1, spec(), tmp_path / "nothing-here")


async def test_exports_have_the_peft_layout(harness: Harness, tmp_path: Path) -> None:
    await harness.backend.load_slot(0, spec(rank=4))
    await harness.backend.export_adapter(0, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 32
    assert config["target_modules"]
