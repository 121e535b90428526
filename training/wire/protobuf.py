"""Protobuf bodies to records and results to protobuf bodies. Knows neither losses nor models.

A forward_backward body is opened one level at a time (see the ``*Envelope`` messages of
tinkercloud.proto): its header stays readable when a datum is damaged, errors name the datum, and
counts are checked before small messages become large objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from training.backends.base import Float32Array, SampleResult, StopReason, TopK, TrainOutput
from training.core.errors import InvalidRequest, TooLarge
from training.wire import tinkercloud_pb2 as pb
from training.wire.json_base import MAX_ID_CHARS
from training.wire.records import (
    OtherChunk,
    TextChunk,
    TrainRequest,
    WireChunk,
    WireDatum,
    WireTensor,
    csr_cells,
)

MAX_DATUMS = 16384
MAX_CHUNKS_PER_DATUM = 16384
MAX_PARTS = 2**17
"""Fields of all datums of a request together: chunks, inputs, spans and what we do not know. An
empty one takes two bytes on the wire and a hundred times as much here. ``MAX_DATUMS`` datums may
have eight each: a chunk and seven inputs, say."""
MAX_INPUTS_PER_DATUM = 64
MAX_DATUM_BYTES = 64 * 2**20
MAX_RANK = 8
"""Of a tensor, before anybody looks at what it is for."""
_MAX_HEADER_FIELDS = 100
_MAX_SPANS_PER_DATUM = 16384

ARRAY_RECORD = "ArrayRecord"
EMPTY_CELL_TOKEN = 0
EMPTY_CELL_LOGPROB = -99999.0
"""The SDK's marks for a top-k cell that holds nothing."""

_NUMPY_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_STOP_REASONS = {
    StopReason.STOP: pb.STOP_REASON_STOP,
    StopReason.LENGTH: pb.STOP_REASON_LENGTH,
}
_MessageT = TypeVar("_MessageT", bound=Message)


# --------------------------------------------------------------------------- requests


@dataclass(frozen=True, eq=False, slots=True)
class TrainEnvelope:
    """A forward_backward request whose datums are still encoded."""

    model_id: str
    seq_id: int
    loss_fn: str
    loss_config: Mapping[str, float | str]
    forward_only: bool
    encoded_data: Sequence[bytes]


def open_forward_backward(body: bytes) -> TrainEnvelope:
    """Reads all but the datums. Raises ``InvalidRequest`` for what is not such a message."""
    _check_num_fields(body, MAX_DATUMS + _MAX_HEADER_FIELDS, "body")
    message = _parse(pb.ForwardBackwardEnvelope, body, "body")
    if not message.model_id:
        raise InvalidRequest("model_id is missing")
    if len(message.model_id) > MAX_ID_CHARS or "\0" in message.model_id:
        raise InvalidRequest(f"model_id {message.model_id[:50]!r} is none of this server's")
    if message.seq_id < 0:
        raise InvalidRequest(f"seq_id {message.seq_id} is negative")
    return TrainEnvelope(
        model_id=message.model_id,
        seq_id=message.seq_id,
        loss_fn=message.loss_fn,
        loss_config=_loss_config(message),
        forward_only=message.forward_only,
        encoded_data=message.data,
    )


def decode_data(envelope: TrainEnvelope) -> TrainRequest:
    """Decodes the datums. Raises ``InvalidRequest`` or ``TooLarge`` naming datum and field."""
    if len(envelope.encoded_data) > MAX_DATUMS:
        raise TooLarge(f"{len(envelope.encoded_data)} datums in one request; limit {MAX_DATUMS}")
    data: list[WireDatum] = []
    parts_left = MAX_PARTS
    for index, encoded in enumerate(envelope.encoded_data):
        parts_left -= _check_parts(encoded, parts_left, f"data[{index}]")
        data.append(_decode_datum(encoded, f"data[{index}]"))
    return TrainRequest(
        model_id=envelope.model_id,
        seq_id=envelope.seq_id,
        loss_fn=envelope.loss_fn,
        loss_config=envelope.loss_config,
        forward_only=envelope.forward_only,
        data=data,
    )


def decode_forward_backward(body: bytes) -> TrainRequest:
    return decode_data(open_forward_backward(body))


def _parse(kind: type[_MessageT], encoded: bytes, where: str) -> _MessageT:
    message = kind()
    try:
        message.ParseFromString(encoded)
    except DecodeError:
        raise InvalidRequest(f"{where} is not a valid protobuf {kind.__name__}") from None
    return message


def _check_num_fields(encoded: bytes, limit: int, where: str) -> int:
    """The number of fields. Raises ``TooLarge`` before a parser makes an object of each: an empty
    element takes two bytes here and eight times as much there, or more."""
    count = num_fields(encoded, limit + 1)
    if count > limit:
        raise TooLarge(f"{where} has more than {limit} protobuf fields")
    return count


