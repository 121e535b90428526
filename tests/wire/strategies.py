"""Random requests as the SDK builds them; importing it lifts hypothesis' time limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from training.backends.base import Capabilities
from training.losses import LOSSES

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

VOCAB_SIZE = 1000
CONTEXT_LENGTH = 64
CAPABILITIES = Capabilities(
    base_model="example/model",
    vocab_size=VOCAB_SIZE,
    context_length=CONTEXT_LENGTH,
    eos_token_ids=(2, 7),
    max_slots=4,
    max_lora_rank=64,
    losses=frozenset(LOSSES),
)

TOKEN_IDS = st.integers(0, VOCAB_SIZE - 1)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def float_arrays(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, shape, elements=FLOATS)


def target_arrays(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.int64, shape, elements=TOKEN_IDS)


@st.composite
def model_inputs(draw: st.DrawFn) -> types.ModelInput:
    """One to three text chunks, at least one token in all."""
    chunks = draw(st.lists(st.lists(TOKEN_IDS, max_size=12), max_size=2))
    chunks.append(draw(st.lists(TOKEN_IDS, min_size=1, max_size=12)))
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=chunk) for chunk in chunks])


@st.composite
def cross_entropy_datums(draw: st.DrawFn) -> types.Datum:
    """1-D or 2-D; as numpy (dense) or torch, which the SDK turns into CSR where that is smaller."""
    model_input = draw(model_inputs())
    shape: tuple[int, ...] = (model_input.length,)
    if draw(st.booleans()):
        shape = (*shape, draw(st.integers(1, 9)))
    targets, weights = draw(target_arrays(shape)), draw(float_arrays(shape))
    if draw(st.booleans()):
        kept = draw(hnp.arrays(np.bool_, shape, elements=st.booleans()))
        weights = np.where(kept, weights, np.float32(0))
        targets = np.where(kept, targets, 0)
    if draw(st.booleans()):
        inputs: dict[str, Any] = {
            "target_tokens": torch.from_numpy(targets),
            "weights": torch.from_numpy(weights),
        }
    else:
        inputs = {"target_tokens": targets, "weights": weights}
    return types.Datum(model_input=model_input, loss_fn_inputs=inputs)


def sdk_request(
    data: list[types.Datum],
    loss_fn: Any = "cross_entropy",
    config: dict[str, float | str] | None = None,
    model_id: str = "s:train:0",
    seq_id: int = 1,
    forward_only: bool = False,
) -> bytes:
    """The body as the SDK sends it."""
    request = ForwardBackwardRequest(
        ForwardBackwardInput(data, loss_fn, config), model_id=model_id, seq_id=seq_id
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return message.SerializeToString()
