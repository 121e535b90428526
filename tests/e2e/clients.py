"""SDK clients and small data for the end-to-end tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types

from tests.servers import FAKE_MODEL, Server

CLOSE = 1e-4
"""Exact for the fake; the engine's float32 sums depend a little on what is computed together."""
RATE = types.AdamParams(learning_rate=1e-2)


def service_client(server: Server, **settings: Any) -> tinker.ServiceClient:
    settings.setdefault("api_key", server.api_key)
    return tinker.ServiceClient(base_url=server.base_url, **settings)


def rest_client(server: Server, api_key: str | None = None) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.base_url, api_key=api_key or server.api_key)


def trainer_of(
    service: tinker.ServiceClient, model: str = FAKE_MODEL, **settings: Any
) -> tinker.TrainingClient:
    settings = {"rank": 4, "seed": 1} | settings
    return service.create_lora_training_client(model, **settings).result()


def prompt(*tokens: int) -> types.ModelInput:
    return types.ModelInput.from_ints(list(tokens))


def datum(tokens: Sequence[int], **inputs: Any) -> types.Datum:
    """Input ``tokens`` with the given loss inputs (lists, arrays or ``TensorData``)."""
    return types.Datum(model_input=prompt(*tokens), loss_fn_inputs=inputs)


def next_token(tokens: Sequence[int], weights: Sequence[float] | None = None) -> types.Datum:
    """Cross entropy of each next token of ``tokens``."""
    size = len(tokens) - 1
    return datum(
        tokens[:-1],
        target_tokens=list(tokens[1:]),
        weights=list(weights) if weights is not None else [1.0] * size,
    )


def loss_of(output: types.ForwardBackwardOutput) -> float:
    return output.metrics["loss:sum"]


def logprobs_of(output: types.ForwardBackwardOutput) -> list[np.ndarray[Any, Any]]:
    """One array per datum, in the shape of its targets."""
    return [item["logprobs"].to_numpy() for item in output.loss_fn_outputs]


def numbers(values: Sequence[float | None] | None) -> np.ndarray[Any, Any]:
    """float32, NaN where there is none."""
    assert values is not None
    return np.array(values, dtype=np.float32)


def train(trainer: tinker.TrainingClient, data: list[types.Datum], steps: int = 1) -> list[float]:
    """Pipelined steps; the loss of each."""
    losses = []
    for _ in range(steps):
        loss = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(RATE).result()
        losses.append(loss_of(loss.result()))
    return losses


PROMPT = prompt(1, 9, 30, 4, 11)
SEEDED = types.SamplingParams(max_tokens=12, seed=7, stop=[])


def tokens_of(
    sampler: tinker.SamplingClient, params: types.SamplingParams, num: int = 1
) -> list[int]:
    """All tokens of ``num`` samples after ``PROMPT``, one after the other."""
    reply = sampler.sample(PROMPT, num, params).result()
    return [token for sequence in reply.sequences for token in sequence.tokens]


def forward_logprobs(trainer: tinker.TrainingClient, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """What the trainer says of tokens[1:]."""
    (logprobs,) = logprobs_of(trainer.forward([next_token(tokens)], "cross_entropy").result())
    return logprobs
