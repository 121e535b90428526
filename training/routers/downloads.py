"""Files of a checkpoint: links for its owner, and what they lead to."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response

from training.routers.common import API, PROBLEMS, OwnerDep, PathId, ServerDep, answer
from training.routers.rest import checkpoint_path
from training.services.downloads import Downloads
from training.services.server import Server
from training.wire.responses import ExternalWeightsUrls

router = APIRouter(prefix=API, tags=["downloads"], responses=PROBLEMS)
_FILES = "/training_runs/{run_id}/checkpoints/{kind}/{name}/files"


async def get_downloads(request: Request) -> Downloads:
    downloads: Downloads = request.app.state.downloads
    return downloads


DownloadsDep = Annotated[Downloads, Depends(get_downloads)]
Expires = Annotated[str, Query(pattern=r"^[0-9]{1,12}$")]
Signature = Annotated[str, Query(pattern=r"^[0-9a-f]{64}$")]


@router.get(_FILES, response_model=ExternalWeightsUrls)
async def list_files(
    run_id: PathId,
    kind: PathId,
    name: PathId,
    request: Request,
    server: ServerDep,
    owner: OwnerDep,
    downloads: DownloadsDep,
) -> Response:
    """A link to each file, that works without a key until it expires."""
    path = checkpoint_path(run_id, kind, name)
    links = await downloads.links(await server.checkpoints.owned(owner, path))
    place = _FILES.format(run_id=quote(run_id, safe=":"), kind=kind, name=quote(name))
    here = base_url(request, server) + API + place
    urls = {file: f"{here}/{link}" for file, link in links.urls.items()}
    return answer(ExternalWeightsUrls(urls=urls, expires=links.expires))


@router.get(
    _FILES + "/{file:path}",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"content": {"application/octet-stream": {}}, "description": "A part of it."},
        416: {"content": {"text/plain": {}}, "description": "No such part."},
    },
)
async def download(
    run_id: PathId,
    kind: PathId,
    name: PathId,
    file: PathId,
    expires: Expires,
    signature: Signature,
    downloads: DownloadsDep,
) -> Response:
    """What a link of the list leads to; parts of it too (``Range``)."""
    path = checkpoint_path(run_id, kind, name)
    found = await downloads.file(path, file, int(expires), signature)
    return FileResponse(found, filename=found.name, media_type="application/octet-stream")


def base_url(request: Request, server: Server) -> str:
    """Configured, or what the client itself says that it reached: never a third party's word,
    since the answer goes to that client alone and is kept by no cache. (Starlette takes the
    socket's own address where the header names no host.)"""
    return server.config.server.public_url or str(request.base_url).rstrip("/")
