from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types

from tests.wire.strategies import (
    CAPABILITIES,
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    cross_entropy_datums,
    sdk_request,
)
from training.core.errors import InvalidRequest, RequestError, TooLarge, Unsupported
from training.core.training_data import TrainLimits, to_train_op_data
from training.losses import LOSSES
from training.wire import tinkercloud_pb2 as pb
from training.wire.protobuf import decode_forward_backward
from training.wire.records import TextChunk, TrainRequest, WireDatum, WireTensor


def floats(*values: float) -> WireTensor:
    return WireTensor(np.array(values, np.float32), (len(values),))


def ints(*values: int) -> WireTensor:
    return WireTensor(np.array(values, np.int64), (len(values),))


def datum(num_tokens: int = 3, /, **inputs: WireTensor) -> WireDatum:
    return WireDatum([TextChunk(np.arange(num_tokens, dtype=np.int32))], inputs)


def request(*data: WireDatum, loss: str = "cross_entropy", **config: float | str) -> TrainRequest:
    return TrainRequest("m", 1, loss, config, False, data)


GOOD = datum(target_tokens=ints(1, 2, 3), weights=floats(0, 1, 1))
RL_GOOD = datum(
    target_tokens=ints(1, 2, 3), logprobs=floats(-1, -1, -1), advantages=floats(0, 1, 2)
)


def changed(base: WireDatum, **inputs: WireTensor) -> WireDatum:
    return replace(base, inputs={**base.inputs, **inputs})


# --------------------------------------------------------------------------- what the SDK sends


@given(st.lists(cross_entropy_datums(), min_size=1, max_size=4))
def test_agrees_with_the_sdk(data: list[types.Datum]) -> None:
    request = decode_forward_backward(sdk_request(data))
    loss, config, ours = to_train_op_data(request, CAPABILITIES)
    assert (loss, config) == ("cross_entropy", {})
    for mine, theirs in zip(ours, data, strict=True):
        assert mine.tokens.tolist() == theirs.model_input.to_ints()
        targets, weights = (theirs.loss_fn_inputs[key] for key in ("target_tokens", "weights"))
        assert isinstance(targets, types.TensorData)
        assert isinstance(weights, types.TensorData)
        np.testing.assert_array_equal(mine.targets, targets.to_numpy(), strict=True)
        assert set(mine.inputs) == {"weights"}
        np.testing.assert_array_equal(mine.inputs["weights"], weights.to_numpy(), strict=True)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_gets_what_it_needs(loss: str) -> None:
    spec = LOSSES[loss]
    inputs = {name: floats(1, 1, 1) for name in (*spec.required, *spec.optional)}
    good = datum(3, target_tokens=ints(1, 2, 3), **inputs, unread=floats(1))
    result = to_train_op_data(request(good, loss=loss), CAPABILITIES)
    assert result.loss == loss
    assert result.loss_config == spec.config
    assert set(result.data[0].inputs) == set(inputs)
    for name in spec.required:
        lacking = {key: value for key, value in good.inputs.items() if key != name}
        with pytest.raises(
            InvalidRequest, match=rf"data\[0\]: {loss} needs loss_fn_inputs {name};"
        ):
            to_train_op_data(request(replace(good, inputs=lacking), loss=loss), CAPABILITIES)


def test_dense_inputs_are_not_copied() -> None:
    (mine,) = to_train_op_data(request(GOOD), CAPABILITIES).data
    assert np.shares_memory(mine.targets, GOOD.inputs["target_tokens"].values)
    assert np.shares_memory(mine.inputs["weights"], GOOD.inputs["weights"].values)


def test_integers_are_widened() -> None:
    targets = WireTensor(np.array([1, 2, 3], np.int32))
    mixed = changed(GOOD, target_tokens=targets, weights=ints(0, 1, 1))
    (mine,) = to_train_op_data(request(mixed), CAPABILITIES).data
    assert mine.targets.dtype == np.dtype(np.int64)
    assert mine.inputs["weights"].dtype == np.dtype(np.float32)


def test_clip_thresholds_per_token() -> None:
    limits = {"clip_low_threshold": floats(0.5, 0.5, 0.9)}
    (mine,) = to_train_op_data(request(changed(RL_GOOD, **limits), loss="ppo"), CAPABILITIES).data
    assert mine.inputs["clip_low_threshold"].tolist() == pytest.approx([0.5, 0.5, 0.9])
    too_high = changed(RL_GOOD, clip_low_threshold=floats(0.5, 1.3, 0.9))
    with pytest.raises(InvalidRequest, match=r"data\[0\]: clip_low_threshold is above"):
        to_train_op_data(request(too_high, loss="ppo"), CAPABILITIES)


# --------------------------------------------------------------------------- what is refused

