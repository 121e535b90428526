"""Hypothesis over the decoders: mutated requests of the SDK, tensors that lie, frames, JSON."""

from __future__ import annotations

import resource
import struct
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.raw import request
from tests.security import decoders
from tests.security.memory import MIB
from tests.wire.strategies import cross_entropy_datums, sdk_request
from training.core.errors import RequestError
from training.core.training_data import TrainLimits
from training.wire.json_base import MAX_JSON_BYTES, parse_json
from training.wire.requests import CreateSessionRequest, RetrieveFutureRequest

INT64 = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**60, 2**62, 2**63 - 1, -(2**31), -(2**63)]),
)
INDICES = st.lists(INT64, max_size=9).map(lambda values: np.array(values, "<i8").tobytes())
BYTES = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 9).map(lambda count: np.ones(count, "<f4").tobytes()),
    st.integers(0, 9).map(lambda count: np.ones(count, "<i8").tobytes()),
)
SPARSE = st.builds(pb.SparseCsr, values=BYTES, crow_indices=INDICES, col_indices=INDICES)
DTYPES = st.sampled_from([pb.DTYPE_FLOAT32, pb.DTYPE_INT64, pb.DTYPE_INT32, pb.DTYPE_BFLOAT16, 0])
SHAPES = st.lists(INT64, max_size=4)
LYING_TENSORS = st.one_of(
    st.builds(pb.Tensor, dense=BYTES, dtype=DTYPES, shape=SHAPES),
    st.builds(pb.Tensor, sparse_csr=SPARSE, dtype=DTYPES, shape=SHAPES),
)


