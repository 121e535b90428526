"""Domain errors as HTTP answers: the one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import State
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training.core import errors
from training.core.errors import ErrorCategory
from training.routers.headers import DATA
from training.wire.responses import Problem, dump_json

log = structlog.get_logger(__name__)

STATUS: dict[type[errors.TinkercloudError], int] = {
    errors.RequestError: 400,
    errors.Unauthenticated: 401,
    errors.NotFound: 404,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.OverQuota: 403,
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
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(StarletteHTTPException, _on_no_route)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(_StartProblems, state=app.state)


@contextmanager
def start_problems(app: FastAPI) -> Iterator[None]:
    """What keeps a server from starting, and is no bug of ours, is told in one line."""
    try:
        yield
    except errors.TinkercloudError as error:
        app.state.start_problem = str(error)
        raise


class _StartProblems:
    """Starlette would hand its whole traceback to whoever runs the application."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            problem: str | None = getattr(self._state, "start_problem", None)
            if message["type"] == "lifespan.startup.failed" and problem is not None:
                message = {**message, "message": f"cannot start: {problem}"}
            await send(message)

        await self._app(scope, receive, tell if scope["type"] == "lifespan" else send)


def _problem(
    status: int,
    detail: str,
    category: ErrorCategory = ErrorCategory.USER,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = dump_json(Problem(detail=detail, category=category))
    return Response(body, status, headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.TinkercloudError)
    status = status_of(error)
    headers = {}
    if isinstance(error, errors.Busy):
        headers["Retry-After"] = f"{error.retry_after_s:g}"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status >= 500:
        log.error("request.failed", path=request.url.path, error=str(error))
    return _problem(status, str(error), error.category, headers)


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A path or query parameter; never repeats the value, which may be long or somebody's key."""
    assert isinstance(error, RequestValidationError)
    problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return _problem(400, "; ".join(problems))


async def _on_no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _problem(error.status_code, error.detail, headers=error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this answer; a client that goes away in the middle of a body is no bug."""
    return _problem(400, "the connection was closed before the body was complete")


async def _on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: logged with its traceback, which the client does not get."""
    log.error("request.crashed", path=request.url.path, exc_info=error)
    answer = _problem(500, "internal error; see the server log", ErrorCategory.SERVER)
    # This answer is made outside of the middleware that adds them to all others.
    answer.raw_headers.extend(DATA)
    return answer
