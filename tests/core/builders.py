"""Operations for tests of the queues, the planner and the task manager."""

from __future__ import annotations

import numpy as np

from training.backends.base import AdamParams, Datum
from training.core.operations import Operation, OptimWork, TrainWork, Work
from training.core.records import FutureKind


def datum(num_tokens: int = 4, weight: float = 1.0, first: int = 1) -> Datum:
    tokens = (np.arange(num_tokens, dtype=np.int32) + first) % 512
    return Datum(
        tokens=tokens,
        targets=((tokens + 1) % 512).astype(np.int64),
        inputs={"weights": np.full(num_tokens, weight, np.float32)},
    )


def train_work(num_tokens: int = 4, weight: float = 1.0, slot: int = 0) -> TrainWork:
    data = [datum(num_tokens, weight)]
    return TrainWork(lambda: slot, "cross_entropy", {}, data, num_tokens)


def optim_work(slot: int = 0, learning_rate: float = 0.1) -> OptimWork:
    return OptimWork(lambda: slot, AdamParams(learning_rate=learning_rate))


def operation(
    model_id: str = "m",
    seq: int = 1,
    kind: FutureKind = FutureKind.FORWARD_BACKWARD,
    work: Work | None = None,
    arrived_s: float = 0.0,
    owner: str = "",
) -> Operation:
    chosen = work if work is not None else train_work()
    return Operation(f"{model_id}/{seq}", model_id, seq, kind, chosen, arrived_s, owner)
