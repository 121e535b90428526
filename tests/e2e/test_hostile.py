"""Everything wrong that a client can send: refused clearly, never a 5xx, and nobody is hurt.

Each test ends by training the same model again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.clients import datum, next_token, prompt, service_client, train, trainer_of
from tests.e2e.raw import Raw, request
from tests.servers import FAKE_MODEL, Server

GOOD = [next_token([1, 9, 30, 4, 11])]
TOKENS = [1, 9, 30]
FINE: dict[str, Any] = {"target_tokens": [9, 30, 4], "weights": [1.0, 1.0, 1.0]}
RL: dict[str, Any] = {
    "target_tokens": [9, 30, 4],
    "logprobs": [-1.0] * 3,
    "advantages": [1.0] * 3,
}


@pytest.fixture
def service(fake_server: Server) -> Iterator[tinker.ServiceClient]:
    with service_client(fake_server) as client:
        yield client


@pytest.fixture
def trainer(service: tinker.ServiceClient) -> Iterator[tinker.TrainingClient]:
    """A model that must train like an untouched one after the test."""
    client = trainer_of(service)
    yield client
    expected = train(trainer_of(service), GOOD, 2)
    assert train(client, GOOD, 2) == expected


def csr(values: list[float], crow: list[int], col: list[int], shape: list[int]) -> types.TensorData:
    return types.TensorData(
        data=values,
        dtype="float32",
        shape=shape,
        sparse_crow_indices=crow,
        sparse_col_indices=col,
    )


SQUARE = np.array([[9, 30], [4, 5], [6, 7]], dtype=np.int64)


# --------------------------------------------------------------------------- datums

BAD_DATUMS: dict[str, tuple[str, types.Datum, str]] = {
    "NaN weight": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0, float("nan"), 1.0]}),
        r"data\[1\]\.weights.*nan.*finite",
    ),
    "infinite weight": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0, float("inf"), 1.0]}),
        r"weights.*inf.*finite",
    ),
    "NaN advantage": (
        "ppo",
        datum(TOKENS, **RL | {"advantages": [float("nan")] * 3}),
        r"advantages.*finite",
    ),
    "infinite logprob": (
        "importance_sampling",
        datum(TOKENS, **RL | {"logprobs": [float("-inf")] * 3}),
        r"logprobs.*finite",
    ),
    "too few weights": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"weights": [1.0]}),
        r"weights.*\[1\].*target_tokens.*\[3\]",
    ),
    "too many targets": (
        "cross_entropy",
        datum(TOKENS, target_tokens=[1, 2, 3, 4], weights=[1.0] * 4),
        r"target_tokens.*\[4\].*3 tokens",
    ),
    "a token over the vocabulary": (
        "cross_entropy",
        datum([1, 512, 3], **FINE),
        r"model_input.*512.*outside \[0, 512\)",
    ),
    "a negative token": ("cross_entropy", datum([1, -1, 3], **FINE), r"model_input.*-1.*outside"),
    "a negative target": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"target_tokens": [1, -100, 3]}),
        r"target_tokens.*-100.*outside",
    ),
    "a huge target": (
        "cross_entropy",
        datum(TOKENS, **FINE | {"target_tokens": [1, 2**62, 3]}),
        r"target_tokens.*outside",
    ),
    "no tokens": (
        "cross_entropy",
        datum([], target_tokens=[], weights=[]),
        r"model_input has no tokens",
    ),
    "no chunks": (
        "cross_entropy",
        types.Datum(
            model_input=types.ModelInput.empty(), loss_fn_inputs=datum([1], **FINE).loss_fn_inputs
        ),
        r"model_input has no tokens",
    ),
    "over the context": (
        "cross_entropy",
        next_token([3] * 5000),
        r"4999 tokens.*context length.*4096",
    ),
    "an image": (
        "cross_entropy",
        types.Datum(
            model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")]),
            loss_fn_inputs=datum([1], **FINE).loss_fn_inputs,
        ),
        r"image.*text tokens",
    ),
    "targets missing": (
        "cross_entropy",
        datum(TOKENS, weights=[1.0] * 3),
        r"cross_entropy needs.*target_tokens",
    ),
    "weights missing": (
        "cross_entropy",
        datum(TOKENS, target_tokens=[9, 30, 4]),
        r"cross_entropy needs.*weights",
    ),
    "advantages missing": (
        "ppo",
        datum(TOKENS, target_tokens=[9, 30, 4], logprobs=[0.0] * 3),
        r"ppo needs.*advantages",
    ),
    "mask missing": ("gspo", datum(TOKENS, **RL), r"gspo needs.*sequence_ratio_mask"),
    "an empty mask": (
        "gspo",
        datum(TOKENS, **RL, sequence_ratio_mask=[0.0] * 3),
        r"finite|sequence_ratio_mask",
    ),
    "targets of a wrong type": (
        "cross_entropy",
        datum(
            TOKENS,
            target_tokens=types.TensorData(data=[1.0, 2.0, 3.0], dtype="float32", shape=[3]),
            weights=[1.0] * 3,
        ),
        r"target_tokens must be int64",
    ),
    "two targets where one is allowed": (
        "ppo",
        datum(
            TOKENS,
            target_tokens=SQUARE,
            logprobs=np.zeros((3, 2), np.float32),
            advantages=np.zeros((3, 2), np.float32),
        ),
        r"ppo takes one target per position",
    ),
    "three dimensions": (
        "cross_entropy",
        datum(
            TOKENS, target_tokens=SQUARE.reshape(3, 2, 1), weights=np.ones((3, 2, 1), np.float32)
        ),
        r"target_tokens has the shape \[3, 2, 1\]",
    ),
    "row pointers that shrink": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0, 1.0], [0, 2, 1, 2], [0, 1], [3, 2])),
        r"row pointers must grow",
    ),
    "a column outside": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0, 1.0], [0, 1, 1, 2], [0, 7], [3, 2])),
        r"column index is outside",
    ),
    "too few row pointers": (
        "cross_entropy",
        datum(TOKENS, target_tokens=SQUARE, weights=csr([1.0], [0, 1], [0], [3, 2])),
        r"2 row pointers for 3 rows",
    ),
    "a sparse tensor that claims to be huge": (
        "cross_entropy",
        datum(
            TOKENS,
            target_tokens=types.TensorData(
                data=[1],
                dtype="int64",
                shape=[3, 2**40],
                sparse_crow_indices=[0, 1, 1, 1],
                sparse_col_indices=[0],
            ),
            weights=csr([1.0], [0, 1, 1, 1], [0], [3, 2**40]),
        ),
        r"elements; limit",
    ),
    "bounds the wrong way round": (
        "ppo",
        datum(TOKENS, **RL, clip_low_threshold=[2.0] * 3, clip_high_threshold=[1.0] * 3),
        r"clip_low_threshold is above clip_high_threshold",
    ),
}


@pytest.mark.parametrize("name", BAD_DATUMS)
def test_a_bad_datum_is_refused_by_place_and_reason(
    trainer: tinker.TrainingClient, name: str
) -> None:
    loss_fn, bad, message = BAD_DATUMS[name]
    companion = datum(TOKENS, **(RL | FINE), sequence_ratio_mask=[1.0] * 3)
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        trainer.forward_backward([companion, bad], loss_fn).result()  # type: ignore[arg-type]
    assert "data[1]" in str(caught.value) or "finite" in str(caught.value)
    assert caught.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="no step was taken"):
        trainer.optim_step(types.AdamParams()).result()


BAD_SETTINGS: dict[str, tuple[str, dict[str, float | str], str]] = {
    "an unknown loss": ("ppo2", {}, r"'ppo2' is not known; known:.*ppo"),
    "an empty loss": ("", {}, "not known"),
    "the custom loss": ("custom", {"loss_id": "x"}, "forward_backward_custom"),
    "an unknown setting": ("ppo", {"clip": 0.2}, r"'clip'.*clip_low_threshold"),
    "a setting for a loss without any": ("cross_entropy", {"beta": 1.0}, "beta"),
    "text for a number": ("dro", {"beta": "high"}, "beta.*number"),
    "a setting that is not finite": ("dro", {"beta": float("nan")}, "beta.*finite"),
    "bounds the wrong way round": (
        "ppo",
        {"clip_low_threshold": 1.5, "clip_high_threshold": 1.2},
        "above",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_loss_is_refused_by_name(trainer: tinker.TrainingClient, name: str) -> None:
    loss_fn, config, message = BAD_SETTINGS[name]
    data = [datum(TOKENS, **(RL | FINE))]
    with pytest.raises(tinker.RequestFailedError, match=message):
        trainer.forward_backward(data, loss_fn, config).result()  # type: ignore[arg-type]
    with pytest.raises(tinker.RequestFailedError, match="no step was taken"):
        trainer.optim_step(types.AdamParams()).result()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.5}, "beta2"),
        ({"eps": -1.0}, "eps"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_a_bad_step_is_refused_by_name(raw: Raw, params: dict[str, float], message: str) -> None:
    model_id = raw.new_model()
    body = json.dumps({"model_id": model_id, "seq_id": 1, "adam_params": params})
    answer = raw.checked(raw.http.post("/optim_step", content=body))
    text = raw.failure(answer.json()["request_id"]) if answer.status_code == 200 else answer.text
    assert message in text or "JSON" in text
    seq = 2 if answer.status_code == 200 else 1
    assert raw.output(raw.forward_backward(request(model_id, seq))).metrics["loss:sum"] > 0
    assert "metrics" in raw.retrieve(raw.optim_step(model_id, seq + 1)).json()


# --------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"max_tokens": 0}, {}, "max_tokens"),
        ({"max_tokens": -5}, {}, "max_tokens"),
        ({"max_tokens": 10**9}, {}, "context"),
        ({"temperature": -1.0}, {}, "temperature"),
        ({"top_p": 0.0}, {}, "top_p"),
        ({"top_p": 1.5}, {}, "top_p"),
        ({"top_k": 0}, {}, "top_k"),
        ({"top_k": -2}, {}, "top_k"),
        ({"stop": [10**6]}, {}, "stop"),
        ({"stop": [""]}, {}, "stop"),
        ({"stop": ["x"] * 1000}, {}, "stop"),
        ({}, {"topk_sample_logprobs": 10**6}, "topk_sample_logprobs"),
        ({}, {"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({}, {"prompt_alt_tokens_k": 10**6}, "prompt_alt_tokens_k"),
        ({}, {"num_samples": 0}, "num_samples"),
        ({}, {"num_samples": -1}, "num_samples"),
        ({}, {"num_samples": 10**6}, "num_samples"),
        ({}, {"prompt": prompt()}, "no tokens"),
        ({}, {"prompt": prompt(1, 512)}, "512"),
        ({}, {"prompt": prompt(1, -3)}, "-3"),
        ({}, {"prompt": prompt(*[3] * 5000)}, "context"),
        (
            {},
            {"prompt_logprobs_last_n": 3, "include_prompt_logprobs": True},
            "prompt_logprobs_last_n",
        ),
        (
            {},
            {"target_prompt_logprobs": types.TensorData(data=[1, 2], dtype="int64", shape=[1, 2])},
            "target_prompt_logprobs",
        ),
        (
            {},
            {
                "target_prompt_logprobs": types.TensorData(
                    data=[9, 999], dtype="int64", shape=[2, 1]
                )
            },
            "999",
        ),
    ],
)
def test_a_bad_sample_is_refused_by_name(
    service: tinker.ServiceClient, params: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    sampler = service.create_sampling_client(base_model=FAKE_MODEL).result()
    call: dict[str, Any] = {"prompt": prompt(1, 2, 3), "num_samples": 1} | options
    with pytest.raises(tinker.TinkerError, match=message):
        sampler.sample(
            sampling_params=types.SamplingParams(**{"max_tokens": 4} | params), **call
        ).result()
    reply = sampler.sample(prompt(1), 1, types.SamplingParams(max_tokens=4, stop=[])).result()
    assert len(reply.sequences[0].tokens) == 4
