"""Checks of what a request says, each raising a ``RequestError`` that names the place.

Pure: no state, no I/O. ``where`` is the place in the request, as the client would write it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.backends.base import Capabilities, Int32Array
from training.core.errors import InvalidRequest, TooLarge, Unsupported
from training.losses import LOSSES, REFUSED
from training.losses.base import LossSpec
from training.wire.records import TextChunk, WireChunk, WireTensor, csr_cells

CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"


# --------------------------------------------------------------------------- scalars


def checked_int(value: int, where: str, low: int, high: int | None = None) -> int:
    """``value`` if low <= value <= high."""
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise InvalidRequest(f"{where} must be {span}, not {value}")
    return value


def checked_float(
    value: float, where: str, low: float = -math.inf, below: float = math.inf
) -> float:
    """``value`` if it is finite and low <= value < below."""
    if not (math.isfinite(value) and low <= value < below):
        parts = ["a finite number"]
        if low > -math.inf:
            parts.append(f"at least {low:g}")
        if below < math.inf:
            parts.append(f"less than {below:g}")
        raise InvalidRequest(f"{where} must be {', '.join(parts)}, not {value!r}")
    return value


# --------------------------------------------------------------------------- losses


def known_loss(name: str, capabilities: Capabilities) -> LossSpec:
    """Raises ``Unsupported`` for a loss refused on purpose, ``InvalidRequest`` for a typo."""
    offered = ", ".join(known for known in LOSSES if known in capabilities.losses)
    if name in REFUSED:
        raise Unsupported(REFUSED[name])
    if name not in LOSSES:
        raise InvalidRequest(f"loss_fn {name[:50]!r} is not known; known: {offered}")
    if name not in capabilities.losses:
        raise Unsupported(f"loss_fn {name!r} is not offered by this backend; offered: {offered}")
    return LOSSES[name]


def complete_config(spec: LossSpec, given: Mapping[str, float | str]) -> dict[str, float]:
    """The loss's defaults, overridden by what was given; unknown keys are refused."""
    config = dict(spec.config)
    for key, value in given.items():
        if key not in spec.config:
            allowed = ", ".join(spec.config) or "none"
            raise InvalidRequest(
                f"loss_fn_config[{key[:50]!r}] is not known to {spec.name}; allowed: {allowed}"
            )
        if isinstance(value, str):
            raise InvalidRequest(f"loss_fn_config[{key!r}] must be a number, not text")
        config[key] = checked_float(value, f"loss_fn_config[{key!r}]")
    if CLIP_LOW in config and config[CLIP_LOW] > config[CLIP_HIGH]:
        raise InvalidRequest(
            f"{CLIP_LOW} {config[CLIP_LOW]:g} is above {CLIP_HIGH} {config[CLIP_HIGH]:g} "
            "(both are bounds of the probability ratio, around 1)"
        )
    return config


# --------------------------------------------------------------------------- tokens


def prompt_tokens(
    chunks: Sequence[WireChunk], capabilities: Capabilities, where: str
) -> Int32Array:
    """All text chunks as one int32 array [N], 1 <= N <= context length, ids in the vocabulary."""
    arrays: list[NDArray[Any]] = []
    for index, chunk in enumerate(chunks):
        if not isinstance(chunk, TextChunk):
            raise Unsupported(
                f"{where}[{index}] is a chunk of type {chunk.kind!r}; this server takes text tokens"
            )
        arrays.append(chunk.tokens)
    tokens = arrays[0] if len(arrays) == 1 else np.concatenate([*arrays, np.empty(0, np.int32)])
    if not len(tokens):
        raise InvalidRequest(f"{where} has no tokens")
    if len(tokens) > capabilities.context_length:
        raise InvalidRequest(
            f"{where} has {len(tokens)} tokens; the context length of "
            f"{capabilities.base_model} is {capabilities.context_length}"
        )
    check_token_ids(tokens, capabilities.vocab_size, where)
    return tokens.astype(np.int32, copy=False)


def check_token_ids(ids: NDArray[Any], vocab_size: int, where: str, lowest: int = 0) -> None:
    """Every id of a not empty array is in [lowest, vocab_size)."""
    if lowest <= ids.min() and ids.max() < vocab_size:
        return
    place = np.argwhere((ids < lowest) | (ids >= vocab_size))[0]
    position = "[" + ", ".join(str(index) for index in place) + "]"
    raise InvalidRequest(
        f"{where}: token id {ids[tuple(place)]} at position {position} is outside "
        f"[{lowest}, {vocab_size})"
    )


# --------------------------------------------------------------------------- tensors


def tensor_shape(tensor: WireTensor, where: str) -> tuple[int, ...]:
    """The dense shape, agreeing with the numbers sent: 1-D or 2-D."""
    shape = tensor.shape
    if len(shape) > 2 or any(size < 0 for size in shape):
        raise InvalidRequest(f"{where} has the shape {_show(shape)}; expected [N] or [N, K]")
    if tensor.crow is not None:
        if len(shape) != 2:
            raise InvalidRequest(f"{where} is sparse and needs a shape [N, K], not {_show(shape)}")
        return shape
    if not shape:
        return (tensor.values.size,)
    if math.prod(shape) != tensor.values.size:
        raise InvalidRequest(
            f"{where} has the shape {_show(shape)} but {tensor.values.size} numbers"
        )
    return shape


def check_csr(tensor: WireTensor, where: str) -> None:
    """The invariants of a sparse CSR tensor, as torch has them."""
    crow, col = tensor.crow, tensor.col
    assert crow is not None
    assert col is not None
    num_rows, num_cols = tensor_shape(tensor, where)
    num_cells = tensor.values.size
    if len(crow) != num_rows + 1:
        raise InvalidRequest(f"{where}: {len(crow)} row pointers for {num_rows} rows")
    if len(col) != num_cells:
        raise InvalidRequest(f"{where}: {len(col)} column indices for {num_cells} values")
    # Compared, not subtracted: int64 differences of hostile numbers overflow.
    if crow[0] != 0 or crow[-1] != num_cells or (crow[1:] < crow[:-1]).any():
        raise InvalidRequest(f"{where}: row pointers must grow from 0 to {num_cells}")
    if not num_cells:
        return
    if col.min() < 0 or col.max() >= num_cols:
        raise InvalidRequest(f"{where}: a column index is outside [0, {num_cols})")
    rows, _ = csr_cells(crow)
    if ((rows[1:] == rows[:-1]) & (col[1:] <= col[:-1])).any():
        raise InvalidRequest(f"{where}: column indices must grow within each row")


def dense_tensor(tensor: WireTensor, where: str, max_elements: int) -> NDArray[Any]:
    """The tensor as an array [N] or [N, K]; cells that a sparse one does not list are 0."""
    shape = tensor_shape(tensor, where)
    if math.prod(shape) > max_elements:
        raise TooLarge(f"{where} has {math.prod(shape)} elements; limit {max_elements}")
    if tensor.crow is None or tensor.col is None:
        return tensor.values.reshape(shape)
    check_csr(tensor, where)
    array = np.zeros(shape, tensor.values.dtype)
    array[csr_cells(tensor.crow)[0], tensor.col] = tensor.values
    return array


def _show(shape: tuple[int, ...]) -> str:
    dims = ", ".join(str(size) for size in shape[:8])
    return f"[{dims}{', ...' if len(shape) > 8 else ''}]"