TWO_D = WireTensor(np.zeros(6, np.int64), (3, 2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(GOOD, weights=floats(1, 1)), r"weights has the shape \[2\], but target.* \[3\]"),
        (changed(GOOD, weights=floats(1, float("nan"), 1)), "weights: element 1 is nan"),
        (changed(GOOD, weights=floats(1, 1, float("inf"))), "weights: element 2 is inf"),
        (changed(GOOD, target_tokens=floats(1, 2, 3)), "target_tokens must be int64, not float32"),
        (changed(GOOD, target_tokens=ints(1, 2)), r"target_tokens .* \[2\], but .* 3 tokens"),
        (changed(GOOD, target_tokens=ints(1, -100, 2)), r"target_tokens: token id -100 at .*\[1\]"),
        (changed(GOOD, target_tokens=ints(1, 2, VOCAB_SIZE)), "target_tokens: token id 1000"),
        (changed(GOOD, target_tokens=TWO_D), r"weights has the shape \[3\], but .* \[3, 2\]"),
        (
            changed(GOOD, target_tokens=WireTensor(np.zeros(0, np.int64), (3, 0))),
            r"target_tokens has the shape \[3, 0\]",
        ),
        (datum(0, **GOOD.inputs), "model_input has no tokens"),
        (datum(CONTEXT_LENGTH + 1, **GOOD.inputs), "model_input has 65 tokens"),
    ],
)
def test_bad_datums_are_named(bad: WireDatum, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^data\[1\]\.{message}"):
        to_train_op_data(request(GOOD, bad), CAPABILITIES)


def test_missing_targets_tell_what_was_given() -> None:
    with pytest.raises(
        InvalidRequest, match=r"data\[0\]: cross_entropy needs .* target_tokens; given: weights$"
    ):
        to_train_op_data(request(datum(weights=floats(1, 1, 1))), CAPABILITIES)


def test_one_target_per_position() -> None:
    with pytest.raises(InvalidRequest, match=r"ppo takes one target per position: \[N\]"):
        to_train_op_data(request(changed(RL_GOOD, target_tokens=TWO_D), loss="ppo"), CAPABILITIES)


def test_no_data() -> None:
    with pytest.raises(InvalidRequest, match="data is empty"):
        to_train_op_data(request(), CAPABILITIES)


def test_config_and_loss_are_checked_first() -> None:
    with pytest.raises(InvalidRequest, match="allowed: none"):
        to_train_op_data(request(GOOD, clip=1.0), CAPABILITIES)
    with pytest.raises(Unsupported, match="not published"):
        to_train_op_data(request(GOOD, loss="stable_reinforce"), CAPABILITIES)
    with pytest.raises(Unsupported, match="forward_backward_custom"):
        to_train_op_data(request(GOOD, loss="custom", loss_id="x"), CAPABILITIES)


def sparse(shape: tuple[int, int], dtype: Any) -> WireTensor:
    """Nothing listed."""
    return WireTensor(
        np.zeros(0, dtype), shape, np.zeros(shape[0] + 1, np.int64), np.zeros(0, np.int64)
    )


def test_dense_size_is_limited_over_the_request() -> None:
    wide = datum(target_tokens=sparse((3, 10), np.int64), weights=sparse((3, 10), np.float32))
    limits = TrainLimits(max_target_elements=60)
    assert len(to_train_op_data(request(wide, wide), CAPABILITIES, limits).data) == 2
    with pytest.raises(TooLarge, match=r"data\[2\].target_tokens has 30 elements; limit 0"):
        to_train_op_data(request(wide, wide, wide), CAPABILITIES, limits)


# --------------------------------------------------------------------------- fuzz

INT64 = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(-1, 6)


@st.composite
def hostile_tensors(draw: st.DrawFn) -> pb.Tensor:
    numbers = st.lists(SMALL | INT64, max_size=6).map(lambda ns: np.array(ns, "<i8").tobytes())
    tensor = pb.Tensor(dtype=draw(st.integers(0, 5)))  # type: ignore[arg-type]
    tensor.shape.extend(draw(st.lists(SMALL | INT64, max_size=3)))
    if draw(st.booleans()):
        tensor.dense = draw(numbers | st.binary(max_size=40))
    else:
        tensor.sparse_csr.values = draw(numbers | st.binary(max_size=40))
        tensor.sparse_csr.crow_indices = draw(numbers)
        tensor.sparse_csr.col_indices = draw(numbers)
    return tensor


@st.composite
def hostile_bodies(draw: st.DrawFn) -> bytes:
    """Well-formed protobuf, hostile numbers."""
    message = pb.ForwardBackwardRequest(
        model_id="m", seq_id=draw(st.integers(-5, 5)), loss_fn=draw(st.sampled_from([*LOSSES, "x"]))
    )
    names = ["target_tokens", "weights", "logprobs", "advantages", "clip_low_threshold"]
    for _ in range(draw(st.integers(0, 2))):
        datum = message.data.add()
        for _ in range(draw(st.integers(0, 2))):
            datum.model_input.add().encoded_text.tokens = draw(
                st.binary(max_size=12) | st.just(bytes(12))
            )
        for name in draw(st.lists(st.sampled_from(names), unique=True)):
            datum.loss_fn_inputs[name].CopyFrom(draw(hostile_tensors()))
    for key in draw(st.lists(st.sampled_from(["beta", "clip_low_threshold", "x"]))):
        message.loss_fn_config_v2[key].number = draw(st.floats())
    return message.SerializeToString()


@st.composite
def mutated_bodies(draw: st.DrawFn) -> bytes:
    body = bytearray(sdk_request(draw(st.lists(cross_entropy_datums(), min_size=1, max_size=2))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(body) - 1))
        match draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                body[place] = draw(st.integers(0, 255))
            case "cut":
                del body[place : place + draw(st.integers(1, 8))]
            case "insert":
                body[place:place] = draw(st.binary(min_size=1, max_size=4))
        if not body:
            break
    return bytes(body)


@given(hostile_bodies() | mutated_bodies() | st.binary(max_size=100))
def test_garbage_raises_request_errors_alone(body: bytes) -> None:
    with suppress(RequestError):
        result = to_train_op_data(decode_forward_backward(body), CAPABILITIES)
        for datum in result.data:
            assert 0 < datum.num_tokens == len(datum.targets)
            assert all(array.shape == datum.targets.shape for array in datum.inputs.values())
            assert all(np.isfinite(array).all() for array in datum.inputs.values())
