"""The head's own backward pass against autograd over whole fp32 logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.training_cases import UNEMBED, make_trainer, relative_error, sft_data
from training.backends.base import Datum
from training.engine.adapter import UNEMBED_LAYER, GradientSink, Group, Segment
from training.engine.head import GROUP_ROWS, Head
from training.engine.model import Transformer
from training.engine.torch_head import BLOCK_ROWS
from training.engine.trainer import Trainer
from training.losses import LOSSES


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return make_trainer(make_checkpoint("llama", tmp_path), UNEMBED)


def soft_datum(length: int, width: int) -> Datum:
    rng = np.random.default_rng(length)
    targets = rng.integers(0, VOCAB_SIZE, (length, width))
    weights = rng.normal(size=(length, width)).astype(np.float32)
    weights[: length // 2] = 0
    return Datum(np.zeros(length, np.int32), targets, {"weights": weights})


@pytest.mark.parametrize(
    "data",
    [
        sft_data((BLOCK_ROWS + 1, 1, GROUP_ROWS - 5, 30)),
        sft_data((2 * GROUP_ROWS + 7, 3)),
        [soft_datum(9, 4), *sft_data((5,)), soft_datum(GROUP_ROWS + 40, 2)],
    ],
    ids=["groups", "one long datum", "several targets"],
)
def test_values_and_gradients(trainer: Trainer, data: list[Datum]) -> None:
    num_rows = sum(datum.num_tokens for datum in data)
    adapter = trainer.slot(0).adapter
    pair = adapter.group(UNEMBED_LAYER, Group.UNEMBED)
    assert pair is not None
    hidden = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(0))
    sink = GradientSink(adapter.layout, torch.full((adapter.layout.num_params,), torch.nan))
    dhidden = torch.zeros_like(hidden)

    with torch.no_grad():
        segment = Segment(adapter, 0, num_rows, sink)
        head = Head(trainer.model, segment, LOSSES["cross_entropy"], {}, hidden, dhidden)
        result = head.run(data)

    leaves = [hidden.clone().requires_grad_(), pair.a.clone(), pair.b.clone()]
    h, a, b = (leaf.detach().requires_grad_() for leaf in leaves)
    assert isinstance(trainer.model, Transformer)
    logits = h @ trainer.model.weights.head.weight.T + adapter.scale * (h @ a.T @ b.T)
    logprobs = logits.log_softmax(-1)
    losses = []
    row = 0
    for datum, found in zip(data, result.logprobs, strict=True):
        columns = torch.from_numpy(datum.targets).reshape(datum.num_tokens, -1)
        mine = logprobs[row : row + datum.num_tokens].gather(1, columns)
        expected = mine.detach().numpy().reshape(datum.targets.shape)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        weights = torch.from_numpy(datum.inputs["weights"]).reshape(columns.shape)
        losses.append(-(mine * weights).sum())
        row += datum.num_tokens
    loss = torch.stack(losses).sum()
    torch.autograd.backward(loss)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.has_gradient
    gradients = adapter.layout.views(sink.finish())[UNEMBED_LAYER, Group.UNEMBED]
    assert h.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    assert relative_error(dhidden, h.grad) < 1e-5
    assert relative_error(gradients.a, a.grad) < 1e-5
    assert relative_error(gradients.b, b.grad) < 1e-5


def test_rows_without_a_derivative_get_no_gradient(trainer: Trainer) -> None:
    (datum,) = sft_data((30,))
    hidden = torch.randn(30, 128)
    dhidden = torch.zeros_like(hidden)
    with torch.no_grad():
        segment = Segment(trainer.slot(0).adapter, 0, 30)
        Head(trainer.model, segment, LOSSES["cross_entropy"], {}, hidden, dhidden).run([datum])
    used = datum.inputs["weights"] != 0
    assert np.array_equal(dhidden.any(1).numpy(), used)
