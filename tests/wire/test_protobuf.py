"""What the SDK encodes we decode equal; what we encode the SDK decodes equal."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto import tinker_public_pb2
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.topk_logprobs import topk_to_lists

from tests.wire.strategies import cross_entropy_datums, sdk_request
from training.backends.base import SampledSequence, SampleResult, StopReason, TopK, TrainOutput
from training.core.errors import InvalidRequest, TooLarge
from training.core.validators import dense_tensor
from training.wire import tinkercloud_pb2 as pb
from training.wire.protobuf import (
    MAX_DATUMS,
    MAX_PARTS,
    decode_forward_backward,
    encode_forward_backward_output,
    encode_sample_response,
    num_fields,
    open_forward_backward,
)
from training.wire.records import OtherChunk, TextChunk, WireTensor

DATUM = types.Datum(
    model_input=types.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={
        "target_tokens": types.TensorData(data=[2, 3, 4], dtype="int64"),
        "weights": types.TensorData(data=[0.0, 1.0, 1.0], dtype="float32"),
    },
)


def same(left: Any, right: Any) -> None:
    """Bit for bit: NaN equals NaN, and the dtype counts."""
    left, right = np.asarray(left), np.asarray(right)
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()


# --------------------------------------------------------------------------- requests


@given(st.lists(cross_entropy_datums(), max_size=4), st.booleans(), st.integers(0, 2**31 - 1))
def test_decodes_what_the_sdk_encodes(
    data: list[types.Datum], forward_only: bool, seq_id: int
) -> None:
    body = sdk_request(data, seq_id=seq_id, forward_only=forward_only)
    request = decode_forward_backward(body)
    assert (request.model_id, request.seq_id) == ("s:train:0", seq_id)
    assert (request.loss_fn, request.forward_only) == ("cross_entropy", forward_only)
    assert len(request.data) == len(data)
    for ours, theirs in zip(request.data, data, strict=True):
        for chunk, sent in zip(ours.chunks, theirs.model_input.chunks, strict=True):
            assert isinstance(chunk, TextChunk)
            assert isinstance(sent, types.EncodedTextChunk)
            same(chunk.tokens, np.asarray(sent.tokens, np.int32))
        assert set(ours.inputs) == set(theirs.loss_fn_inputs)
        for name, tensor in ours.inputs.items():
            sent_tensor = theirs.loss_fn_inputs[name]
            assert isinstance(sent_tensor, types.TensorData)
            assert (tensor.crow is None) == (sent_tensor.sparse_crow_indices is None)
            same(dense_tensor(tensor, name, 10**6), sent_tensor.to_numpy())


def test_arrays_are_views_of_the_body() -> None:
    (datum,) = decode_forward_backward(sdk_request([DATUM])).data
    assert not datum.inputs["weights"].values.flags.owndata


def test_newer_config_map_rules() -> None:
    body = sdk_request([DATUM], "ppo", {"clip_low_threshold": 0.5, "loss_id": "x"})
    assert open_forward_backward(body).loss_config == {"clip_low_threshold": 0.5, "loss_id": "x"}


def test_older_config_map_serves_alone() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", loss_fn="dro", loss_fn_config={"beta": 0.5})
    assert open_forward_backward(message.SerializeToString()).loss_config == {"beta": 0.5}
    message.loss_fn_config_v2["beta"].number = 0.25
    assert open_forward_backward(message.SerializeToString()).loss_config == {"beta": 0.25}
    message.loss_fn_config_v2["beta"].ClearField("number")
    with pytest.raises(InvalidRequest, match=r"loss_fn_config\['beta'\] has no value"):
        open_forward_backward(message.SerializeToString())


def test_header_is_readable_when_a_datum_is_not() -> None:
    envelope = pb.ForwardBackwardEnvelope(
        model_id="m", seq_id=7, data=[pb.Datum().SerializeToString(), b"\xff"]
    )
    body = envelope.SerializeToString()
    header = open_forward_backward(body)
    assert (header.model_id, header.seq_id) == ("m", 7)
    with pytest.raises(InvalidRequest, match=r"data\[1\] is not a valid protobuf"):
        decode_forward_backward(body)


def test_envelopes_read_the_same_bytes_as_the_full_message() -> None:
    full = pb.ForwardBackwardRequest.FromString(sdk_request([DATUM, DATUM], "ppo", {"a": 1.0}))
    envelope = pb.ForwardBackwardEnvelope.FromString(full.SerializeToString())
    for opened, whole in zip(envelope.data, full.data, strict=True):
        assert pb.Datum.FromString(opened) == whole
        entries = pb.DatumEnvelope.FromString(opened).loss_fn_inputs
        inputs = [pb.LossFnInputEntry.FromString(entry) for entry in entries]
        assert {entry.key: entry.value for entry in inputs} == dict(whole.loss_fn_inputs)
    envelope.ClearField("data")
    full.ClearField("data")
    assert envelope.SerializeToString(deterministic=True) == full.SerializeToString(
        deterministic=True
    )


def test_schema_has_the_sdk_field_numbers() -> None:
    """Every message of the SDK's file that we have too is field for field the same."""
    theirs = tinker_public_pb2.DESCRIPTOR.message_types_by_name
    ours = pb.DESCRIPTOR.message_types_by_name
    shared = set(theirs) & set(ours)
    assert set(theirs) - shared == {"SamplingParams", "StopStrings", "StopTokens"}
    for name in shared:
        for field in theirs[name].fields:
            assert ours[name].fields_by_name[field.name].number == field.number
            assert ours[name].fields_by_name[field.name].type == field.type
        assert len(theirs[name].fields) == len(ours[name].fields)


