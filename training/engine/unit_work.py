"""What one unit has computed so far: micro-batches in, outputs and slots' gradients out.

Slots' own gradients are left alone until the unit has succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from training.backends.base import Datum, Float32Array, TrainOutput, TrainUnit
from training.core.errors import UserError
from training.engine.adapter import Adapter, GradientSink, Segment
from training.engine.decoder import Decoder
from training.engine.head import Head
from training.engine.packing import Chunk, MicroBatch
from training.losses import LOSSES


class UnitSlots(Protocol):
    """What a unit asks of the adapter slots. All may raise ``UnitError``."""

    def adapter(self, number: int) -> Adapter: ...

    def gradient_buffer(self, number: int) -> torch.Tensor:
        """fp32 [num_params] of any content, for the gradient of one operation."""

    def add_gradient(self, number: int, gradient: torch.Tensor) -> None:
        """Slot gradient + operation gradient, always in this order and never in place of the
        slot's own: the unit may yet fail."""


class UnitWork:
    def __init__(
        self,
        decoder: Decoder,
        unit: TrainUnit,
        slots: UnitSlots,
        with_gradient: bool,
        activation_memory_bytes: int,
    ) -> None:
        self.decoder = decoder
        self.unit = unit
        self.slots = slots
        self.with_gradient = with_gradient
        self.activation_memory_bytes = activation_memory_bytes
        self._sinks: dict[int, GradientSink] = {}
        self._losses = [0.0 for _ in unit.ops]
        self._logprobs: list[list[Float32Array]] = [
            [np.empty(0, np.float32)] * len(op.data) for op in unit.ops
        ]

    def outputs(self) -> list[TrainOutput]:
        return [
            TrainOutput(logprobs, {"loss:sum": loss})
            for logprobs, loss in zip(self._logprobs, self._losses, strict=True)
        ]

    def micro_batch(self, batch: MicroBatch) -> None:
        data = [chunk.data(self.unit) for chunk in batch.chunks]
        segments = self._segments(batch.chunks)
        training_pass = self.decoder.training_pass(
            [datum.tokens for each in data for datum in each],
            segments,
            with_gradient=self.with_gradient,
            checkpointing=batch.oversized and not self._can_be_kept(segments[-1].stop),
        )
        hidden_TH = training_pass.hidden_TH
        dhidden_TH = torch.zeros_like(hidden_TH) if self.with_gradient else None
        has_gradient = False
        for chunk, segment, each in zip(batch.chunks, segments, data, strict=True):
            has_gradient |= self._head(chunk, segment, each, hidden_TH, dhidden_TH)
        if has_gradient and dhidden_TH is not None:
            training_pass.backward(dhidden_TH)
        for chunk in batch.chunks:
            if chunk.last and self.with_gradient:
                self._add_to_slot(chunk.op_index)

    def _can_be_kept(self, num_tokens: int) -> bool:
        return self.decoder.activation_bytes(num_tokens) <= self.activation_memory_bytes

    def _segments(self, chunks: Sequence[Chunk]) -> list[Segment]:
        segments = []
        start = 0
        for chunk in chunks:
            adapter = self.slots.adapter(self.unit.ops[chunk.op_index].slot)
            try:
                adapter.check()
            except UserError as error:
                raise UserError(str(error), chunk.op_index) from None
            sink = self._sink(chunk.op_index, adapter) if self.with_gradient else None
            segments.append(Segment(adapter, start, start + chunk.num_tokens, sink))
            start += chunk.num_tokens
        return segments

    def _sink(self, op_index: int, adapter: Adapter) -> GradientSink:
        if op_index not in self._sinks:
            flat = self.slots.gradient_buffer(self.unit.ops[op_index].slot)
            self._sinks[op_index] = GradientSink(adapter.layout, flat)
        return self._sinks[op_index]

    def _head(
        self,
        chunk: Chunk,
        segment: Segment,
        data: Sequence[Datum],
        hidden_TH: torch.Tensor,
        dhidden_TH: torch.Tensor | None,
    ) -> bool:
        """Losses and logprobs of a chunk; returns whether it has any gradient."""
        op = self.unit.ops[chunk.op_index]
        rows = slice(segment.start, segment.stop)
        head = Head(
            self.decoder,
            segment,
            LOSSES[op.loss],
            op.loss_config,
            hidden_TH[rows],
            None if dhidden_TH is None else dhidden_TH[rows],
        )
        try:
            result = head.run(data)
        except UserError as error:
            raise UserError(str(error), chunk.op_index) from None
        self._losses[chunk.op_index] += result.loss
        for place, logprobs in zip(chunk.places, result.logprobs, strict=True):
            self._logprobs[chunk.op_index][place] = logprobs
        return result.has_gradient

    def _add_to_slot(self, op_index: int) -> None:
        gradient = self._sinks.pop(op_index).finish()
        self.slots.add_gradient(self.unit.ops[op_index].slot, gradient)