def peak_bytes() -> int:
    """The most that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@given(LYING_TENSORS, LYING_TENSORS, st.booleans())
def test_tensors_that_lie(targets: pb.Tensor, weights: pb.Tensor, both: bool) -> None:
    message = request("s:train:0", 1)
    message.data[0].loss_fn_inputs["weights"].CopyFrom(weights)
    if both:
        message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(targets)
    decoders.train_data(message.SerializeToString())


@given(
    st.lists(cross_entropy_datums(), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 5000),
)
def test_requests_of_the_sdk_with_bytes_changed(
    data: list[Any], changes: list[tuple[int, bytes]], cut: int
) -> None:
    body = bytearray(sdk_request(data))
    assert decoders.train_data(bytes(body)) is not None
    for place, noise in changes:
        place %= len(body)
        body[place : place + len(noise)] = noise
    decoders.train_data(bytes(body))
    decoders.train_data(bytes(body[: cut % (len(body) + 1)]))


@given(st.binary(max_size=300))
def test_rubbish(body: bytes) -> None:
    decoders.train_data(body)
    decoders.zstd(body)
    decoders.json(body)


def sparse(rows: int, columns: int, dtype: pb.DType.ValueType = pb.DTYPE_INT64) -> pb.Tensor:
    """All zeros: nothing listed."""
    csr = pb.SparseCsr(crow_indices=np.zeros(rows + 1, "<i8").tobytes())
    return pb.Tensor(sparse_csr=csr, dtype=dtype, shape=[rows, columns])


@pytest.mark.parametrize("columns", [2**60, 2**40, 2**31, 2**24, 2**19])
def test_a_few_bytes_do_not_become_a_huge_tensor(columns: int) -> None:
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(16):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = struct.pack("<i", 1)
        datum.loss_fn_inputs["target_tokens"].CopyFrom(sparse(1, columns))
        datum.loss_fn_inputs["weights"].CopyFrom(sparse(1, columns, pb.DTYPE_FLOAT32))
    body = message.SerializeToString()
    assert len(body) < 10_000
    before = peak_bytes()
    assert decoders.train_data(body) is None
    assert peak_bytes() - before < 16 * MIB


def add_sparse_inputs(datum: Any, crow: Any, col: Any, shape: list[int]) -> None:
    """Targets and weights of ``shape``, ones in the cells that are listed."""
    for name, dtype, kind in (
        ("target_tokens", "<i8", pb.DTYPE_INT64),
        ("weights", "<f4", pb.DTYPE_FLOAT32),
    ):
        csr = pb.SparseCsr(
            values=np.ones(len(col), dtype).tobytes(),
            crow_indices=crow.astype("<i8").tobytes(),
            col_indices=col.astype("<i8").tobytes(),
        )
        tensor = pb.Tensor(sparse_csr=csr, dtype=kind, shape=shape)
        datum.loss_fn_inputs[name].CopyFrom(tensor)


@pytest.mark.parametrize(("num_columns", "fits"), [(2**17, True), (2**17 + 1, False)])
def test_a_result_is_no_larger_than_the_event_loop_can_bear(num_columns: int, fits: bool) -> None:
    """However many numbers a request brings: one of 64 cells is listed."""
    rows, listed = 64, 2**11
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.ones(rows, "<i4").tobytes()
    crow = np.arange(0, rows * listed + 1, listed)
    add_sparse_inputs(datum, crow, np.tile(np.arange(listed), rows), [rows, num_columns])
    assert (decoders.train_data(message.SerializeToString()) is not None) == fits


def test_what_is_sparse_for_good_reason_passes() -> None:
    """Padding of a ragged [N, K]: a cell or two of each row are listed."""
    rows, columns = 60, 100
    crow, col = np.arange(rows + 1), np.zeros(rows)
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(1000):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.ones(rows, "<i4").tobytes()
        add_sparse_inputs(datum, crow, col, [rows, columns])
    data = decoders.train_data(message.SerializeToString())
    assert data is not None
    assert sum(datum.targets.size for datum in data.data) == 1000 * rows * columns
    assert 1000 * rows * columns < TrainLimits().max_target_elements


# --------------------------------------------------------------------------- zstd


def frame(plain: bytes, **parameters: Any) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(plain)


def header(window_log: int) -> bytes:
    """Of a frame with a window of 2**window_log bytes, no size and no data yet."""
    return b"\x28\xb5\x2f\xfd" + bytes([0x00, (window_log - 10) << 3])


ZEROS = bytes(2**20)
FRAMES: dict[str, bytes] = {
    "skippable": b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd",
    "skippable that claims 4 GB": b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + b"x" * 100,
    "a window of 2 GB": header(31) + b"\x01\x00\x00",
    "a window of 2 TB": b"\x28\xb5\x2f\xfd\x00\xff\x01\x00\x00",
    "a dictionary": frame(b"a" * 500, dict_data=zstandard.ZstdCompressionDict(b"0123456789" * 100))[
        :4
    ]
    + b"\x23\x39\x30\x00\x00"
    + b"\x10" * 20,
    "a size of 2**63": b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f" + b"\x01\x00\x00",
    "a reserved block": b"\x28\xb5\x2f\xfd\x20\x05\x07\x00\x00abcde",
    "a thousand empty frames": frame(b"") * 1000,
    "a frame in a frame in a frame": frame(frame(frame(b"rubbish"))),
    "cut": frame(ZEROS)[:-2],
    "followed by rubbish": frame(b"abc") + b"rubbish",
    "of the wrong checksum": frame(b"abc" * 99, write_checksum=True)[:-1] + b"\0",
    "legacy": b"\x22\xb5\x2f\xfd" + b"\0" * 50,
}


@pytest.mark.parametrize("name", FRAMES)
def test_hostile_frames_cost_little(name: str) -> None:
    before = peak_bytes()
    plain = decoders.zstd(FRAMES[name])
    assert plain is None or decoders.train_data(plain) is None
    assert peak_bytes() - before < 32 * MIB


@pytest.mark.parametrize("level", [1, 3, 19])
def test_bombs_of_any_level_stop_at_the_limit(level: int) -> None:
    stream = zstandard.ZstdCompressor(level=level).compressobj()
    bomb = b"".join(stream.compress(ZEROS) for _ in range(512)) + stream.flush()
    before = peak_bytes()
    assert decoders.zstd(bomb) is None
    assert decoders.zstd(frame(bomb, level=19)) is None or len(bomb) < decoders.MAX_BYTES
    assert peak_bytes() - before < 128 * MIB


@given(st.binary(max_size=400), st.integers(0, 420), st.binary(min_size=1, max_size=6))
def test_frames_with_bytes_changed(plain: bytes, place: int, noise: bytes) -> None:
    body = bytearray(frame(plain, write_checksum=True))
    body[place : place + len(noise)] = noise
    decoders.zstd(bytes(body))


# --------------------------------------------------------------------------- JSON

TEXT = st.text(max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
DEEP = 100_000
TEXTS: dict[str, bytes] = {
    "deep lists": b'{"user_metadata": {"a": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "deep objects": b'{"user_metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "a deep field that nobody knows": b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a number of a million digits": b'{"user_metadata": {"a": ' + b"9" * 10**6 + b"}}",
    "an exponent of a million digits": b'{"user_metadata": {"a": 1e' + b"9" * 10**6 + b"}}",
    "NaN": b'{"user_metadata": {"a": NaN}}',
    "infinity": b'{"user_metadata": {"a": -Infinity}}',
    "a lone surrogate": b'{"display_name": "\\ud800"}',
    "a surrogate as a key": b'{"user_metadata": {"\\udc00": 1}}',
    "NUL": b'{"display_name": "\\u0000"}',
    "a NUL byte": b'{"display_name": "\x00"}',
    "invalid UTF-8": b'{"display_name": "\xff\xfe\xc3"}',
    "an overlong slash": b'{"display_name": "\xc0\xaf"}',
    "a byte order mark": b'\xef\xbb\xbf{"display_name": "x"}',
    "UTF-16": '{"display_name": "x"}'.encode("utf-16"),
    "100,000 tags": b'{"tags": [' + b",".join([b'"x"'] * 100_000) + b"]}",
    "100,000 keys": b'{"user_metadata": {'
    + b",".join(b'"%d":1' % number for number in range(100_000))
    + b"}}",
    "a text of 30 MB": b'{"display_name": "' + b"x" * (30 * MIB) + b'"}',
    "a text of 100 MB": b'{"display_name": "' + b"x" * (100 * MIB) + b'"}',
    "30 MB of brackets": b"[" * (30 * MIB),
}
HARMLESS = {"NaN", "infinity", "an exponent of a million digits"}
"""Kept as null, in metadata that only its owner reads."""


@given(st.dictionaries(TEXT, VALUES) | VALUES)
def test_any_json(value: Any) -> None:
    import json

    decoders.json(json.dumps(value).encode())


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_json_is_refused_or_harmless(name: str) -> None:
    body = TEXTS[name]
    before = peak_bytes()
    if name in HARMLESS:
        assert parse_json(CreateSessionRequest, body).user_metadata == {"a": None}
    else:
        with pytest.raises(RequestError) as caught:
            parse_json(CreateSessionRequest, body)
        assert len(str(caught.value)) < 2000
    assert peak_bytes() - before < max(3 * min(len(body), MAX_JSON_BYTES), 32 * MIB)


def test_the_last_of_two_equal_keys_counts_everywhere() -> None:
    """One parser alone reads a body, so that no two parts of the server read it differently."""
    body = b'{"request_id": "a", "request_id": "b"}'
    assert parse_json(RetrieveFutureRequest, body).request_id == "b"
