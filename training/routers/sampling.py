"""Sampling sessions and sampling."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from training.routers.bodies import BodyDep, SampleBodyDep, parse, sample_limits
from training.routers.common import (
    API,
    PROBLEMS,
    OwnerDep,
    PathId,
    ServerDep,
    answer,
    json_body,
    promise,
)
from training.wire.requests import (
    CancelFutureRequest,
    CreateSamplingSessionRequest,
    JoinSamplingSessionRequest,
    SampleJsonRequest,
)
from training.wire.responses import (
    CreatedSamplingSession,
    JoinedSamplingSession,
    Promise,
    SamplerInfo,
)

router = APIRouter(prefix=API, tags=["sampling"], responses=PROBLEMS)


@router.post(
    "/create_sampling_session",
    response_model=CreatedSamplingSession,
    openapi_extra=json_body(CreateSamplingSessionRequest),
)
async def create_sampling_session(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(CreateSamplingSessionRequest, body)
    session = await server.sampling.create_session(owner, request)
    return answer(CreatedSamplingSession(sampling_session_id=session.sampling_session_id))


@router.get("/samplers/{sampling_session_id}", response_model=SamplerInfo)
async def get_sampler(sampling_session_id: PathId, server: ServerDep, owner: OwnerDep) -> Response:
    session = await server.sampling.get_session(owner, sampling_session_id)
    return answer(
        SamplerInfo(
            sampler_id=session.sampling_session_id,
            base_model=session.base_model,
            model_path=session.model_path,
        )
    )


@router.post(
    "/join_sampling_session",
    response_model=JoinedSamplingSession,
    openapi_extra=json_body(JoinSamplingSessionRequest),
)
async def join_sampling_session(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(JoinSamplingSessionRequest, body)
    counter = await server.sampling.join(owner, request.sampling_session_id)
    return answer(JoinedSamplingSession(client_counter=counter))


@router.post("/asample", response_model=Promise, openapi_extra=json_body(SampleJsonRequest))
async def asample(server: ServerDep, owner: OwnerDep, body: SampleBodyDep) -> Response:
    request = await parse(SampleJsonRequest, body, sample_limits(server).num_values)
    request_id, sequence_ids = await server.sampling.sample(owner, request, body)
    return promise(request_id, sample_sequence_ids=sequence_ids)


@router.post("/cancel_future", status_code=204, openapi_extra=json_body(CancelFutureRequest))
async def cancel_future(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(CancelFutureRequest, body)
    await server.sampling.cancel(owner, request.request_id)
    return Response(status_code=204)