def test_unknown_fields_are_ignored() -> None:
    body = sdk_request([DATUM]) + b"\xfa\x7f\x03abc"  # field 2047, three bytes
    assert len(decode_forward_backward(body).data) == 1


def test_provenance_is_tolerated() -> None:
    span = types.PromptProvenanceSpan(sequence_id="a", offset=0, length=3)
    datum = DATUM.with_provenance([span], [span])
    assert len(decode_forward_backward(sdk_request([datum])).data[0].inputs) == 2


def test_images_and_audio_are_named_not_decoded_and_nothing_behind_them() -> None:
    text, image = types.EncodedTextChunk(tokens=[1]), types.ImageChunk(data=b"x", format="png")
    datum = types.Datum(model_input=types.ModelInput(chunks=[text, image, text, image]))
    first, *others = decode_forward_backward(sdk_request([datum])).data[0].chunks
    assert isinstance(first, TextChunk)
    assert others == [OtherChunk("image")]


def tensor_body(tensor: pb.Tensor) -> bytes:
    datum = pb.Datum(loss_fn_inputs={"weights": tensor})
    return pb.ForwardBackwardRequest(model_id="m", data=[datum]).SerializeToString()


def test_bfloat16_widens_exactly() -> None:
    values = np.array([1.5, -2.0, 0.0, np.inf], np.float32)
    upper_halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    body = tensor_body(pb.Tensor(dense=upper_halves, dtype=pb.DTYPE_BFLOAT16))
    same(decode_forward_backward(body).data[0].inputs["weights"].values, values)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (pb.Tensor(dense=b"abcde", dtype=pb.DTYPE_FLOAT32), "5 bytes are not whole float32"),
        (pb.Tensor(dense=b"abcd"), "has no known dtype"),
        (
            pb.Tensor(
                sparse_csr=pb.SparseCsr(values=b"", crow_indices=b"1234"), dtype=pb.DTYPE_INT64
            ),
            "crow_indices: 4 bytes are not whole int64",
        ),
    ],
)
def test_bytes_that_are_not_numbers(tensor: pb.Tensor, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"data\[0\].weights.*{message}"):
        decode_forward_backward(tensor_body(tensor))


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        (pb.DatumEnvelope(model_input=[b""] * 20_000), "more than 16384 chunks"),
        (pb.DatumEnvelope(loss_fn_inputs=[b""] * 65), "more than 64 loss_fn_inputs"),
        (pb.Datum(model_input_spans=[pb.ProvenanceSpan()] * 33_000), "more than 32832 protobuf"),
    ],
)
def test_too_many_parts_of_a_datum(datum: Message, message: str) -> None:
    body = pb.ForwardBackwardEnvelope(model_id="m", data=[datum.SerializeToString()])
    with pytest.raises(TooLarge, match=rf"data\[0\] has {message}"):
        decode_forward_backward(body.SerializeToString())


FULL = pb.DatumEnvelope(model_input=[pb.Chunk(encoded_text={}).SerializeToString()] * 16384)
SPANS = pb.Datum(model_input_spans=[pb.ProvenanceSpan()] * 16384)
UNKNOWN = b"\xf8\x7f\x00" * 16384  # field 2047
INPUTS = [
    pb.LossFnInputEntry(key=str(number), value={"dtype": pb.DTYPE_INT32}).SerializeToString()
    for number in range(64)
]


