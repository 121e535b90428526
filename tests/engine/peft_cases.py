"""transformers + PEFT as a reference: loading an exported adapter, its losses and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.training_cases import finish, gradient, unit
from training.backends.base import Datum, TrainOp
from training.engine.adapter_files import named_tensors
from training.engine.trainer import Trainer

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


def assert_gradients_are_those_of_peft(trainer: Trainer, checkpoint: Path, op: TrainOp) -> None:
    """Logprobs, loss and gradients of an operation for slot 0, whose gradient is still zero."""
    trainer.capture_adapter(0).write(checkpoint / "exported")
    (output,) = finish(trainer.forward_backward(unit(op)))
    model = load_in_peft(checkpoint, checkpoint / "exported")
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
        expected_gradient = torch.zeros_like(parameter)
        if parameter.grad is not None:  # an expert that no row chose has none
            expected_gradient = parameter.grad
        difference = (gradients[key].cpu() - expected_gradient).norm()
        assert difference <= GRADIENT_TOLERANCE * expected_gradient.norm(), key
