"""The hub mirror, below ``/hf``: what ``huggingface_hub`` asks for when a client sets
``HF_ENDPOINT=<server>/hf``. Public, as tokenizers of open models are: clients send no key here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute

from training.core.errors import TooLarge
from training.models.hub import DEFAULT_REVISION, HubError, HubFile, HubMirror, HubRepo

_MAX_FORM_BYTES = 2**16
_MAX_FORM_FIELDS = 1000
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Not served here; `X-Error-Code` says what, as the hub does.",
        "content": {"application/json": {}, "text/plain": {}},
    }
}


class _HubRoute(APIRoute):
    """Answers a ``HubError`` in the hub's way: ``X-Error-Code`` decides which exception a client
    raises, and ``X-Repo-Commit`` lets it remember that a file is absent."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HubError as error:
                # Escaped: the message repeats the path asked for, which may hold line breaks.
                message = str(error).encode("unicode_escape").decode("ascii")
                headers = {"X-Error-Code": error.code, "X-Error-Message": message}
                if error.commit:
                    headers["X-Repo-Commit"] = error.commit
                return JSONResponse({"error": str(error)}, status_code=404, headers=headers)

        return handle


def hub_router(mirror: HubMirror) -> APIRouter:
    """Routes relative to the application's root. Handlers are plain functions: they read files."""

    router = APIRouter(
        prefix="/hf", tags=["hub mirror"], route_class=_HubRoute, responses=_REFUSALS
    )
    model = "/api/models/{organization}/{name}"

    @router.head("/{organization}/{name}/resolve/{revision}/{path:path}", include_in_schema=False)
    @router.get(
        "/{organization}/{name}/resolve/{revision}/{path:path}", response_class=FileResponse
    )
    def resolve(organization: str, name: str, revision: str, path: str) -> Response:
        repo = mirror.get(f"{organization}/{name}", revision)
        return _file_response(repo, repo.file(path))

    @router.get(model)
    @router.get(model + "/revision/{revision}")
    def info(organization: str, name: str, revision: str = DEFAULT_REVISION) -> Response:
        repo = mirror.get(f"{organization}/{name}", revision)
        return _json(repo, _info(repo))

    @router.get(model + "/tree/{revision}")
    @router.get(model + "/tree/{revision}/{path:path}")
    def tree(
        organization: str, name: str, revision: str, path: str = "", recursive: bool = False
    ) -> Response:
        repo = mirror.get(f"{organization}/{name}", revision)
        files, folders = repo.children(path.strip("/"), recursive)
        entries = [{"type": "directory", "oid": "", "size": 0, "path": name} for name in folders]
        return _json(repo, entries + [_file_entry(file) for file in files])

    @router.post(model + "/paths-info/{revision}")
    async def paths_info(organization: str, name: str, revision: str, request: Request) -> Response:
        repo = await run_in_threadpool(mirror.get, f"{organization}/{name}", revision)
        paths = await _form_paths(request)
        found = [repo.by_name[path] for path in paths if path in repo.by_name]
        return _json(repo, [_file_entry(file) for file in found])

    return router


async def _form_paths(request: Request) -> list[str]:
    """The fields ``paths`` of a form, which anybody may send. Raises ``TooLarge``."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_FORM_BYTES:
            raise TooLarge(f"the form is over the limit of {_MAX_FORM_BYTES} bytes")
    try:
        form = parse_qs(body.decode(errors="replace"), max_num_fields=_MAX_FORM_FIELDS)
    except ValueError:
        raise TooLarge(f"the form has more than {_MAX_FORM_FIELDS} fields") from None
    return form.get("paths", [])


def _file_response(repo: HubRepo, file: HubFile) -> Response:
    """Answers HEAD and ranges too."""
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": repo.commit}
    media_type = "application/json" if file.name.endswith(".json") else "application/octet-stream"
    return FileResponse(file.path, headers=headers, media_type=media_type)


def _json(repo: HubRepo, content: object) -> Response:
    return JSONResponse(content, headers={"X-Repo-Commit": repo.commit})


def _info(repo: HubRepo) -> dict[str, object]:
    return {
        "_id": repo.commit[:24],
        "id": repo.name,
        "modelId": repo.name,
        "sha": repo.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [
            {"rfilename": file.name, "size": file.size_bytes, "blobId": file.etag}
            for file in repo.files
        ],
    }


def _file_entry(file: HubFile) -> dict[str, object]:
    return {"type": "file", "oid": file.etag, "size": file.size_bytes, "path": file.name}