@pytest.mark.parametrize(
    ("datum", "fit"),
    [
        (FULL.SerializeToString(), 8),
        (SPANS.SerializeToString(), 8),
        (UNKNOWN, 8),
        (pb.DatumEnvelope(loss_fn_inputs=INPUTS).SerializeToString(), 2048),
        (b"", MAX_DATUMS),
    ],
)
def test_parts_of_all_datums_are_counted_together(datum: bytes, fit: int) -> None:
    """Each of these datums is allowed, and there may be as many datums."""
    message = pb.ForwardBackwardEnvelope(model_id="m", data=[datum] * fit)
    assert len(decode_forward_backward(message.SerializeToString()).data) == fit
    if fit < MAX_DATUMS:
        message.data.append(datum)
        with pytest.raises(TooLarge, match=rf"up to data\[{fit}\] have more than {MAX_PARTS}"):
            decode_forward_backward(message.SerializeToString())


def test_too_many_datums() -> None:
    full = pb.ForwardBackwardEnvelope(model_id="m", data=[b""] * MAX_DATUMS)
    assert len(decode_forward_backward(full.SerializeToString()).data) == MAX_DATUMS
    full.data.append(b"")
    with pytest.raises(TooLarge, match="16385 datums in one request; limit 16384"):
        decode_forward_backward(full.SerializeToString())


def test_small_messages_are_counted_before_they_grow() -> None:
    """32 million empty datums would take over a gigabyte inside the parser."""
    body = b"\x1a\x00" * 2**25
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLarge, match="more than 16484 protobuf fields"):
        open_forward_backward(body)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 2**16


GROUP = b"\xfb\x7f\x1a\x00\xfc\x7f"  # unknown field 2047 as a group around a field 3


@given(st.lists(st.sampled_from([b"\x1a\x00", GROUP, b"\x10\x05"]) | st.binary(max_size=6)))
def test_the_count_is_never_below_the_parser_s(parts: list[bytes]) -> None:
    body = b"".join(parts)
    with suppress(DecodeError):
        message = pb.ForwardBackwardEnvelope.FromString(body)
        assert num_fields(body, 1000) >= len(message.data) + len(message.ListFields()) - 1
        assert num_fields(body, 1) <= 1


@pytest.mark.parametrize("body", [b"", pb.ForwardBackwardRequest(seq_id=1).SerializeToString()])
def test_model_id_is_needed(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="model_id is missing"):
        open_forward_backward(body)


def test_generated_code_loads_on_the_promised_protobuf() -> None:
    generated = Path(pb.__file__).read_text()
    compiled_for = re.search(r"Protobuf Python Version: (\d+)\.(\d+)", generated)
    promised = re.search(r'"protobuf>=(\d+)\.(\d+)"', Path("pyproject.toml").read_text())
    assert compiled_for is not None
    assert promised is not None
    assert compiled_for.groups() == promised.groups()


# --------------------------------------------------------------------------- answers


@st.composite
def train_outputs(draw: st.DrawFn) -> TrainOutput:
    shapes = st.one_of(
        st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 6), st.integers(1, 3))
    )
    logprobs = [
        draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
        for shape in draw(st.lists(shapes, max_size=6))
    ]
    names = st.from_regex(r"[a-z_]{1,5}:(sum|mean|max)", fullmatch=True)
    return TrainOutput(logprobs, draw(st.dictionaries(names, st.floats(), max_size=3)))


@given(train_outputs())
def test_sdk_decodes_forward_backward_output(output: TrainOutput) -> None:
    decoded = deserialize_forward_backward_output(encode_forward_backward_output(output))
    assert decoded.loss_fn_output_type == "ArrayRecord"
    assert set(decoded.metrics) == set(output.metrics)
    for name, value in output.metrics.items():
        same(decoded.metrics[name], value)
    assert len(decoded.loss_fn_outputs) == len(output.logprobs)
    for theirs, ours in zip(decoded.loss_fn_outputs, output.logprobs, strict=True):
        assert theirs["logprobs"].shape == list(ours.shape)
        same(theirs["logprobs"].to_numpy(), ours)


def test_equal_widths_share_a_record() -> None:
    output = TrainOutput([np.zeros(3, np.float32)] * 1000, {"loss:sum": 1.0})
    message = pb.ForwardBackwardOutput.FromString(encode_forward_backward_output(output))
    assert [record.num_datums for record in message.loss_fn_outputs] == [1000]


@pytest.mark.parametrize("name", ["loss", "a:b:sum"])
def test_metric_names_the_sdk_cannot_combine(name: str) -> None:
    with pytest.raises(ValueError, match="is not <name>:<reduction>"):
        encode_forward_backward_output(TrainOutput([], {name: 1.0}))


LOGPROBS = st.floats(-50, 0, width=32)


@st.composite
def topks(draw: st.DrawFn, length: int) -> TopK:
    """Some rows not computed."""
    shape = (length, draw(st.integers(1, 3)))
    logprobs = draw(hnp.arrays(np.float32, shape, elements=LOGPROBS))
    computed = draw(hnp.arrays(np.bool_, (length, 1)))
    return TopK(
        draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 999))),
        np.where(computed, logprobs, np.float32(np.nan)),
    )


