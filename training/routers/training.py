"""Models and their operations. Every answer but get_info's is a promise."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from training.core.errors import InvalidRequest
from training.routers.bodies import BodyDep, TrainBodyDep, parse
from training.routers.common import (
    API,
    PROBLEMS,
    OwnerDep,
    ServerDep,
    answer,
    json_body,
    promise,
)
from training.wire.requests import (
    CreateModelRequest,
    LoadWeightsRequest,
    ModelRequest,
    OptimStepRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from training.wire.responses import ModelData, ModelInfo, OptimizerConfig, Promise

router = APIRouter(prefix=API, tags=["training"], responses=PROBLEMS)

_PROTOBUF_BODY = {
    "requestBody": {
        "content": {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}},
        "required": True,
    }
}


@router.post("/create_model", response_model=Promise, openapi_extra=json_body(CreateModelRequest))
async def create_model(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(CreateModelRequest, body)
    return promise(await server.models.create(owner, request, body))


@router.post("/get_info", response_model=ModelInfo, openapi_extra=json_body(ModelRequest))
async def get_info(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(ModelRequest, body)
    model = await server.models.get(owner, request.model_id)
    return answer(
        ModelInfo(
            model_id=model.model_id,
            model_data=ModelData(
                model_name=model.base_model, arch="lora", tokenizer_id=model.base_model
            ),
            optimizer_config=OptimizerConfig(type=model.optimizer),
            lora_rank=model.lora.rank,
            model_name=model.base_model,
        )
    )


@router.post("/forward_backward", response_model=Promise, openapi_extra=_PROTOBUF_BODY)
async def forward_backward(server: ServerDep, owner: OwnerDep, body: TrainBodyDep) -> Response:
    """Protobuf ``ForwardBackwardRequest``; forward only where it says so."""
    request_id, model_id = await server.training.forward_backward(owner, body)
    return promise(request_id, model_id)


@router.post("/optim_step", response_model=Promise, openapi_extra=json_body(OptimStepRequest))
async def optim_step(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(OptimStepRequest, body)
    return promise(await server.training.optim_step(owner, request, body), request.model_id)


@router.post("/load_weights", response_model=Promise, openapi_extra=json_body(LoadWeightsRequest))
async def load_weights(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    """Into a model (``model_id``), or as a new one (``session_id`` and ``model_seq_id``)."""
    request = await parse(LoadWeightsRequest, body)
    if request.model_id is not None:
        return promise(await server.models.load_into(owner, request, body))
    if request.session_id is None or request.model_seq_id is None:
        raise InvalidRequest("give either model_id and seq_id or session_id and model_seq_id")
    return promise(await server.models.create_from_checkpoint(owner, request, body))


@router.post("/save_weights", response_model=Promise, openapi_extra=json_body(SaveWeightsRequest))
async def save_weights(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(SaveWeightsRequest, body)
    return promise(await server.checkpoints.save_weights(owner, request, body), request.model_id)


@router.post(
    "/save_weights_for_sampler",
    response_model=Promise,
    openapi_extra=json_body(SaveWeightsForSamplerRequest),
)
async def save_weights_for_sampler(server: ServerDep, owner: OwnerDep, body: BodyDep) -> Response:
    request = await parse(SaveWeightsForSamplerRequest, body)
    request_id = await server.checkpoints.save_for_sampler(owner, request, body)
    return promise(request_id, request.model_id)
