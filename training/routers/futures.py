"""Waiting for promises."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from training.core.errors import Busy, StorageError
from training.core.records import Future, FutureStatus
from training.routers.bodies import BodyDep, PollBodyDep, parse
from training.routers.common import (
    API,
    PROBLEMS,
    OwnerDep,
    ServerDep,
    answer,
    json_body,
)
from training.services.sampling import sample_scope
from training.wire.requests import RetrieveFutureRequest, RetrieveFuturesRequest
from training.wire.responses import (
    Completions,
    FutureFailed,
    FutureFinished,
    RequestFailed,
    TryAgain,
)

router = APIRouter(prefix=API, tags=["futures"], responses=PROBLEMS)

_RESULTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The result, or why it failed: then there is a field `error`.",
        "content": {"application/json": {}, "application/x-protobuf": {}},
    },
    408: {"model": TryAgain, "description": "Not yet: ask again."},
}


@router.post("/retrieve_future", responses=_RESULTS, openapi_extra=json_body(RetrieveFutureRequest))
async def retrieve_future(
    http: Request, server: ServerDep, owner: OwnerDep, body: BodyDep
) -> Response:
    """The result's own bytes; 200 with ``error`` for a failure; 408 while there is neither."""
    request = await parse(RetrieveFutureRequest, body)
    timeout_s = server.config.server.long_poll_s
    try:
        result = await server.promises.wait(request.request_id, owner, timeout_s)
    except StorageError as error:
        # The SDK asks again without a pause after a 5xx here, and with one after a 429.
        raise Busy(str(error), retry_after_s=2.0) from error
    await http.app.state.turnstile.enter(owner)  # a unit wakes hundreds at once
    if result is None:
        return answer(TryAgain(request_id=request.request_id), status=408)
    if result.status is FutureStatus.DONE:
        return Response(result.body, media_type=result.content_type)
    return answer(RequestFailed(error=result.error, category=result.category))


@router.post(
    "/retrieve_futures",
    response_model=Completions,
    openapi_extra=json_body(RetrieveFuturesRequest),
)
async def retrieve_futures(server: ServerDep, owner: OwnerDep, body: PollBodyDep) -> Response:
    """What has settled of one sampling client since its cursor; waits for the first."""
    request = await parse(RetrieveFuturesRequest, body)
    target = request.target
    await server.sampling.get_session(owner, target.sampling_session_id)
    limit_s = server.config.server.long_poll_s
    timeout_s = limit_s if request.timeout is None else min(max(request.timeout, 0.0), limit_s)
    settled = await server.promises.completions(
        sample_scope(target.sampling_session_id),
        target.cloned_sampler_id,
        request.prev_cursor,
        timeout_s,
    )
    cursor = max([request.prev_cursor, *(future.completion or 0 for future in settled)])
    return answer(Completions(completions=[_completion(item) for item in settled], cursor=cursor))


def _completion(future: Future) -> FutureFinished | FutureFailed:
    if future.status is FutureStatus.DONE:
        return FutureFinished(request_id=future.request_id)
    return FutureFailed(request_id=future.request_id)
