"""What stands between a stranger's bytes and the queue, as functions of the bytes.

Hypothesis (``test_decoders.py``) and atheris (``fuzz.py``) drive the same ones. Whatever comes,
they raise a ``RequestError`` or leave data that an engine can compute.
"""

from __future__ import annotations

import numpy as np

from tests.wire.strategies import CAPABILITIES, VOCAB_SIZE
from training.core.errors import RequestError
from training.core.sampling_data import to_sample_request
from training.core.training_data import TrainData, TrainLimits, to_train_op_data
from training.wire import requests
from training.wire.compression import decompress
from training.wire.json_base import WireModel, parse_json
from training.wire.protobuf import decode_data, open_forward_backward

MAX_BYTES = 8 * 2**20
MAX_RATIO = 200
MODELS: tuple[type[WireModel], ...] = tuple(
    found
    for found in vars(requests).values()
    if isinstance(found, type) and issubclass(found, WireModel) and found is not WireModel
)


def train_data(body: bytes) -> TrainData | None:
    """None where the body was refused."""
    try:
        envelope = open_forward_backward(body)
        data = to_train_op_data(decode_data(envelope), CAPABILITIES)
    except RequestError:
        return None
    check(data)
    return data


def check(data: TrainData) -> None:
    """What an engine relies on."""
    assert sum(datum.targets.size for datum in data.data) <= TrainLimits().max_target_elements
    for datum in data.data:
        assert 0 < len(datum.tokens) <= CAPABILITIES.context_length
        for ids in (datum.tokens, datum.targets):
            assert 0 <= ids.min() <= ids.max() < VOCAB_SIZE
        assert datum.targets.shape[0] == len(datum.tokens)
        for values in datum.inputs.values():
            assert values.shape == datum.targets.shape
            assert values.dtype == np.float32
            assert np.isfinite(values).all()


def zstd(body: bytes) -> bytes | None:
    try:
        plain = decompress(body, "zstd", MAX_BYTES, MAX_RATIO)
    except RequestError:
        return None
    assert len(plain) <= MAX_BYTES
    return plain


def json(body: bytes) -> None:
    for model in MODELS:
        try:
            found = parse_json(model, body)
            if isinstance(found, requests.SampleJsonRequest):
                to_sample_request(found, "req", None, CAPABILITIES, 1)
            if isinstance(found, requests.TrainJsonRequest):
                check(to_train_op_data(found.to_wire(1, False), CAPABILITIES))
        except RequestError:
            continue
