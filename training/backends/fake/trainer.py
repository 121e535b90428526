"""Slots of the fake: adapters, summed gradients, AdamW, and their files. No I/O but those files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from training.backends.base import (
    MAX_STEP_NORM,
    AdamParams,
    Datum,
    Float32Array,
    LoraSpec,
    OptimOutput,
    TrainOp,
    TrainOutput,
)
from training.backends.fake.model import (
    BaseWeights,
    Float64Array,
    HeadView,
    adapter_gradient,
    fresh_adapter,
    head_gradient,
    spec_groups,
)
from training.backends.state_files import reason, write_json, write_tensors
from training.core.errors import UserError
from training.losses import LOSSES
from training.losses.base import LossSpec

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass
class Slot:
    """One adapter in training: fp32 masters and moments, float64 gradient sums."""

    spec: LoraSpec
    adapter: dict[str, Float32Array]
    view: HeadView
    moments: dict[str, Float32Array]
    step: int = 0
    gradients: dict[str, Float64Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OpResult:
    """An operation computed but not yet applied: its output and its gradient by the head [V, D]."""

    output: TrainOutput
    gradient_VD: Float64Array


def new_slot(base: BaseWeights, spec: LoraSpec) -> Slot:
    adapter = fresh_adapter(spec, base.vocab_size)
    return Slot(spec, adapter, HeadView(base, spec, adapter), _zero_moments(adapter))


def compute_op(slot: Slot, op: TrainOp, context_length: int) -> OpResult:
    """Outputs and gradient of one operation, changing nothing. Raises ``UserError``."""
    loss_spec = LOSSES.get(op.loss)
    if loss_spec is None:
        raise UserError(f"unknown loss {op.loss!r}; known: {', '.join(sorted(LOSSES))}")
    if unknown := set(op.loss_config) - set(loss_spec.config):
        raise UserError(f"loss {op.loss} has no setting {', '.join(sorted(unknown))}")
    base = slot.view.base
    gradient_VD = np.zeros_like(base.head_VD)
    logprobs: list[Float32Array] = []
    total = 0.0
    for datum in op.data:
        _check_datum(datum, loss_spec, base.vocab_size, context_length)
        exact = slot.view.logprobs_of(datum.tokens, datum.targets)
        inputs = {name: value.astype(np.float64) for name, value in datum.inputs.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            value = loss_spec.fn(exact, inputs, {**loss_spec.config, **op.loss_config})
        if not np.isfinite(value.loss) or not np.isfinite(value.dlogprobs).all():
            raise UserError(f"loss {op.loss} is not finite")
        gradient_VD += head_gradient(slot.view, datum.tokens, datum.targets, value.dlogprobs)
        logprobs.append(exact.astype(np.float32))
        total += value.loss
    return OpResult(TrainOutput(logprobs, {"loss:sum": total}), gradient_VD)


def _check_datum(datum: Datum, loss: LossSpec, vocab_size: int, context_length: int) -> None:
    """The service checks more, and earlier; this keeps wrong data from being computed on."""
    num_tokens, targets = datum.num_tokens, datum.targets
    if not 0 < num_tokens <= context_length:
        raise UserError(f"a sequence has {num_tokens} tokens; 1 to {context_length} are possible")
    if targets.shape[:1] != (num_tokens,) or not 1 <= targets.ndim <= loss.max_rank:
        raise UserError(f"targets of shape {list(targets.shape)} do not fit {num_tokens} tokens")
    for name, values in (("token", datum.tokens), ("target token", targets)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < vocab_size:
            raise UserError(f"a {name} is outside the vocabulary of {vocab_size}")
    if missing := set(loss.required) - set(datum.inputs):
        raise UserError(f"loss {loss.name} needs the input {', '.join(sorted(missing))}")
    for name, value in datum.inputs.items():
        if value.shape != targets.shape:
            raise UserError(f"input {name} has shape {list(value.shape)}, not that of the targets")


def add_gradient(slot: Slot, gradient_VD: Float64Array) -> None:
    for name, gradient in adapter_gradient(slot.spec, slot.adapter, gradient_VD).items():
        old = slot.gradients.get(name)
        slot.gradients[name] = gradient if old is None else old + gradient


def adamw_step(slot: Slot, params: AdamParams) -> OptimOutput:
    """Decoupled weight decay and bias correction as in torch's AdamW; clears the gradients."""
    gradients, slot.gradients = slot.gradients, {}
    with np.errstate(over="ignore"):
        fp32 = {
            name: gradients[name].astype(np.float32) if name in gradients else np.zeros_like(weight)
            for name, weight in slot.adapter.items()
        }
    norm = float(np.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in fp32.values())))
    if not np.isfinite(norm):
        return OptimOutput(error="the gradient is not finite; the step was not taken")
    clip = params.grad_clip_norm
    factor = clip / norm if 0 < clip < norm else 1.0
    if norm * factor > MAX_STEP_NORM:
        return OptimOutput(error="the gradient is too large for the optimizer; step refused")
    adapter, moments = dict(slot.adapter), dict(slot.moments)
    step = slot.step + 1
    for name, weight in slot.adapter.items():
        gradient = fp32[name].astype(np.float64) * factor
        mean = params.beta1 * moments[f"{name}.m"] + (1 - params.beta1) * gradient
        square = params.beta2 * moments[f"{name}.v"] + (1 - params.beta2) * gradient**2
        update = (mean / (1 - params.beta1**step)) / (
            np.sqrt(square / (1 - params.beta2**step)) + params.eps
        )
        decayed = weight * (1 - params.learning_rate * params.weight_decay)
        new = decayed - params.learning_rate * update
        if not np.isfinite(new).all():
            return OptimOutput(error="the step leads to weights that are not finite; not taken")
        adapter[name] = new.astype(np.float32)
        moments[f"{name}.m"] = mean.astype(np.float32)
        moments[f"{name}.v"] = square.astype(np.float32)
    slot.adapter, slot.moments, slot.step = adapter, moments, step
    slot.view = HeadView(slot.view.base, slot.spec, adapter)
    return OptimOutput({"grad_norm": norm})