def num_fields(encoded: bytes, enough: int) -> int:
    """Fields of a message, those inside groups included; stops counting at ``enough``.

    Ends where the message stops being well-formed: a parser stops there too.
    """
    place = count = 0
    while place < len(encoded) and count < enough:
        count += 1
        tag, place = _varint(encoded, place)
        match tag & 7:
            case 0:
                _, place = _varint(encoded, place)
            case 1:
                place += 8
            case 2:
                length, place = _varint(encoded, place)
                place += length
            case 5:
                place += 4
            case 3 | 4:  # begin and end of a group: its fields follow
                pass
            case _:
                break
    return count


def _varint(encoded: bytes, start: int) -> tuple[int, int]:
    """Value of the varint at ``start`` and the place after it; cut short at the end."""
    value = 0
    for index, byte in enumerate(encoded[start : start + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, start + index + 1
    return value, start + 10


def _loss_config(message: pb.ForwardBackwardEnvelope) -> dict[str, float | str]:
    """The newer map rules when it has entries; older clients send numbers alone."""
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    config: dict[str, float | str] = {}
    for key, value in message.loss_fn_config_v2.items():
        match value.WhichOneof("value"):
            case "number":
                config[key] = value.number
            case "text":
                config[key] = value.text
            case None:
                raise InvalidRequest(f"loss_fn_config[{key[:50]!r}] has no value")
    return config


def _check_parts(encoded: bytes, left: int, where: str) -> int:
    """The number of a datum's fields, where they fit the datum's limit and what the request has
    ``left``."""
    if len(encoded) > MAX_DATUM_BYTES:
        raise TooLarge(f"{where} has {len(encoded)} bytes; limit {MAX_DATUM_BYTES}")
    limit = MAX_CHUNKS_PER_DATUM + MAX_INPUTS_PER_DATUM + _MAX_SPANS_PER_DATUM
    if left >= limit:
        return _check_num_fields(encoded, limit, where)
    count = num_fields(encoded, left + 1)
    if count > left:
        raise TooLarge(f"the datums up to {where} have more than {MAX_PARTS} protobuf fields")
    return count


def _decode_datum(encoded: bytes, where: str) -> WireDatum:
    message = _parse(pb.DatumEnvelope, encoded, where)
    if len(message.model_input) > MAX_CHUNKS_PER_DATUM:
        raise TooLarge(f"{where} has more than {MAX_CHUNKS_PER_DATUM} chunks")
    if len(message.loss_fn_inputs) > MAX_INPUTS_PER_DATUM:
        raise TooLarge(f"{where} has more than {MAX_INPUTS_PER_DATUM} loss_fn_inputs")
    inputs: dict[str, WireTensor] = {}
    for item in message.loss_fn_inputs:
        entry = _parse(pb.LossFnInputEntry, item, f"{where}.loss_fn_inputs")
        inputs[entry.key] = _decode_tensor(entry.value, f"{where}.{entry.key[:50]}")
    return WireDatum(_decode_chunks(message.model_input, f"{where}.model_input"), inputs)


def _decode_chunks(encoded: Sequence[bytes], where: str) -> list[WireChunk]:
    """Up to the first one that is not text: with it the datum is refused, whatever follows."""
    chunks: list[WireChunk] = []
    for each in encoded:
        chunks.append(_decode_chunk(each, where))
        if isinstance(chunks[-1], OtherChunk):
            break
    return chunks


def _decode_chunk(encoded: bytes, where: str) -> WireChunk:
    message = _parse(pb.Chunk, encoded, where)
    match message.WhichOneof("chunk"):
        case "encoded_text":
            tokens = _numbers(message.encoded_text.tokens, _NUMPY_DTYPES[pb.DTYPE_INT32], where)
            return TextChunk(tokens)
        case None:
            return OtherChunk("unknown")
        case kind:
            return OtherChunk(kind)


def _decode_tensor(message: pb.Tensor, where: str) -> WireTensor:
    dtype = _NUMPY_DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where} has no known dtype (value {message.dtype})")
    if len(message.shape) > MAX_RANK:
        raise InvalidRequest(f"{where} has {len(message.shape)} dimensions; limit {MAX_RANK}")
    shape = tuple(message.shape)
    if message.WhichOneof("encoding") == "sparse_csr":
        csr = message.sparse_csr
        int64 = _NUMPY_DTYPES[pb.DTYPE_INT64]
        return WireTensor(
            values=_widened(_numbers(csr.values, dtype, where), message.dtype),
            shape=shape,
            crow=_numbers(csr.crow_indices, int64, f"{where} crow_indices"),
            col=_numbers(csr.col_indices, int64, f"{where} col_indices"),
        )
    # No encoding at all is proto3's way to write an empty dense tensor.
    return WireTensor(_widened(_numbers(message.dense, dtype, where), message.dtype), shape)


def _numbers(buffer: bytes, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """A read-only view, no copy."""
    if len(buffer) % dtype.itemsize:
        raise InvalidRequest(f"{where}: {len(buffer)} bytes are not whole {dtype.name} numbers")
    return np.frombuffer(buffer, dtype)


def _widened(values: NDArray[Any], dtype: int) -> NDArray[Any]:
    """bfloat16 is the upper half of a float32."""
    if dtype != pb.DTYPE_BFLOAT16:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


# --------------------------------------------------------------------------- answers


def encode_forward_backward_output(output: TrainOutput) -> bytes:
    """``logprobs`` [N] or [N, K] of consecutive datums with equal K share one buffer.

    Raises ``ValueError`` for a metric whose name the SDK could not combine over chunks.
    """
    message = pb.ForwardBackwardOutput(loss_fn_output_type=ARRAY_RECORD)
    for trailing_shape, run in groupby(output.logprobs, key=lambda array: array.shape[1:]):
        arrays = list(run)
        record = message.loss_fn_outputs.add(type_tag=ARRAY_RECORD, num_datums=len(arrays))
        batch = record.fields["logprobs"]
        flat = np.concatenate([array.ravel() for array in arrays])
        ends = np.cumsum([array.size for array in arrays], dtype=np.int64) * 4
        batch.data = _float_bytes(flat)
        batch.offsets = np.concatenate([[0], ends]).astype("<i8").tobytes()
        batch.dtype = pb.DTYPE_FLOAT32
        batch.trailing_shape.extend(trailing_shape)
    for name, value in output.metrics.items():
        if name.count(":") != 1:
            raise ValueError(f"metric {name!r} is not <name>:<reduction>")
        message.metrics[name] = value
    return message.SerializeToString()


def encode_sample_response(result: SampleResult, targets: WireTensor | None = None) -> bytes:
    """``targets`` is the request's ``target_prompt_logprobs``: the answer has its layout."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sampled in result.sequences:
        sequence = message.sequences.add(
            stop_reason=_STOP_REASONS[sampled.stop_reason],
            tokens=_int32_bytes(sampled.tokens),
            logprobs=_float_bytes(sampled.logprobs),
        )
        if sampled.topk is not None:
            _fill_topk(sequence.topk_sampled_logprobs, sampled.topk)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _float_bytes(result.prompt_logprobs)
    if result.topk_prompt is not None:
        _fill_topk(message.topk_prompt_logprobs, result.topk_prompt)
    if result.target_prompt_logprobs is not None:
        _fill_targets(message.target_prompt_logprobs, result.target_prompt_logprobs, targets)
    if result.prompt_alt is not None:
        alternatives = message.prompt_alt_tokens
        _fill_dense(alternatives.tokens, pb.DTYPE_INT32, result.prompt_alt.token_ids)
        _fill_dense(alternatives.logprobs, pb.DTYPE_FLOAT32, result.prompt_alt.logprobs)
    return message.SerializeToString()


def _fill_topk(message: pb.TopkLogprobs, topk: TopK) -> None:
    empty = np.isnan(topk.logprobs)
    message.length, message.k = topk.logprobs.shape
    message.token_ids = _int32_bytes(np.where(empty, EMPTY_CELL_TOKEN, topk.token_ids))
    message.logprobs = _float_bytes(np.where(empty, EMPTY_CELL_LOGPROB, topk.logprobs))


def _fill_dense(message: pb.Tensor, dtype: pb.DType, array: NDArray[Any]) -> None:
    message.dtype = dtype
    message.shape.extend(array.shape)
    message.dense = array.astype(_NUMPY_DTYPES[dtype], copy=False).tobytes()


def _fill_targets(message: pb.Tensor, logprobs: Float32Array, targets: WireTensor | None) -> None:
    """Undoes the packing of ``core.sampling_data``: listed cell j of a CSR row is column j."""
    if targets is None or targets.crow is None or targets.col is None:
        _fill_dense(message, pb.DTYPE_FLOAT32, logprobs)
        return
    rows, columns = csr_cells(targets.crow)
    message.dtype = pb.DTYPE_FLOAT32
    message.shape.extend(targets.shape)
    message.sparse_csr.values = _float_bytes(logprobs[rows, columns])
    message.sparse_csr.crow_indices = targets.crow.astype("<i8", copy=False).tobytes()
    message.sparse_csr.col_indices = targets.col.astype("<i8", copy=False).tobytes()


def _float_bytes(array: NDArray[Any]) -> bytes:
    return array.astype("<f4", copy=False).tobytes()


def _int32_bytes(array: NDArray[Any]) -> bytes:
    return array.astype("<i4", copy=False).tobytes()
