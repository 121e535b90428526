"""Bodies of requests: up to what their route can need, and in memory only where there is room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel

from training.core.errors import TooLarge
from training.core.sampling_data import JsonLimits, json_limits
from training.core.threads import in_thread
from training.routers.common import OwnerDep, ServerDep
from training.services.quotas import Arrival
from training.services.server import Server
from training.wire.compression import decompress
from training.wire.json_base import parse_json

ModelT = TypeVar("ModelT", bound=BaseModel)

CONTROL_BYTES = 512 * 2**10
"""Metadata and tags at their limits, in any script, written as ASCII."""
TELEMETRY_BYTES = 2**20
"""A hundred events, some with tracebacks."""
POLL_BYTES = 4 * 2**20
"""100,000 ids of promises."""


class Body:
    """A dependency: the whole body, decompressed. ``limit`` counts before and after that.

    It depends on the caller, so that strangers upload nothing, and gives its room back when the
    request is answered.
    """

    def __init__(self, limit: Callable[[Server], int]) -> None:
        self._limit = limit

    async def __call__(
        self, request: Request, server: ServerDep, owner: OwnerDep
    ) -> AsyncIterator[bytes]:
        limits = server.config.server
        limit = min(self._limit(server), limits.max_body_bytes)
        with Arrival(server.arriving, owner) as arrival:
            body = await _read(request, limit, arrival)
            if (encoding := request.headers.get("content-encoding")) is not None:
                ratio = limits.max_compression_ratio
                body = await in_thread(decompress, body, encoding, limit, ratio)
                arrival.hold(len(body))
            yield body


async def _read(request: Request, limit: int, arrival: Arrival) -> bytes:
    """What announces its length is refused before it is sent, if it must be."""
    announced = int(request.headers.get("content-length", 0))
    _check(announced, limit)
    arrival.hold(announced)
    pieces: list[bytes] = []
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        _check(num_bytes, limit)
        if num_bytes > announced:
            arrival.hold(num_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def _check(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise TooLarge(f"the body is over this route's limit of {limit} bytes")


def sample_limits(server: Server) -> JsonLimits:
    """Of the model that takes most."""
    each = [json_limits(host.capabilities()) for host in server.hosts.all()]
    return JsonLimits(*(max(values) for values in zip(*each, strict=True)))


BodyDep = Annotated[bytes, Depends(Body(lambda _: CONTROL_BYTES))]
TelemetryBodyDep = Annotated[bytes, Depends(Body(lambda _: TELEMETRY_BYTES))]
PollBodyDep = Annotated[bytes, Depends(Body(lambda _: POLL_BYTES))]
SampleBodyDep = Annotated[bytes, Depends(Body(lambda server: sample_limits(server).num_bytes))]
TrainBodyDep = Annotated[bytes, Depends(Body(lambda server: server.config.server.max_body_bytes))]


async def parse(model: type[ModelT], body: bytes, max_values: int | None = None) -> ModelT:
    """``body`` as ``model``; off the event loop where that takes long."""
    if len(body) < 64 * 2**10:
        return parse_json(model, body, max_values)
    return await in_thread(parse_json, model, body, max_values)
