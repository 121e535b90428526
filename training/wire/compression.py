"""Undoes ``Content-Encoding: zstd``, in bounded memory whatever the body claims to be."""

from __future__ import annotations

import zstandard

from training.core.errors import InvalidRequest, TooLarge, Unsupported

RATIO_FREE_BYTES = 16 * 2**20
"""Below this size no ratio is suspicious: repeated tokens compress a thousandfold."""

_PIECE_BYTES = 1024
"""Input per step. zstd expands at most about 32,000 times, so a step yields at most 32 MiB."""

_MAX_WINDOW_BYTES = 2**27


def decompress(body: bytes, encoding: str | None, max_bytes: int, max_ratio: int) -> bytes:
    """``encoding`` is the ``Content-Encoding`` header. One zstd frame is one body.

    Raises ``TooLarge`` past ``max_bytes``, or past ``max_ratio`` times the body's size where that
    is more than ``RATIO_FREE_BYTES``; ``InvalidRequest`` for a damaged or cut body.
    """
    match (encoding or "identity").strip().lower():
        case "identity":
            if len(body) > max_bytes:
                raise TooLarge(f"body has {len(body)} bytes; limit {max_bytes}")
            return body
        case "zstd":
            limit = min(max_bytes, max(len(body) * max_ratio, RATIO_FREE_BYTES))
            return _decompress_zstd(body, limit)
        case other:
            raise Unsupported(f"content encoding {other[:50]!r}; use zstd or none")


def _decompress_zstd(body: bytes, limit: int) -> bytes:
    frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
    pieces: list[bytes] = []
    num_bytes = 0
    view = memoryview(body)
    for start in range(0, len(body), _PIECE_BYTES):
        if frame.eof:
            break
        try:
            piece = frame.decompress(view[start : start + _PIECE_BYTES])
        except zstandard.ZstdError as error:
            raise InvalidRequest(f"body is not valid zstd: {error}") from None
        num_bytes += len(piece)
        if num_bytes > limit:
            raise TooLarge(f"body decompresses to more than {limit} bytes")
        pieces.append(piece)
    if not frame.eof:
        raise InvalidRequest("body ends inside a zstd frame")
    if start + _PIECE_BYTES < len(body) or frame.unused_data:
        raise InvalidRequest("body has bytes after its zstd frame")
    return b"".join(pieces)