def captured(slot: Slot) -> Slot:
    """The slot as it is now; arrays are shared, since a step makes new ones."""
    return replace(slot, gradients={})


def write_adapter(slot: Slot, directory: Path, base_model: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / ADAPTER_FILE, slot.adapter)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": slot.spec.rank,
        "lora_alpha": slot.spec.alpha,
        "target_modules": list(spec_groups(slot.spec)),
    }
    write_json(directory / CONFIG_FILE, config)


def write_state(slot: Slot, directory: Path, base_model: str) -> None:
    write_adapter(slot, directory, base_model)
    write_tensors(directory / OPTIMIZER_FILE, slot.moments)
    state = {"format": 1, "step": slot.step, "spec": asdict(slot.spec)}
    write_json(directory / STATE_FILE, state)


def read_slot(base: BaseWeights, spec: LoraSpec, directory: Path, with_optimizer: bool) -> Slot:
    """A slot from ``write_state``'s files. Raises ``UserError`` for what does not fit ``spec``."""
    adapter = _read_tensors(directory / ADAPTER_FILE)
    _check_shapes(adapter, fresh_adapter(spec, base.vocab_size), directory)
    moments, step = _zero_moments(adapter), 0
    if with_optimizer:
        loaded = _read_tensors(directory / OPTIMIZER_FILE)
        _check_shapes(loaded, moments, directory)
        moments = loaded
        step = int(_read_json(directory / STATE_FILE)["step"])
    return Slot(spec, adapter, HeadView(base, spec, adapter), moments, step)


def read_view(base: BaseWeights, directory: Path) -> HeadView:
    """The weights of an exported adapter, to sample from."""
    adapter = _read_tensors(directory / ADAPTER_FILE)
    config = _read_json(directory / CONFIG_FILE)
    groups = set(config["target_modules"])
    spec = LoraSpec(
        rank=int(config["r"]),
        seed=0,
        train_attn="attn" in groups,
        train_mlp="mlp" in groups,
        train_unembed="unembed" in groups,
        alpha=float(config["lora_alpha"]),
    )
    _check_shapes(adapter, fresh_adapter(spec, base.vocab_size), directory)
    return HeadView(base, spec, adapter)


def _zero_moments(adapter: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
    return {
        f"{name}.{moment}": np.zeros_like(weight)
        for name, weight in adapter.items()
        for moment in ("m", "v")
    }


def _read_tensors(path: Path) -> dict[str, Float32Array]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path.name}: {reason(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return content


def _check_shapes(
    found: Mapping[str, Float32Array], expected: Mapping[str, Float32Array], directory: Path
) -> None:
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in expected.items()}:
        raise UserError(f"the files in {directory.name} are not of an adapter of this shape")
