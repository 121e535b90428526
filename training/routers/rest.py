"""What was trained and saved: training runs, checkpoints, sessions."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

from training.core.errors import NotFound
from training.core.ids import CheckpointKind, TinkerPath, checked_name
from training.core.records import Checkpoint, Model
from training.routers.bodies import BodyDep, parse
from training.routers.common import (
    API,
    PROBLEMS,
    OwnerDep,
    PathId,
    ServerDep,
    answer,
    json_body,
)
from training.services.server import Server
from training.wire.requests import SetTtlRequest, WeightsInfoRequest
from training.wire.responses import (
    CheckpointInfo,
    CheckpointList,
    Cursor,
    OptimizerConfig,
    SessionInfo,
    TrainingRun,
    TrainingRunList,
    WeightsInfo,
    text_metadata,
)

router = APIRouter(prefix=API, tags=["rest"], responses=PROBLEMS)

Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**63)]

_TYPES: dict[CheckpointKind, Literal["training", "sampler", "external"]] = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}


@router.get("/training_runs", response_model=TrainingRunList)
async def list_training_runs(
    server: ServerDep, owner: OwnerDep, limit: Limit = 20, offset: Offset = 0
) -> Response:
    models, total = await server.models.page(owner, limit, offset)
    runs = [await _training_run(server, model) for model in models]
    cursor = Cursor(offset=offset, limit=limit, total_count=total)
    return answer(TrainingRunList(training_runs=runs, cursor=cursor))


@router.get("/training_runs/{run_id}", response_model=TrainingRun)
async def get_training_run(run_id: PathId, server: ServerDep, owner: OwnerDep) -> Response:
    return answer(await _training_run(server, await server.models.get(owner, run_id)))


@router.get("/training_runs/{run_id}/checkpoints", response_model=CheckpointList)
async def list_checkpoints(run_id: PathId, server: ServerDep, owner: OwnerDep) -> Response:
    found = await server.checkpoints.of_run(owner, run_id)
    return answer(CheckpointList(checkpoints=[_checkpoint(item) for item in found]))


@router.get("/checkpoints", response_model=CheckpointList)
async def list_user_checkpoints(
    server: ServerDep, owner: OwnerDep, limit: Limit = 100, offset: Offset = 0
) -> Response:
    found, total = await server.checkpoints.page(owner, limit, offset)
    cursor = Cursor(offset=offset, limit=limit, total_count=total)
    return answer(CheckpointList(checkpoints=[_checkpoint(item) for item in found], cursor=cursor))


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete_checkpoint(
    run_id: PathId, kind: PathId, name: PathId, server: ServerDep, owner: OwnerDep
) -> Response:
    await server.checkpoints.delete(owner, checkpoint_path(run_id, kind, name))
    return Response(status_code=204)


@router.put(
    "/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl",
    status_code=204,
    openapi_extra=json_body(SetTtlRequest),
)
async def set_checkpoint_ttl(
    run_id: PathId, kind: PathId, name: PathId, server: ServerDep, owner: OwnerDep, body: BodyDep
) -> Response:
    request = await parse(SetTtlRequest, body)
    await server.checkpoints.set_ttl(
        owner, checkpoint_path(run_id, kind, name), request.ttl_seconds
    )
    return Response(status_code=204)


@router.post(
    "/weights_info", response_model=WeightsInfo, openapi_extra=json_body(WeightsInfoRequest)
)
async def weights_info(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(WeightsInfoRequest, body)
    found = await server.checkpoints.readable(owner, TinkerPath.parse(request.tinker_path))
    return answer(
        WeightsInfo(
            base_model=found.base_model,
            is_lora=True,
            lora_rank=found.lora.rank,
            train_unembed=found.lora.train_unembed,
            train_mlp=found.lora.train_mlp,
            train_attn=found.lora.train_attn,
            optimizer_config=OptimizerConfig(type=found.optimizer),
        )
    )


@router.get("/sessions/{session_id}", response_model=SessionInfo)
async def get_session(session_id: PathId, server: ServerDep, owner: OwnerDep) -> Response:
    session = await server.sessions.get(owner, session_id)
    runs = await server.models.of_session(session_id)
    samplers = await server.sampling.of_session(session_id)
    return answer(
        SessionInfo(
            training_run_ids=[model.model_id for model in runs],
            sampler_ids=[sampler.sampling_session_id for sampler in samplers],
            user_metadata=text_metadata(session.user_metadata),
            display_name=session.display_name,
        )
    )


def checkpoint_path(run_id: str, kind: str, name: str) -> TinkerPath:
    if kind not in set(CheckpointKind):
        raise NotFound(f"no such kind of checkpoint: {kind[:50]}")
    return TinkerPath(run_id, CheckpointKind(kind), checked_name(name))


async def _training_run(server: Server, model: Model) -> TrainingRun:
    latest = await server.checkpoints.latest_of_run(model.model_id)
    training, sampler = latest.get(CheckpointKind.TRAINING), latest.get(CheckpointKind.SAMPLER)
    return TrainingRun(
        training_run_id=model.model_id,
        base_model=model.base_model,
        model_owner=model.owner,
        is_lora=True,
        last_request_time=model.last_request_at,
        corrupted=model.corrupted,
        lora_rank=model.lora.rank,
        last_checkpoint=_checkpoint(training) if training else None,
        last_sampler_checkpoint=_checkpoint(sampler) if sampler else None,
        user_metadata=text_metadata(model.user_metadata),
    )


def _checkpoint(checkpoint: Checkpoint) -> CheckpointInfo:
    return CheckpointInfo(
        checkpoint_id=checkpoint.path.checkpoint_id,
        checkpoint_type=_TYPES[checkpoint.kind],
        time=checkpoint.created_at,
        tinker_path=str(checkpoint.path),
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=text_metadata(checkpoint.user_metadata),
        expires_at=checkpoint.expires_at,
    )
