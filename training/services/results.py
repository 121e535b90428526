"""Outcomes as the bytes that the client receives."""

from __future__ import annotations

from training.backends.base import OptimOutput, TrainOutput
from training.core.records import FutureResult, FutureStatus
from training.wire.protobuf import encode_forward_backward_output
from training.wire.responses import Answer, OptimStepped, dump_json, finite_metrics

PROTOBUF = "application/x-protobuf"
JSON = "application/json"


def done_json(body: Answer) -> FutureResult:
    return FutureResult(FutureStatus.DONE, dump_json(body), JSON)


def done_protobuf(body: bytes) -> FutureResult:
    return FutureResult(FutureStatus.DONE, body, PROTOBUF)


def encode_output(output: TrainOutput | OptimOutput) -> FutureResult:
    if isinstance(output, TrainOutput):
        return done_protobuf(encode_forward_backward_output(output))
    return done_json(OptimStepped(metrics=finite_metrics(output.metrics)))
