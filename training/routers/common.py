"""What every route needs: the server, the caller, the body within its limits."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request
from fastapi.openapi.models import APIKey
from fastapi.responses import Response
from fastapi.security.base import SecurityBase
from pydantic import BaseModel

from training.core.errors import TooLarge, Unauthenticated
from training.core.threads import in_thread
from training.services.server import Server
from training.wire.compression import decompress
from training.wire.json_base import MAX_ID_CHARS, parse_json
from training.wire.responses import Answer, Problem, Promise, dump_json

ModelT = TypeVar("ModelT", bound=BaseModel)

API = "/api/v1"


async def get_server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDep = Annotated[Server, Depends(get_server)]


class _Owner(SecurityBase):
    """Who calls, as an owner id. A dependency of FastAPI's own kind, so that OpenAPI tells the
    header and no second dependency has to be solved for each request."""

    def __init__(self) -> None:
        self.scheme_name = "key"
        self.model = APIKey.model_validate(
            {"in": "header", "name": "X-API-Key", "description": "Or as `Authorization: Bearer`."}
        )

    async def __call__(self, request: Request, server: ServerDep) -> str:
        headers = request.headers
        if not server.auth.enabled:
            _refuse_foreign_pages(request, server.config.server.cors_origins)
        return server.auth.authenticate(headers.get("x-api-key"), headers.get("authorization"))


get_owner = _Owner()


def _refuse_foreign_pages(request: Request, origins: tuple[str, ...]) -> None:
    """Without keys nothing else keeps a web page that somebody visits on this machine from posting
    to the server: a browser sends a plain form anywhere, and only tells where it comes from."""
    origin = request.headers.get("origin")
    if origin is None or origin.lower() in origins:
        return
    if origin.split("://")[-1].lower() != request.headers.get("host", "").lower():
        raise Unauthenticated("web pages of other origins may not use this server")


OwnerDep = Annotated[str, Depends(get_owner)]


async def get_body(request: Request, server: ServerDep, owner: OwnerDep) -> bytes:
    """The whole body, decompressed. Depends on the caller, so that strangers upload nothing."""
    limits = server.config.server
    if int(request.headers.get("content-length", 0)) > limits.max_body_bytes:
        raise TooLarge(f"the body is over the limit of {limits.max_body_bytes} bytes")
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

# NUL is the one character that no id of ours and no PostgreSQL text column holds.
PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[^\x00]*$")]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "The caller is at fault: `detail` says why."},
    503: {"model": Problem, "description": "Worth repeating: a full disk, an engine that is down."},
}
"""What every route may answer besides its own."""


async def parse(model: type[ModelT], body: bytes) -> ModelT:
    """``body`` as ``model``; off the event loop where that takes long."""
    if len(body) < 64 * 2**10:
        return parse_json(model, body)
    return await in_thread(parse_json, model, body)


REF_TEMPLATE = "#/components/schemas/{model}"
_bodies: list[type[BaseModel]] = []


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself."""
    _bodies.append(model)
    schema = {"$ref": REF_TEMPLATE.format(model=model.__name__)}
    required = any(field.is_required() for field in model.model_fields.values())
    return {
        "requestBody": {"content": {"application/json": {"schema": schema}}, "required": required}
    }


def documented_bodies() -> tuple[type[BaseModel], ...]:
    return tuple(dict.fromkeys(_bodies))


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
