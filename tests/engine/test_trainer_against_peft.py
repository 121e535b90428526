"""Our step against transformers + PEFT + torch in fp32: logprobs, gradients, trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import CONFIGS, make_checkpoint
from tests.engine.devices import DEVICES
from tests.engine.peft_cases import (
    assert_gradients_are_those_of_peft,
    by_peft_name,
    load_in_peft,
    peft_logprobs,
    peft_loss,
    peft_parameters,
)
from tests.engine.training_cases import (
    ALL,
    ATTN,
    MLP,
    UNEMBED,
    finish,
    make_trainer,
    relative_error,
    sft_data,
    sft_op,
    unit,
)
from training.backends.base import AdamParams, LoraSpec

LENGTHS = (20, 33, 20, 7, 40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, ALL) for name in CONFIGS if name != "wide"]
    + [("llama", spec) for spec in (ATTN, MLP, UNEMBED)]
    + [("llama-tied", UNEMBED), ("qwen3", ATTN), ("qwen2", LoraSpec(4, 5, train_attn=False))],
)
def test_logprobs_and_gradients(
    name: str, spec: LoraSpec, device: torch.device, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(name, tmp_path)
    trainer = make_trainer(checkpoint, spec, micro_batch_tokens=64, device=device)
    assert_gradients_are_those_of_peft(trainer, checkpoint, sft_op(0, LENGTHS))


def test_weights_after_several_steps(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama-tied", tmp_path)
    trainer = make_trainer(checkpoint, ALL)
    trainer.capture_adapter(0).write(tmp_path / "exported")
    model = load_in_peft(checkpoint, tmp_path / "exported")
    parameters = peft_parameters(model)
    steps = [
        AdamParams(1e-2, 0.9, 0.95, 1e-12, 0.1, grad_clip_norm=1.0),
        AdamParams(3e-3, 0.8, 0.99, 1e-8, 0.0),
        AdamParams(1e-2, weight_decay=0.5, grad_clip_norm=50.0),
    ]
    optimizer = torch.optim.AdamW(parameters.values())
    before = by_peft_name(trainer, trainer.slot(0).weights.clone())
    for seed, params in enumerate(steps):
        op = sft_op(0, LENGTHS, seed)
        finish(trainer.forward_backward(unit(op)))
        ours = trainer.optim_step({0: params})[0]

        optimizer.zero_grad()
        torch.autograd.backward(peft_loss(model, list(op.data)))
        clip = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        for settings in optimizer.param_groups:
            settings["lr"], settings["eps"] = params.learning_rate, params.eps
            settings["betas"] = (params.beta1, params.beta2)
            settings["weight_decay"] = params.weight_decay
        optimizer.step()
        assert ours.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)

    after = by_peft_name(trainer, trainer.slot(0).weights)
    for key, parameter in parameters.items():
        moved = parameter.detach() - before[key]
        # Elements of almost zero gradient may move by another sign: Adam divides it by itself.
        assert relative_error(after[key] - before[key], moved) < 1e-3, key


def test_an_exported_adapter_gives_the_same_logprobs_after_training(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3-tied", tmp_path)
    trainer = make_trainer(checkpoint)
    trainer.load_slot(0, ALL)
    for seed in range(3):
        finish(trainer.forward_backward(unit(sft_op(0, LENGTHS, seed))))
        trainer.optim_step({0: AdamParams(1e-2)})
    trainer.capture_adapter(0).write(tmp_path / "exported")
    data = sft_data(LENGTHS, 9)
    (output,) = finish(trainer.forward(unit(sft_op(0, LENGTHS, 9))))
    model = load_in_peft(checkpoint, tmp_path / "exported")
    for datum, found in zip(data, output.logprobs, strict=True):
        expected = peft_logprobs(model, datum).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)
