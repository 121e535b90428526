"""What every request of the load test must answer, to the last byte.

The fake backend is exact: the same operations, run here one after the other with nobody else about,
give the bytes that the server must give however many are served at the same time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from training.backends.base import (
    AdamParams,
    Datum,
    LoraSpec,
    SampleRequest,
    TrainOp,
    TrainOutput,
)
from training.backends.fake import sampler, trainer
from training.backends.fake.model import BaseWeights, HeadView
from training.models.registry import FAKE_CONTEXT_LENGTH, FAKE_VOCAB_SIZE
from training.services.results import encode_output
from training.wire.protobuf import encode_sample_response

RANK = 4
CHUNKS = 2
"""Requests that one forward_backward of the client is cut into."""
DATUMS, TOKENS = 2, 16
"""Of each chunk."""
NUM_PROMPTS = 16
PROMPT_TOKENS, NEW_TOKENS = 12, 24
LEARNING_RATE = 1e-2

_BASE = BaseWeights(FAKE_VOCAB_SIZE)


def lora_config(seed: int) -> dict[str, object]:
    groups = {"train_attn": False, "train_mlp": False, "train_unembed": True}
    return {"rank": RANK, "seed": seed, **groups}


def _rows(seed: int, step: int, chunk: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    rng = np.random.default_rng([seed, step, chunk])
    return rng.integers(3, FAKE_VOCAB_SIZE, (DATUMS, TOKENS + 1))


@lru_cache(4096)
def train_data(seed: int, step: int, chunk: int) -> bytes:
    """The ``data`` of a ``ForwardBackwardRequest``, to be put behind whose it is."""
    message = pb.ForwardBackwardRequest(loss_fn="cross_entropy")
    for row in _rows(seed, step, chunk):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = row[:-1].astype(np.int32).tobytes()
        for name, values, dtype in (
            ("target_tokens", row[1:], pb.DTYPE_INT64),
            ("weights", np.ones(TOKENS, np.float32), pb.DTYPE_FLOAT32),
        ):
            tensor = pb.Tensor(dense=values.tobytes(), dtype=dtype, shape=[TOKENS])
            datum.loss_fn_inputs[name].CopyFrom(tensor)
    return message.SerializeToString()


def train_body(model_id: str, seq_id: int, seed: int, step: int, chunk: int) -> bytes:
    head = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id)
    return head.SerializeToString() + train_data(seed, step, chunk)


def prompt(number: int) -> list[int]:
    rng = np.random.default_rng([99, number])
    return [int(token) for token in rng.integers(3, FAKE_VOCAB_SIZE, PROMPT_TOKENS)]


class Course:
    """The training of a model with ``seed``, as far as somebody has asked."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._spec = LoraSpec(RANK, seed, train_attn=False, train_mlp=False)
        self._slot = trainer.new_slot(_BASE, self._spec)
        self._adapters = [self._slot.adapter]
        self._passes: list[list[bytes]] = []
        self._steps: list[bytes] = []

    def passed(self, step: int, chunk: int) -> bytes:
        """The answer to chunk ``chunk`` of the pass before optimizer step ``step``."""
        self._advance(step)
        return self._passes[step][chunk]

    def stepped(self, step: int) -> bytes:
        self._advance(step)
        return self._steps[step]

    def view(self, num_steps: int) -> HeadView:
        """The weights after so many steps."""
        if num_steps:
            self._advance(num_steps - 1)
        return HeadView(_BASE, self._spec, self._adapters[num_steps])

    def _advance(self, step: int) -> None:
        while len(self._steps) <= step:
            now = len(self._steps)
            outputs = []
            for chunk in range(CHUNKS):
                data = [
                    Datum(
                        row[:-1].astype(np.int32),
                        row[1:].copy(),
                        {"weights": np.ones(TOKENS, np.float32)},
                    )
                    for row in _rows(self._seed, now, chunk)
                ]
                op = TrainOp(0, "cross_entropy", {}, data)
                result = trainer.compute_op(self._slot, op, FAKE_CONTEXT_LENGTH)
                trainer.add_gradient(self._slot, result.gradient_VD)
                outputs.append(_body(result.output))
            self._passes.append(outputs)
            optimized = trainer.adamw_step(self._slot, AdamParams(learning_rate=LEARNING_RATE))
            self._steps.append(encode_output(optimized).body)
            self._adapters.append(self._slot.adapter)


def _body(output: TrainOutput) -> bytes:
    return encode_output(output).body


@lru_cache(64)
def course(seed: int) -> Course:
    return Course(seed)


def sampled(view: HeadView, number: int, seed: int) -> bytes:
    """The answer to prompt ``number`` under the weights ``view``."""
    request = SampleRequest("", None, np.array(prompt(number), np.int32), 1, NEW_TOKENS, seed=seed)
    text_of = sampler.texts(None, FAKE_VOCAB_SIZE)
    *_, result = sampler.run_request(view, request, FAKE_CONTEXT_LENGTH, text_of)
    assert result is not None
    return encode_sample_response(result, None)


@lru_cache(1024)
def sampled_from_base(number: int, seed: int) -> bytes:
    return sampled(_base_view(), number, seed)


@lru_cache(1)
def _base_view() -> HeadView:
    return HeadView(_BASE, None, {})
