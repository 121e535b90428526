"""Domain errors as HTTP answers: the one table."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from training.core import errors

log = structlog.get_logger(__name__)

STATUS: dict[type[errors.TinkercloudError], int] = {
    errors.RequestError: 400,
    errors.Unauthenticated: 401,
    errors.NotFound: 404,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.Busy: 429,
    errors.UserError: 400,
    errors.BackendError: 503,
    # The SDK repeats what got a 5xx: right for a disk that is full now and not in a minute.
    errors.StorageError: 503,
    errors.TinkercloudError: 500,
}
"""The nearest class counts. 402 and 409 have meanings of their own to the SDK and are not used."""


def status_of(error: errors.TinkercloudError) -> int:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.TinkercloudError, _on_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.TinkercloudError)
    status = status_of(error)
    headers = {}
    if isinstance(error, errors.Busy):
        headers["Retry-After"] = f"{error.retry_after_s:g}"
    if status >= 500:
        log.error("request.failed", path=request.url.path, error=str(error))
    body = {"detail": str(error), "category": error.category.value}
    return JSONResponse(body, status, headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: logged with its traceback, which the client does not get."""
    log.error("request.crashed", path=request.url.path, exc_info=error)
    return JSONResponse({"detail": "internal error; see the server log"}, 500)
