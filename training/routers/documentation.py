"""``/docs``, and the parts of OpenAPI that the routes cannot say one by one."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema

from training.routers.common import REF_TEMPLATE, documented_bodies

_ASSETS = "https://cdn.jsdelivr.net"
_ICON = "data:,"


def docs_router(app: FastAPI) -> APIRouter:
    """Swagger UI. Its script comes from a CDN, so the page may talk to this server alone, and runs
    no inline script but the one that starts it."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json", title=f"{app.title} API", swagger_favicon_url=_ICON
    )
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {_ASSETS} {hashes}; style-src {_ASSETS} 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    router = APIRouter()

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page.body, headers={"Content-Security-Policy": policy})

    return router


def _digest(script: bytes) -> str:
    return base64.b64encode(hashlib.sha256(script).digest()).decode()


def complete_openapi(app: FastAPI) -> None:
    """Adds the schemas of bodies that the routes read themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, bodies = models_json_schema(
                [(model, "validation") for model in documented_bodies()],
                ref_template=REF_TEMPLATE,
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for name, definition in bodies["$defs"].items():
                schemas.setdefault(name, definition)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
