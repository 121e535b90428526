from __future__ import annotations

import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.strategies import CAPABILITIES  # noqa: F401  (lifts the time limits)
from training.core.errors import InvalidRequest, RequestError, TooLarge, Unsupported
from training.wire.compression import RATIO_FREE_BYTES, decompress

MAX_BYTES = 64 * 2**20
MAX_RATIO = 200


def compressed(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body)


def test_identity_within_the_limit() -> None:
    for encoding in (None, "identity"):
        assert decompress(b"abc", encoding, 3, MAX_RATIO) == b"abc"
        with pytest.raises(TooLarge, match="body has 4 bytes; limit 3"):
            decompress(b"abcd", encoding, 3, MAX_RATIO)


@given(st.binary(max_size=10_000), st.integers(1, 300))
def test_round_trip(body: bytes, repeats: int) -> None:
    body *= repeats
    assert decompress(compressed(body), "zstd", MAX_BYTES, MAX_RATIO) == body


def test_a_frame_that_does_not_tell_its_size() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    body = stream.compress(b"abc" * 1000) + stream.flush()
    assert decompress(body, "ZSTD", MAX_BYTES, MAX_RATIO) == b"abc" * 1000


def test_repeated_tokens_are_no_bomb() -> None:
    body = b"\1\0\0\0" * (RATIO_FREE_BYTES // 4)
    assert len(compressed(body)) * 1000 < len(body)
    assert decompress(compressed(body), "zstd", MAX_BYTES, MAX_RATIO) == body


@pytest.mark.parametrize("max_ratio", [MAX_RATIO, 10**9])
def test_a_bomb_is_refused_in_bounded_memory(max_ratio: int) -> None:
    """A gigabyte in 100 kB: stopped by the ratio, and without one by the size limit."""
    stream = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(2**20)
    bomb = b"".join(stream.compress(zeros) for _ in range(1024)) + stream.flush()
    assert len(bomb) < 2**20
    tracemalloc.start()
    with pytest.raises(TooLarge, match="decompresses to more than"):
        decompress(bomb, "zstd", MAX_BYTES, max_ratio)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_BYTES


def test_a_size_limit_counts_after_decompression() -> None:
    with pytest.raises(TooLarge, match="more than 999 bytes"):
        decompress(compressed(bytes(1000)), "zstd", 999, MAX_RATIO)
    assert decompress(compressed(bytes(1000)), "zstd", 1000, MAX_RATIO) == bytes(1000)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends inside"),
        (b"not zstd at all", "not valid zstd"),
        (compressed(b"abc" * 100)[:-1], "ends inside"),
        (compressed(b"abc") + b"x", "bytes after"),
        (compressed(b"abc") + compressed(b"abc"), "bytes after"),
        (compressed(b"abc") + bytes(5000), "bytes after"),
    ],
)
def test_damaged_bodies(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decompress(body, "zstd", MAX_BYTES, MAX_RATIO)


def test_other_encodings_are_refused() -> None:
    with pytest.raises(Unsupported, match="'gzip'"):
        decompress(b"", "gzip", MAX_BYTES, MAX_RATIO)


@given(st.binary(max_size=200), st.binary(max_size=2000), st.integers(0, 2000))
def test_garbage_raises_request_errors_alone(noise: bytes, text: bytes, place: int) -> None:
    frame = bytearray(compressed(text))
    frame[place : place + len(noise)] = noise
    with suppress(RequestError):
        decompress(bytes(frame), "zstd", MAX_BYTES, MAX_RATIO)
