"""What every route needs: the server, the caller, the body within its limits."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from training.core.errors import TooLarge
from training.core.threads import in_thread
from training.services.server import Server
from training.wire.compression import decompress
from training.wire.json_base import parse_json
from training.wire.responses import Answer, Promise, dump_json

ModelT = TypeVar("ModelT", bound=BaseModel)

API = "/api/v1"


async def get_server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDep = Annotated[Server, Depends(get_server)]


async def get_owner(request: Request, server: ServerDep) -> str:
    return server.auth.authenticate(
        request.headers.get("x-api-key"), request.headers.get("authorization")
    )


OwnerDep = Annotated[str, Depends(get_owner)]


async def get_body(request: Request, server: ServerDep, owner: OwnerDep) -> bytes:
    """The whole body, decompressed. Depends on the caller, so that strangers upload nothing."""
    limits = server.config.server
    pieces: list[bytes] = []
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > limits.max_body_bytes:
            raise TooLarge(f"the body is over the limit of {limits.max_body_bytes} bytes")
        pieces.append(piece)
    body = b"".join(pieces)
    encoding = request.headers.get("content-encoding")
    if encoding is None:
        return body
    return await in_thread(
        decompress, body, encoding, limits.max_body_bytes, limits.max_compression_ratio
    )


BodyDep = Annotated[bytes, Depends(get_body)]


async def parse(model: type[ModelT], body: bytes) -> ModelT:
    """``body`` as ``model``; off the event loop where that takes long."""
    if len(body) < 64 * 2**10:
        return parse_json(model, body)
    return await in_thread(parse_json, model, body)


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def answer(body: Answer, status: int = 200) -> Response:
    return Response(dump_json(body), status, media_type="application/json")


def promise(
    request_id: str,
    model_id: str | None = None,
    sample_sequence_ids: tuple[str, ...] | None = None,
) -> Response:
    return answer(
        Promise(request_id=request_id, model_id=model_id, sample_sequence_ids=sample_sequence_ids)
    )
