"""Data and small drivers that the engine's training tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.engine.checkpoints import VOCAB_SIZE
from tests.engine.devices import CPU as CPU
from tests.engine.devices import load_model
from training.backends.base import Datum, LoraSpec, TrainOp, TrainOutput, TrainUnit
from training.config import EngineConfig
from training.engine.adapter import AdapterLayout, fresh_weights
from training.engine.foreign import ForeignDecoder
from training.engine.model import Transformer
from training.engine.optimizer import AdamState
from training.engine.state_files import write_state
from training.engine.trainer import Trainer, UnitRun

BASE_MODEL = "tests/tiny"
ATTN = LoraSpec(rank=4, seed=1, train_mlp=False, train_unembed=False)
MLP = LoraSpec(rank=3, seed=2, train_attn=False, train_unembed=False)
UNEMBED = LoraSpec(rank=5, seed=3, train_attn=False, train_mlp=False)
ALL = LoraSpec(rank=4, seed=4)


def make_trainer(
    checkpoint: Path,
    *specs: LoraSpec,
    dtype: torch.dtype = torch.float32,
    micro_batch_tokens: int = 2048,
    join_operations: bool = False,
    activation_memory_bytes: int | None = None,
    kind: type[Transformer | ForeignDecoder] = Transformer,
    device: torch.device = CPU,
) -> Trainer:
    """Slots 0, 1, ... hold adapters of ``specs`` with a B that is not zero."""
    model: Transformer | ForeignDecoder
    if kind is Transformer:
        model = load_model(checkpoint, device, dtype)
    else:
        model = kind.from_directory(checkpoint, device, dtype)
    config = EngineConfig(
        micro_batch_tokens=micro_batch_tokens,
        join_operations=join_operations,
        activation_memory_bytes=activation_memory_bytes,
    )
    trainer = Trainer(model, config, BASE_MODEL)
    for slot, spec in enumerate(specs):
        load_random(trainer, slot, spec, checkpoint / f"random-adapter-{slot}")
    return trainer


def load_random(trainer: Trainer, slot: int, spec: LoraSpec, directory: Path) -> None:
    """Loads a slot whose B is random: with the usual B of zero, half the gradients vanish."""
    layout = AdapterLayout.of(trainer.model.config, spec)
    flat = fresh_weights(layout)
    generator = torch.Generator().manual_seed(spec.seed + 100)
    for _, b, _ in layout.views(flat).values():
        b.uniform_(-0.1, 0.1, generator=generator)
    write_state(directory, layout, flat, AdamState.zeros_like(flat), BASE_MODEL)
    trainer.load_slot(slot, spec, directory)


def finish(run: UnitRun) -> list[TrainOutput]:
    while True:
        try:
            next(run)
        except StopIteration as stop:
            outputs: list[TrainOutput] = stop.value
            return outputs


def sft_data(lengths: Sequence[int], seed: int = 0) -> list[Datum]:
    """Cross-entropy data of random tokens and weights, zero on the first third (the prompt)."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = rng.normal(size=length).astype(np.float32)
        weights[: length // 3] = 0
        tokens = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        data.append(Datum(tokens, rng.integers(0, VOCAB_SIZE, length), {"weights": weights}))
    return data


def sft_op(slot: int, lengths: Sequence[int], seed: int = 0) -> TrainOp:
    return TrainOp(slot, "cross_entropy", {}, sft_data(lengths, seed))


def unit(*ops: TrainOp) -> TrainUnit:
    return TrainUnit(ops)


def gradient(trainer: Trainer, slot: int = 0) -> torch.Tensor:
    held = trainer.slot(slot)
    return torch.zeros_like(held.weights) if held.gradient is None else held.gradient


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
