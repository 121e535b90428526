"""What every backend's training half keeps, whatever computes behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
from tests.backends.steps import LENGTHS, exported, logprobs, same_weights, some_data, train
from training.backends.base import AdamParams, Datum
from training.losses import LOSSES

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    """Bit for bit, by default: a replay after a crash may meet other neighbours."""
    data = {slot: some_data(harness, slot) for slot in range(3)}
    for slot in range(6):
        await harness.backend.load_slot(slot, spec(rank=2 + slot % 3, seed=slot % 3))
    together = await harness.backend.forward_backward(
        unit(*(op(slot, *data[slot]) for slot in (2, 0, 1)))
    )
    alone = [
        (await harness.backend.forward_backward(unit(op(3 + slot, *data[slot]))))[0]
        for slot in range(3)
    ]
    steps = await harness.backend.optim_step({slot: AdamParams() for slot in range(6)})
    for place, slot in enumerate((2, 0, 1)):
        np.testing.assert_array_equal(
            joined(together[place].logprobs), joined(alone[slot].logprobs)
        )
        assert together[place].metrics == alone[slot].metrics
        assert steps[slot] == steps[3 + slot]
        weights = [await exported(harness, each, tmp_path / str(each)) for each in (slot, 3 + slot)]
        same_weights(weights[0], weights[1])


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


async def test_a_gradient_beyond_the_moments_is_refused_and_its_model_goes_on(
    harness: Harness, tmp_path: Path
) -> None:
    """Its square would make the second moment infinite and stop the model for good."""
    await harness.backend.load_slot(0, spec())
    weights = [await exported(harness, 0, tmp_path / "before")]
    huge = unit(op(0, datum(harness.vocab_size, 12, 1, weight=1e25)))
    await harness.backend.forward_backward(huge)
    output = (await harness.backend.optim_step({0: AdamParams(0.1)}))[0]
    assert "too large" in (output.error or "")
    same_weights(await exported(harness, 0, tmp_path / "refused"), weights[0])
    steps = [(huge, AdamParams(0.1, grad_clip_norm=1.0)), (unit(op(0, *some_data(harness))), None)]
    for given, params in steps:  # clipped it is like any other
        await harness.backend.forward_backward(given)
        output = (await harness.backend.optim_step({0: params or AdamParams(0.1)}))[0]
        assert output.error is None
        weights.append(await exported(harness, 0, tmp_path / str(len(weights))))
        old, new = (joined(list(each.values())) for each in weights[-2:])
        assert not np.array_equal(old, new)


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
