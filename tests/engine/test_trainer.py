"""The trainer's promises: all or nothing, additive, isolated slots, exact replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.training_cases import (
    ALL,
    ATTN,
    BASE_MODEL,
    MLP,
    UNEMBED,
    finish,
    gradient,
    make_trainer,
    relative_error,
    sft_data,
    sft_op,
    unit,
)
from training.backends.base import AdamParams, Datum, Int32Array, LoraSpec, TrainOp
from training.core.errors import UnitError, UserError
from training.engine.decoder import TrainingPass
from training.engine.model import Transformer
from training.engine.trainer import Trainer

LENGTHS = (20, 33, 20, 7, 40)
LARGE_STEP = AdamParams(1e-2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-tied", tmp_path_factory.mktemp("llama"))


def snapshot(trainer: Trainer, slot: int = 0) -> list[torch.Tensor]:
    held = trainer.slot(slot)
    parts = [held.weights, held.adam.exp_avg, held.adam.exp_avg_sq, gradient(trainer, slot)]
    return [part.clone() for part in parts]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_capabilities(checkpoint: Path) -> None:
    found = make_trainer(checkpoint).capabilities()
    assert (found.base_model, found.vocab_size) == (BASE_MODEL, VOCAB_SIZE)
    assert (found.context_length, found.eos_token_ids) == (2048, (2,))
    assert "gspo" in found.losses


# --------------------------------------------------------------------------- sums


def test_two_passes_and_a_step_are_one_pass_of_all_the_data(checkpoint: Path) -> None:
    data = sft_data(LENGTHS)
    together, apart = make_trainer(checkpoint, ALL), make_trainer(checkpoint, ALL)
    finish(together.forward_backward(unit(TrainOp(0, "cross_entropy", {}, data))))
    for part in (data[:2], data[2:]):
        finish(apart.forward_backward(unit(TrainOp(0, "cross_entropy", {}, part))))
    assert relative_error(gradient(apart), gradient(together)) < 1e-6
    for trainer in (together, apart):
        trainer.optim_step({0: LARGE_STEP})
    assert relative_error(apart.slot(0).weights, together.slot(0).weights) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_operations_are_spread_over_units_changes_no_bit(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    ops = [sft_op(0, LENGTHS, seed) for seed in range(4)]
    together, apart = (make_trainer(checkpoint, ALL, dtype=dtype) for _ in range(2))
    finish(together.forward_backward(unit(*ops)))
    for part in (ops[:1], ops[1:3], ops[3:]):
        finish(apart.forward_backward(unit(*part)))
    assert torch.equal(gradient(together), gradient(apart))


def test_a_smaller_micro_batch_gives_the_same_gradient(checkpoint: Path) -> None:
    """Down to single sequences over the budget, whose layers are computed again."""
    found = []
    for budget in (2048, 64, 8):
        trainer = make_trainer(
            checkpoint, ALL, micro_batch_tokens=budget, activation_memory_bytes=1
        )
        (output,) = finish(trainer.forward_backward(unit(sft_op(0, LENGTHS))))
        found.append((gradient(trainer), np.concatenate(output.logprobs)))
    for other, logprobs in found[1:]:
        assert relative_error(other, found[0][0]) < 1e-6
        np.testing.assert_allclose(logprobs, found[0][1], atol=1e-5)


def test_long_sequences_are_checkpointed_where_their_activations_do_not_fit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (1500, 200, 1499, 40)
    budget = make_trainer(checkpoint).model.activation_bytes(1499)
    whole = make_trainer(checkpoint, ALL)
    cut = make_trainer(checkpoint, ALL, micro_batch_tokens=256, activation_memory_bytes=budget)
    passes: list[tuple[int, bool]] = []
    run = cut.model.training_pass

    def noted(sequences: Sequence[Int32Array], *rest: Any, **named: Any) -> TrainingPass:
        passes.append((sum(map(len, sequences)), named["checkpointing"]))
        return run(sequences, *rest, **named)

    monkeypatch.setattr(cut.model, "training_pass", noted)
    for trainer in (whole, cut):
        finish(trainer.forward_backward(unit(*(sft_op(0, (each,)) for each in lengths))))
    assert passes == [(1500, True), (200, False), (1499, False), (40, False)]
    assert torch.equal(gradient(whole), gradient(cut))


# --------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """On matrices large enough that the kernels round differently for other numbers of rows."""
    checkpoint = make_checkpoint("wide", tmp_path)
    specs = (ALL, LoraSpec(8, 7), MLP)
    mine = sft_op(0, LENGTHS, 5)
    others = [sft_op(1, (50, 3), 6), sft_op(2, (9,), 7)]
    results = []
    for ops in ([mine], [mine, *others], [others[1], mine, others[0]]):
        trainer = make_trainer(checkpoint, *specs, dtype=dtype)
        outputs = finish(trainer.forward_backward(unit(*ops)))
        logprobs = np.concatenate(outputs[ops.index(mine)].logprobs)
        results.append((gradient(trainer), logprobs, outputs[ops.index(mine)].metrics))
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        np.testing.assert_array_equal(found[1], results[0][1])
        assert found[2] == results[0][2]


def test_adapters_of_all_shapes_in_one_pass(checkpoint: Path) -> None:
    """Joined in one micro-batch, each slot gets what it gets alone, up to rounding."""
    specs = (ALL, ATTN, MLP, UNEMBED, LoraSpec(16, 8, train_unembed=False))
    ops = [sft_op(slot, (11 + slot, 30), slot) for slot in range(len(specs))]
    joined = make_trainer(checkpoint, *specs, join_operations=True)
    run = joined.forward_backward(unit(*ops))
    assert next(run) is None
    outputs = finish(run)
    for slot, op in enumerate(ops):
        alone = make_trainer(checkpoint, *specs)
        (output,) = finish(alone.forward_backward(unit(op)))
        assert relative_error(gradient(joined, slot), gradient(alone, slot)) < 2e-6
        for found, expected in zip(outputs[slot].logprobs, output.logprobs, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


class _InvariantTransformer(Transformer):
    """Says of itself what the native decoder says; how true it is does not matter here."""

    is_batch_invariant = True


@pytest.mark.parametrize(
    ("kind", "join", "num_passes"),
    [(Transformer, False, 3), (Transformer, True, 1), (_InvariantTransformer, False, 1)],
)
def test_operations_share_a_pass_where_bits_allow_or_the_config_says(
    checkpoint: Path, kind: type[Transformer], join: bool, num_passes: int
) -> None:
    specs = (ALL, ATTN, MLP)
    trainer = make_trainer(checkpoint, *specs, join_operations=join, kind=kind)
    run = trainer.forward_backward(unit(*(sft_op(slot, (9, 20), slot) for slot in range(3))))
    assert len(list(run)) == num_passes


def test_slots_are_isolated(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL, MLP)
    before = snapshot(trainer, 1)
    finish(trainer.forward_backward(unit(sft_op(0, LENGTHS))))
    trainer.optim_step({0: LARGE_STEP})
    trainer.discard_grads(0)
    assert_same(snapshot(trainer, 1), before)


# --------------------------------------------------------------------------- all or nothing


def test_forward_changes_nothing_and_agrees(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    op = sft_op(0, LENGTHS)
    before = snapshot(trainer)
    (found,) = finish(trainer.forward(unit(op)))
    assert_same(snapshot(trainer), before)
    (expected,) = finish(trainer.forward_backward(unit(op)))
    np.testing.assert_array_equal(np.concatenate(found.logprobs), np.concatenate(expected.logprobs))
    assert found.metrics == expected.metrics


def infinite_op(slot: int) -> TrainOp:
    (datum,) = sft_data((10,))
    weights = datum.inputs["weights"].copy()
    weights[-1] = np.inf
    return TrainOp(
        slot, "cross_entropy", {}, [Datum(datum.tokens, datum.targets, {"weights": weights})]
    )


def test_a_failed_operation_is_named_and_leaves_no_gradient(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL, MLP, micro_batch_tokens=32)
    finish(trainer.forward_backward(unit(sft_op(0, LENGTHS))))
    before = [snapshot(trainer, slot) for slot in (0, 1)]
    ops = (sft_op(0, LENGTHS, 1), sft_op(1, LENGTHS, 2), infinite_op(1))
    with pytest.raises(UserError, match="not finite") as failure:
        finish(trainer.forward_backward(unit(*ops)))
    assert failure.value.op_index == 2
    for slot in (0, 1):
        assert_same(snapshot(trainer, slot), before[slot])


def test_a_unit_given_up_half_way_leaves_no_gradient(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL, micro_batch_tokens=32)
    finish(trainer.forward_backward(unit(sft_op(0, LENGTHS))))
    before = snapshot(trainer)
    run = trainer.forward_backward(unit(sft_op(0, LENGTHS, 1), sft_op(0, LENGTHS, 2)))
    for _ in range(4):
        next(run)
    run.close()
    assert_same(snapshot(trainer), before)


def test_an_error_inside_torch_is_a_unit_error(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    (datum,) = sft_data((10,))
    wrong = Datum(datum.tokens.astype(np.float32), datum.targets, datum.inputs)
    ops = (sft_op(0, LENGTHS), TrainOp(0, "cross_entropy", {}, [wrong]))
    with pytest.raises(UnitError, match="the unit failed"):
        finish(trainer.forward_backward(unit(*ops)))
    assert trainer.slot(0).gradient is None


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        ("stable_reinforce", {}, "not offered"),
        ("cross_entropy", {"targets": np.full(10, VOCAB_SIZE)}, "outside the vocabulary"),
        ("cross_entropy", {"tokens": np.full(10, -1, np.int32)}, "outside the vocabulary"),
        ("cross_entropy", {"inputs": {}}, "needs the inputs"),
        ("cross_entropy", {"inputs": {"weights": np.ones(9, np.float32)}}, "shape of the targets"),
        ("ppo", {"targets": np.zeros((10, 2), np.int64)}, "do not fit ppo"),
        ("cross_entropy", {"targets": np.zeros(9, np.int64)}, "do not fit"),
        ("cross_entropy", {"tokens": np.zeros(0, np.int32)}, "has 0 tokens"),
    ],
)
def test_wrong_operations_are_refused(
    checkpoint: Path, loss: str, change: dict[str, object], message: str
) -> None:
    trainer = make_trainer(checkpoint, ALL)
    (datum,) = sft_data((10,))
    values: dict[str, object] = {
        "tokens": datum.tokens,
        "targets": datum.targets,
        "inputs": datum.inputs,
    }
    wrong = Datum(**{**values, **change})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as failure:
        finish(trainer.forward(unit(sft_op(0, (5,)), TrainOp(0, loss, {}, [wrong]))))
    assert failure.value.op_index == 1


def test_an_operation_without_any_derivative(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    (datum,) = sft_data((10,))
    silent = Datum(datum.tokens, datum.targets, {"weights": np.zeros(10, np.float32)})
    (output,) = finish(trainer.forward_backward(unit(TrainOp(0, "cross_entropy", {}, [silent]))))
    assert output.metrics["loss:sum"] == 0
    assert not gradient(trainer).any()
    assert np.isfinite(output.logprobs[0]).all()


# --------------------------------------------------------------------------- targets


def test_several_targets_per_position(checkpoint: Path) -> None:
    """[N, K] targets are the sum of K ordinary passes; datums of other K share the pass."""
    rng = np.random.default_rng(3)
    length, width = 12, 3
    (datum,) = sft_data((length,))
    targets = rng.integers(0, VOCAB_SIZE, (length, width))
    targets[0] = targets[0, 0]  # the same target more than once
    weights = rng.normal(size=(length, width)).astype(np.float32)
    soft = Datum(datum.tokens, targets, {"weights": weights})
    columns = [
        Datum(datum.tokens, targets[:, k].copy(), {"weights": weights[:, k].copy()})
        for k in range(width)
    ]
    together, apart = make_trainer(checkpoint, ALL), make_trainer(checkpoint, ALL)
    (found,) = finish(
        together.forward_backward(unit(TrainOp(0, "cross_entropy", {}, [soft, datum])))
    )
    (expected,) = finish(
        apart.forward_backward(unit(TrainOp(0, "cross_entropy", {}, [*columns, datum])))
    )
    assert found.logprobs[0].shape == (length, width)
    np.testing.assert_allclose(found.logprobs[0], np.stack(expected.logprobs[:width], 1), atol=1e-5)
    np.testing.assert_allclose(found.logprobs[1], expected.logprobs[width], atol=1e-5)
    assert relative_error(gradient(together), gradient(apart)) < 3e-6


def test_outputs_keep_the_order_of_the_data(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    (output,) = finish(trainer.forward(unit(sft_op(0, LENGTHS))))
    assert tuple(len(logprobs) for logprobs in output.logprobs) == LENGTHS
    assert all(logprobs.dtype == np.float32 for logprobs in output.logprobs)


# --------------------------------------------------------------------------- steps and state


def test_a_step_without_gradients_is_a_step_of_zero(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    before = trainer.slot(0).weights.clone()
    output = trainer.optim_step({0: AdamParams(0.1, weight_decay=0.5)})[0]
    assert output.metrics["grad_norm"] == 0
    torch.testing.assert_close(trainer.slot(0).weights, before * 0.95)


def test_a_gradient_that_is_not_finite_refuses_its_own_step_alone(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint, ALL, MLP)
    (datum,) = sft_data((10,))
    huge = Datum(datum.tokens, datum.targets, {"weights": np.full(10, 3e38, np.float32)})
    finish(trainer.forward_backward(unit(TrainOp(0, "cross_entropy", {}, [huge]))))
    finish(trainer.forward_backward(unit(sft_op(1, LENGTHS))))
    before = snapshot(trainer)[:3]
    outputs = trainer.optim_step({0: LARGE_STEP, 1: LARGE_STEP})
    assert outputs[0].error is not None
    assert "not finite" in outputs[0].error
    assert outputs[1].error is None
    assert_same(snapshot(trainer)[:3], before)
    assert trainer.slot(0).gradient is None
    assert (trainer.slot(0).adam.step, trainer.slot(1).adam.step) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_reproduces_the_next_step_bit_for_bit(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    trainer = make_trainer(checkpoint, ALL, dtype=dtype)

    def train(target: Trainer, seed: int) -> float:
        (output,) = finish(target.forward_backward(unit(sft_op(0, LENGTHS, seed))))
        target.optim_step({0: LARGE_STEP})
        return output.metrics["loss:sum"]

    train(trainer, 0)
    trainer.capture_state(0).write(tmp_path / "state")
    restored = make_trainer(checkpoint, dtype=dtype)
    restored.load_slot(0, ALL, tmp_path / "state")
    for seed in (1, 2):
        assert train(trainer, seed) == train(restored, seed)
    assert_same(snapshot(trainer), snapshot(restored))
    assert trainer.slot(0).adam.step == restored.slot(0).adam.step == 3

    restored.load_slot(0, ALL, tmp_path / "state", with_optimizer=False)
    assert restored.slot(0).adam.step == 0
    assert not restored.slot(0).adam.exp_avg.any()


def test_loading_refuses_what_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, ALL)
    trainer.capture_state(0).write(tmp_path / "state")
    trainer.capture_adapter(0).write(tmp_path / "exported")
    held = trainer.slot(0)
    with pytest.raises(UserError, match="rank is 4, expected 8"):
        trainer.load_slot(0, LoraSpec(8, 1), tmp_path / "state")
    with pytest.raises(UserError, match="train_mlp is True, expected False"):
        trainer.load_slot(0, LoraSpec(4, 1, train_mlp=False), tmp_path / "state")
    with pytest.raises(UserError, match="no usable optimizer state") as refused:
        trainer.load_slot(0, ALL, tmp_path / "exported")
    assert str(tmp_path) not in str(refused.value), "a client reads it"
    with pytest.raises(UserError, match="cannot read"):
        trainer.load_slot(0, ALL, tmp_path / "absent")
    other = Trainer(trainer.model, trainer.config, "tests/other")
    with pytest.raises(UserError, match="was made for 'tests/tiny'"):
        other.load_slot(0, ALL, tmp_path / "state")
    assert trainer.slot(0) is held
    trainer.load_slot(0, ALL, tmp_path / "exported", with_optimizer=False)
    assert torch.equal(trainer.slot(0).weights, held.weights)


def test_slots_are_limited_and_must_exist(checkpoint: Path) -> None:
    whole = make_trainer(checkpoint)
    config = whole.config.model_copy(update={"max_slots": 1})
    trainer = Trainer(whole.model, config, BASE_MODEL)
    trainer.load_slot(3, ALL)
    trainer.load_slot(3, MLP)
    with pytest.raises(UnitError, match="in use"):
        trainer.load_slot(4, ALL)
    with pytest.raises(UserError, match="rank 1000"):
        trainer.load_slot(3, LoraSpec(1000, 0))
    trainer.unload_slot(3)
    trainer.unload_slot(3)
    with pytest.raises(UnitError, match="holds no adapter"):
        finish(trainer.forward(unit(sft_op(3, (5,)))))


def test_a_fresh_adapter_depends_on_its_seed_alone(checkpoint: Path) -> None:
    first, second = make_trainer(checkpoint), make_trainer(checkpoint, ALL, MLP)
    torch.manual_seed(123)
    first.load_slot(0, LoraSpec(4, 11))
    second.load_slot(9, LoraSpec(4, 11))
    assert torch.equal(first.slot(0).weights, second.slot(9).weights)
    first.load_slot(1, LoraSpec(4, 12))
    assert not torch.equal(first.slot(0).weights, first.slot(1).weights)
    held = first.slot(0)
    for _, a, b in held.layout.matrices(held.weights):
        assert a.abs().max() <= a.shape[1] ** -0.5
        assert a.std() > 0
        assert not b.any()
