"""Stored protobuf results as JSON, for clients that do not ask for protobuf.

The shapes are those of older SDKs: tensors as flat data with dtype and shape, NaN as null.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from training.wire import tinkercloud_pb2 as pb
from training.wire.protobuf import EMPTY_CELL_LOGPROB, EMPTY_CELL_TOKEN
from training.wire.responses import finite_metrics

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_STOP_REASONS = {pb.STOP_REASON_STOP: "stop", pb.STOP_REASON_LENGTH: "length"}
_DTYPES = {
    pb.DTYPE_FLOAT32: ("float32", np.dtype("<f4")),
    pb.DTYPE_INT32: ("int64", np.dtype("<i4")),
}


def forward_backward_output_json(body: bytes) -> bytes:
    """``body`` is what ``encode_forward_backward_output`` wrote."""
    message = pb.ForwardBackwardOutput.FromString(body)
    outputs = [
        {"logprobs": datum}
        for record in message.loss_fn_outputs
        for datum in _split(record.fields["logprobs"])
    ]
    return orjson.dumps(
        {
            "loss_fn_output_type": message.loss_fn_output_type,
            "loss_fn_outputs": outputs,
            "metrics": finite_metrics(message.metrics),
        },
        option=_OPTIONS,
    )


def sample_response_json(body: bytes) -> bytes:
    """``body`` is what ``encode_sample_response`` wrote."""
    message = pb.SampleResponse.FromString(body)
    answer: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence(sequence) for sequence in message.sequences],
        "prompt_cache_hit_tokens": message.prompt_cache_hit_tokens,
    }
    if message.HasField("prompt_logprobs"):
        answer["prompt_logprobs"] = _floats(message.prompt_logprobs)
    if message.HasField("topk_prompt_logprobs"):
        answer["topk_prompt_logprobs"] = _topk(message.topk_prompt_logprobs)
    if message.HasField("target_prompt_logprobs"):
        answer["target_prompt_logprobs"] = _tensor(message.target_prompt_logprobs)
    if message.HasField("prompt_alt_tokens"):
        answer["prompt_alt_tokens"] = {
            "tokens": _tensor(message.prompt_alt_tokens.tokens),
            "logprobs": _tensor(message.prompt_alt_tokens.logprobs),
        }
    return orjson.dumps(answer, option=_OPTIONS)


def _split(batch: pb.BatchedTensor) -> list[dict[str, Any]]:
    flat = np.frombuffer(batch.data, "<f4")
    bounds = np.frombuffer(batch.offsets, "<i8") // 4
    trailing = tuple(batch.trailing_shape)
    arrays = [flat[start:end].reshape(-1, *trailing) for start, end in pairwise(bounds)]
    return [{"data": array.ravel(), "dtype": "float32", "shape": array.shape} for array in arrays]


def _sequence(message: pb.SampledSequence) -> dict[str, Any]:
    sequence: dict[str, Any] = {
        "stop_reason": _STOP_REASONS[message.stop_reason],
        "tokens": np.frombuffer(message.tokens, "<i4"),
        "logprobs": _floats(message.logprobs),
    }
    if message.HasField("topk_sampled_logprobs"):
        sequence["topk_logprobs"] = _topk(message.topk_sampled_logprobs)
    return sequence


def _floats(buffer: bytes) -> NDArray[np.float32]:
    """orjson writes NaN as null."""
    return np.frombuffer(buffer, "<f4")


def _topk(message: pb.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    """Per position its (token, logprob) pairs, or None where nothing was computed."""
    shape = (message.length, message.k)
    token_ids = np.frombuffer(message.token_ids, "<i4").reshape(shape)
    logprobs = np.frombuffer(message.logprobs, "<f4").reshape(shape)
    filled = (token_ids != EMPTY_CELL_TOKEN) | (logprobs != np.float32(EMPTY_CELL_LOGPROB))
    rows = zip(token_ids.tolist(), logprobs.tolist(), filled.tolist(), strict=True)
    return [
        [(token, logprob) for token, logprob, used in zip(*row, strict=True) if used] or None
        for row in rows
    ]


def _tensor(message: pb.Tensor) -> dict[str, Any]:
    name, dtype = _DTYPES[message.dtype]
    tensor: dict[str, Any] = {"dtype": name, "shape": list(message.shape)}
    if message.WhichOneof("encoding") == "dense":
        return tensor | {"data": np.frombuffer(message.dense, dtype)}
    csr = message.sparse_csr
    return tensor | {
        "data": np.frombuffer(csr.values, dtype),
        "sparse_crow_indices": np.frombuffer(csr.crow_indices, "<i8"),
        "sparse_col_indices": np.frombuffer(csr.col_indices, "<i8"),
    }
