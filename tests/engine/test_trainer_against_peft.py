"""Our step against transformers + PEFT + torch in fp32: logprobs, gradients, trained weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import CONFIGS, make_checkpoint
from tests.engine.training_cases import (
    ALL,
    ATTN,
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
from training.backends.base import AdamParams, Datum, LoraSpec
from training.engine.adapter_files import named_tensors
from training.engine.trainer import Trainer

LENGTHS = (20, 33, 20, 7, 40)
LOGPROB_TOLERANCE = 2e-5
"""fp32 logits of size ~30 carry an error of about 4e-6 each way."""
GRADIENT_TOLERANCE = 1e-5
"""Relative, of the norm of each matrix."""


def load_in_peft(checkpoint: Path, adapter: Path) -> PeftModel:
    """The exported adapter in PEFT. A tied head is untied first: our unembed adapter changes the
    head alone, and PEFT on tied weights would be asked to change the embedding too."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    if base.config.tie_word_embeddings:
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calling transformers; others raise
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def peft_logprobs(model: PeftModel, datum: Datum) -> torch.Tensor:
    tokens = torch.from_numpy(datum.tokens).long()[None]
    logprobs: torch.Tensor = model(tokens).logits[0].log_softmax(-1)
    return logprobs.gather(1, torch.from_numpy(datum.targets)[:, None])[:, 0]


def peft_loss(model: PeftModel, data: list[Datum]) -> torch.Tensor:
    losses = [
        -(peft_logprobs(model, datum) * torch.from_numpy(datum.inputs["weights"])).sum()
        for datum in data
    ]
    return torch.stack(losses).sum()


def peft_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def by_peft_name(trainer: Trainer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return named_tensors(trainer.slot(0).layout, flat)


@pytest.mark.parametrize(
    ("name", "spec"),
    [(name, ALL) for name in CONFIGS if name != "wide"]
    + [("llama", spec) for spec in (ATTN, MLP, UNEMBED)]
    + [("llama-tied", UNEMBED), ("qwen3", ATTN), ("qwen2", LoraSpec(4, 5, train_attn=False))],
)
def test_logprobs_and_gradients(name: str, spec: LoraSpec, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(name, tmp_path)
    trainer = make_trainer(checkpoint, spec, micro_batch_tokens=64)
    trainer.export_adapter(0, tmp_path / "exported")
    op = sft_op(0, LENGTHS)
    (output,) = finish(trainer.forward_backward(unit(op)))

    model = load_in_peft(checkpoint, tmp_path / "exported")
    loss = peft_loss(model, list(op.data))
    torch.autograd.backward(loss)

    for datum, found in zip(op.data, output.logprobs, strict=True):
        expected = peft_logprobs(model, datum).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=LOGPROB_TOLERANCE, rtol=0)
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    parameters = peft_parameters(model)
    gradients = by_peft_name(trainer, gradient(trainer))
    assert parameters.keys() == gradients.keys()
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        assert relative_error(gradients[key], parameter.grad) < GRADIENT_TOLERANCE, key


def test_weights_after_several_steps(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama-tied", tmp_path)
    trainer = make_trainer(checkpoint, ALL)
    trainer.export_adapter(0, tmp_path / "exported")
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
    trainer.export_adapter(0, tmp_path / "exported")
    data = sft_data(LENGTHS, 9)
    (output,) = finish(trainer.forward(unit(sft_op(0, LENGTHS, 9))))
    model = load_in_peft(checkpoint, tmp_path / "exported")
    for datum, found in zip(data, output.logprobs, strict=True):
        expected = peft_logprobs(model, datum).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)
