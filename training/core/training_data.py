"""A decoded training request into what a backend computes: everything validated, nothing guessed.

Shape legend: N positions of a datum, K targets per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.backends.base import Capabilities, Datum, Float32Array, Int64Array
from training.core.errors import InvalidRequest
from training.core.validators import (
    CLIP_HIGH,
    CLIP_LOW,
    check_token_ids,
    complete_config,
    dense_tensor,
    known_loss,
    prompt_tokens,
    tensor_shape,
)
from training.losses.base import LossSpec
from training.wire.records import TrainRequest, WireDatum, WireTensor

TARGETS = "target_tokens"


@dataclass(frozen=True)
class TrainLimits:
    max_target_elements: int = 2**23
    """N * K over a request's datums. The result has as many numbers, and they are encoded between
    two turns of the event loop: 60 ms."""
    sparse_ratio: int = 64
    sparse_free_elements: int = 2**18
    """A sparse tensor of a few bytes may claim to be huge, and each element costs a number in the
    result: besides some that are free, a request has so many for each number that it brings."""


class TrainData(NamedTuple):
    loss: str
    loss_config: Mapping[str, float]
    data: list[Datum]


def to_train_op_data(
    request: TrainRequest, capabilities: Capabilities, limits: TrainLimits = TrainLimits()
) -> TrainData:
    """Raises ``InvalidRequest``, ``Unsupported`` or ``TooLarge``, naming datum and field.

    ``loss_fn_inputs`` that the loss does not read are ignored, and so are provenance spans.
    Integer inputs are widened to float32. Dense arrays are views of the request's bytes.
    """
    spec = known_loss(request.loss_fn, capabilities)
    config = complete_config(spec, request.loss_config)
    if not request.data:
        raise InvalidRequest("data is empty: a request needs at least one datum")
    left = _max_elements(request, limits)
    data: list[Datum] = []
    for index, wire_datum in enumerate(request.data):
        datum = _to_datum(wire_datum, spec, config, capabilities, left, f"data[{index}]")
        left -= datum.targets.size
        data.append(datum)
    return TrainData(spec.name, config, data)


def _max_elements(request: TrainRequest, limits: TrainLimits) -> int:
    brought = 0
    for datum in request.data:
        if (targets := datum.inputs.get(TARGETS)) is not None:
            brought += targets.values.size + (0 if targets.crow is None else len(targets.crow))
    allowed = limits.sparse_free_elements + limits.sparse_ratio * brought
    return min(limits.max_target_elements, allowed)


def _to_datum(
    datum: WireDatum,
    spec: LossSpec,
    config: Mapping[str, float],
    capabilities: Capabilities,
    max_elements: int,
    where: str,
) -> Datum:
    missing = [name for name in (TARGETS, *spec.required) if name not in datum.inputs]
    if missing:
        raise InvalidRequest(
            f"{where}: {spec.name} needs loss_fn_inputs {', '.join(missing)}; "
            f"given: {', '.join(name[:50] for name in datum.inputs) or 'none'}"
        )
    tokens = prompt_tokens(datum.chunks, capabilities, f"{where}.model_input")
    targets = _to_targets(datum.inputs[TARGETS], spec, len(tokens), max_elements, where)
    check_token_ids(targets, capabilities.vocab_size, f"{where}.{TARGETS}")
    names = (*spec.required, *(name for name in spec.optional if name in datum.inputs))
    inputs = {name: _to_input(datum.inputs[name], targets, f"{where}.{name}") for name in names}
    if CLIP_LOW in inputs or CLIP_HIGH in inputs:
        low, high = inputs.get(CLIP_LOW, config[CLIP_LOW]), inputs.get(CLIP_HIGH, config[CLIP_HIGH])
        if np.any(low > high):
            raise InvalidRequest(f"{where}: {CLIP_LOW} is above {CLIP_HIGH} at some position")
    return Datum(tokens, targets, inputs)


def _to_targets(
    tensor: WireTensor, spec: LossSpec, num_tokens: int, max_elements: int, where: str
) -> Int64Array:
    where = f"{where}.{TARGETS}"
    if tensor.values.dtype.kind != "i":
        raise InvalidRequest(f"{where} must be int64, not {tensor.values.dtype.name}")
    shape = tensor_shape(tensor, where)
    if len(shape) > spec.max_rank:
        raise InvalidRequest(
            f"{where} has the shape {list(shape)}; {spec.name} takes one target per position: [N]"
        )
    if shape[0] != num_tokens or 0 in shape:
        raise InvalidRequest(
            f"{where} has the shape {list(shape)}, but model_input has {num_tokens} tokens"
        )
    return dense_tensor(tensor, where, max_elements).astype(np.int64, copy=False)


def _to_input(tensor: WireTensor, targets: Int64Array, where: str) -> Float32Array:
    shape = tensor_shape(tensor, where)
    if shape != targets.shape:
        raise InvalidRequest(
            f"{where} has the shape {list(shape)}, but {TARGETS} has {list(targets.shape)}"
        )
    values: Float32Array = tensor.values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InvalidRequest(f"{where}: element {place} is {values[place]}; numbers must be finite")
    tensor = WireTensor(values, tensor.shape, tensor.crow, tensor.col)
    return dense_tensor(tensor, where, targets.size)