@st.composite
def sample_results(draw: st.DrawFn) -> SampleResult:
    num_prompt = draw(st.integers(1, 6))
    sequences = [
        SampledSequence(
            draw(hnp.arrays(np.int32, num_sampled, elements=st.integers(0, 999))),
            draw(hnp.arrays(np.float32, num_sampled, elements=LOGPROBS)),
            draw(st.sampled_from(StopReason)),
            draw(st.none() | topks(num_sampled)),
        )
        for num_sampled in draw(st.lists(st.integers(0, 5), max_size=3))
    ]
    alt_shape = (num_prompt - 1, 2)
    return SampleResult(
        sequences,
        draw(st.none() | hnp.arrays(np.float32, num_prompt, elements=st.floats(width=32))),
        draw(st.none() | topks(num_prompt)),
        draw(st.none() | hnp.arrays(np.float32, alt_shape, elements=LOGPROBS)),
        draw(
            st.none()
            | st.builds(
                TopK,
                hnp.arrays(np.int32, alt_shape, elements=st.integers(0, 999)),
                hnp.arrays(np.float32, alt_shape, elements=LOGPROBS),
            )
        ),
        draw(st.integers(0, 100)),
    )


def same_topk(theirs: Any, ours: TopK | None) -> None:
    if ours is None or not len(ours.logprobs):
        assert theirs is None
        return
    expected = [
        None if np.isnan(logprobs[0]) else list(zip(ids.tolist(), logprobs.tolist(), strict=True))
        for ids, logprobs in zip(ours.token_ids, ours.logprobs, strict=True)
    ]
    assert topk_to_lists(theirs) == expected


@given(sample_results())
def test_sdk_decodes_sample_response(result: SampleResult) -> None:
    decoded = deserialize_sample_response(encode_sample_response(result))
    assert len(decoded.sequences) == len(result.sequences)
    for theirs, ours in zip(decoded.sequences, result.sequences, strict=True):
        assert theirs.tokens == ours.tokens.tolist()
        assert (theirs.logprobs or []) == ours.logprobs.tolist()
        assert theirs.stop_reason == ours.stop_reason.value
        same_topk(theirs.topk_logprobs_np, ours.topk)
    if result.prompt_logprobs is None:
        assert decoded.prompt_logprobs_np is None
    else:
        assert decoded.prompt_logprobs_np is not None
        same(decoded.prompt_logprobs_np, result.prompt_logprobs)
    same_topk(decoded.topk_prompt_logprobs_np, result.topk_prompt)
    assert decoded.prompt_cache_hit_tokens == result.prompt_cache_hit_tokens
    if result.target_prompt_logprobs is None:
        assert decoded.target_prompt_logprobs is None
    else:
        assert decoded.target_prompt_logprobs is not None
        same(decoded.target_prompt_logprobs.to_numpy(), result.target_prompt_logprobs)
    if result.prompt_alt is None:
        assert decoded.prompt_alt_tokens is None
    else:
        assert decoded.prompt_alt_tokens is not None
        same(decoded.prompt_alt_tokens.tokens.to_numpy(), result.prompt_alt.token_ids.astype("i8"))
        same(decoded.prompt_alt_tokens.logprobs.to_numpy(), result.prompt_alt.logprobs)


def test_sparse_targets_keep_their_layout() -> None:
    """Row 0 lists columns 1 and 5, row 1 none, row 2 column 0."""
    targets = WireTensor(
        values=np.array([11, 12, 13]),
        shape=(3, 7),
        crow=np.array([0, 2, 2, 3]),
        col=np.array([1, 5, 0]),
    )
    packed = np.array([[-1, -2], [0, 0], [-3, 0]], np.float32)
    body = encode_sample_response(SampleResult([], target_prompt_logprobs=packed), targets)
    decoded = deserialize_sample_response(body).target_prompt_logprobs
    assert decoded is not None
    assert decoded.sparse_crow_indices == [0, 2, 2, 3]
    assert decoded.sparse_col_indices == [1, 5, 0]
    expected = np.zeros((3, 7), np.float32)
    expected[0, 1], expected[0, 5], expected[2, 0] = -1, -2, -3
    same(decoded.to_numpy(), expected)


def test_a_tensor_of_many_dimensions_is_refused() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1] * 1000, dense=b"\0" * 4)
    message.data.append(pb.Datum(loss_fn_inputs={"weights": tensor}))
    with pytest.raises(InvalidRequest, match="1000 dimensions"):
        decode_forward_backward(message.SerializeToString())
