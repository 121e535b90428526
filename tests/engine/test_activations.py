"""How much a pass keeps for its backward pass, as decoders of torch operations say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.checkpoints import make_checkpoint
from training.backends.base import LoraSpec
from training.engine.adapter import AdapterLayout, GradientSink, Segment, fresh_weights
from training.engine.foreign import ForeignDecoder
from training.engine.model import Transformer

CPU = torch.device("cpu")
DecoderType = type[Transformer] | type[ForeignDecoder]


def kept_bytes(decoder: Transformer | ForeignDecoder, num_tokens: int) -> int:
    """Of all different tensors that autograd saves, base weights included."""
    layout = AdapterLayout.of(decoder.config, LoraSpec(4, seed=1))
    adapter = decoder.new_adapter(layout, fresh_weights(layout), trainable=True)
    sink = GradientSink(layout, torch.zeros(layout.num_params))
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = decoder.training_pass(
            [np.zeros(num_tokens, np.int32)],
            [Segment(adapter, 0, num_tokens, sink)],
            with_gradient=True,
            checkpointing=False,
        )
    assert held.hidden_TH.shape[0] == num_tokens
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Transformer, ForeignDecoder])
def test_activation_bytes(kind: DecoderType, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = kind.from_directory(make_checkpoint("wide", tmp_path), CPU, dtype)
    grown = kept_bytes(decoder, 1024) - kept_bytes(decoder, 768)
    expected = decoder.activation_bytes(256)
    assert decoder.activation_bytes(512) == 2 * expected
    assert 0.5 < grown / expected < 0.8
