"""What every route needs: the server, the caller, the words of answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Request
from fastapi.openapi.models import APIKey
from fastapi.responses import Response
from fastapi.security.base import SecurityBase
from pydantic import BaseModel

from training.core.errors import Unauthenticated
from training.services.server import Server
from training.wire.json_base import MAX_ID_CHARS
from training.wire.responses import Answer, Problem, Promise, dump_json

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


# NUL is the one character that no id of ours and no PostgreSQL text column holds.
PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[^\x00]*$")]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "The caller is at fault: `detail` says why."},
    503: {"model": Problem, "description": "Worth repeating: a full disk, an engine that is down."},
}
"""What every route may answer besides its own."""


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
