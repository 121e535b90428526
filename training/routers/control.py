"""Start-up handshake, sessions, heartbeats, telemetry, health."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from training.routers.bodies import BodyDep, TelemetryBodyDep, parse
from training.routers.common import (
    API,
    PROBLEMS,
    OwnerDep,
    PathId,
    ServerDep,
    answer,
    json_body,
)
from training.services.hosts import Host
from training.wire.requests import (
    ClientConfigRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    SessionHeartbeatRequest,
)
from training.wire.responses import (
    ClientConfig,
    ClientDynamicConfig,
    CreatedSession,
    EngineHealth,
    Healthz,
    Heartbeat,
    ServerCapabilities,
    SupportedModel,
    TelemetryAccepted,
)

router = APIRouter(prefix=API, tags=["control"], responses=PROBLEMS)
open_router = APIRouter(tags=["health"])

ENGINE_DOWN: dict[int | str, dict[str, Any]] = {
    503: {"model": Healthz, "description": "An engine is down; it is being restarted."}
}


@router.post(
    "/client/config", response_model=ClientConfig, openapi_extra=json_body(ClientConfigRequest)
)
async def client_config(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    await parse(ClientConfigRequest, body)
    flags = server.config.client
    return answer(
        ClientConfig(
            parallel_fwdbwd_chunks=flags.parallel_fwdbwd_chunks,
            proto_compress_fwdbwd=flags.proto_compress_fwdbwd,
            fwdbwd_max_chunk_len=flags.fwdbwd_max_chunk_len,
            fwdbwd_max_chunk_bytes_count=flags.fwdbwd_max_chunk_bytes_count,
            sample_use_retrieve_futures=flags.sample_use_retrieve_futures,
            sample_join_sampling_session=flags.sample_join_sampling_session,
        )
    )


@router.post(
    "/client/dynamic_config",
    response_model=ClientDynamicConfig,
    openapi_extra=json_body(ClientConfigRequest),
)
async def client_dynamic_config(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    await parse(ClientConfigRequest, body)
    enabled = server.config.client.sample_cancel_enabled
    return answer(ClientDynamicConfig(sample_cancel_enabled=enabled))


@router.post(
    "/create_session", response_model=CreatedSession, openapi_extra=json_body(CreateSessionRequest)
)
async def create_session(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    session = await server.sessions.create(owner, await parse(CreateSessionRequest, body))
    return answer(CreatedSession(session_id=session.session_id))


@router.post(
    "/session_heartbeat", response_model=Heartbeat, openapi_extra=json_body(SessionHeartbeatRequest)
)
async def session_heartbeat(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(SessionHeartbeatRequest, body)
    await server.sessions.heartbeat(owner, request.session_id)
    return answer(Heartbeat())


@router.post(
    "/sessions/{session_id}/finish",
    status_code=204,
    openapi_extra=json_body(FinishSessionRequest),
)
async def finish_session(
    session_id: PathId, server: ServerDep, owner: OwnerDep, body: BodyDep
) -> Response:
    request = await parse(FinishSessionRequest, body)
    await server.sessions.finish(owner, session_id, request.reason.type, request.detail)
    return Response(status_code=204)


@router.post("/telemetry", response_model=TelemetryAccepted)
async def telemetry(owner: OwnerDep, body: TelemetryBodyDep) -> Response:
    """Accepted and dropped: the server keeps no client telemetry."""
    return answer(TelemetryAccepted())


@router.get("/get_server_capabilities", response_model=ServerCapabilities)
async def get_server_capabilities(server: ServerDep, owner: OwnerDep) -> Response:
    supported = [
        SupportedModel(
            model_name=host.model.name, max_context_length=host.capabilities().context_length
        )
        for host in server.hosts.all()
    ]
    return answer(ServerCapabilities(supported_models=supported))


@open_router.get(f"{API}/health", response_model=Healthz, responses=ENGINE_DOWN)
@open_router.get(f"{API}/healthz", response_model=Healthz, responses=ENGINE_DOWN)
async def health(server: ServerDep) -> Response:
    """Open to all and light; 503 while an engine is down."""
    alive = all(host.backend.health().alive for host in server.hosts.all())
    engines = [_engine_health(host) for host in server.hosts.all()]
    body = Healthz(status="ok" if alive else "engine_down", engines=engines)
    return answer(body, status=200 if alive else 503)


def _engine_health(host: Host) -> EngineHealth:
    """Why an engine is down is for the log: its errors name paths, which are not for everyone."""
    health = host.backend.health()
    return EngineHealth(
        model=host.model.name,
        state=health.state.value,
        since=health.since,
        restarts=health.num_restarts,
        reviving=host.tasks.num_reviving(),
    )


@open_router.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
