"""Trains many adapters on one frozen model: slots, gradients of units, optimizer steps.

Gradients of an operation are summed chunk by chunk into a buffer of its own, which is then added
to its slot's gradient in the order of operations; a unit that fails drops its buffers, and the
slots' gradients are what they were. All calls come from one thread.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path

from training.backends.base import (
    AdamParams,
    Capabilities,
    Datum,
    LoraSpec,
    OptimOutput,
    TrainOutput,
    TrainUnit,
)
from training.config import EngineConfig
from training.core.errors import BackendError, UnitError, UserError
from training.engine.adapter import AdapterLayout
from training.engine.adapter_slots import AdapterSlots
from training.engine.capture import Capture
from training.engine.decoder import Decoder
from training.engine.idle import IdleMemory
from training.engine.machine import memory_bytes
from training.engine.packing import plan_micro_batches
from training.engine.slot import Slot
from training.engine.slot_memory import SlotMemory
from training.engine.slot_store import SlotStore
from training.engine.spill_files import SpillDirectory
from training.engine.state_files import read_state
from training.engine.unit_work import UnitWork
from training.losses import LOSSES
from training.losses.base import LossSpec

ACTIVATION_PARTS = 8
"""One of so many parts of the memory is for the activations of a long sequence."""

IDLE_SPILLS = 3
"""An engine gives the memory of its passes back after so many times ``idle_spill_s``. Of a pass of
8192 tokens that is 3.3 GB, which take 5 s to fault in again (8 x 128 tokens: 0.6 GB, 0.9 s)."""

UnitRun = Generator[None, None, list[TrainOutput]]
"""Yields after every micro-batch, so that its caller can do other work; returns the outputs."""


class Trainer:
    """``name`` is the base model's; ``context_length`` may shorten the model's own."""

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        name: str,
        context_length: int | None = None,
        slots: AdapterSlots | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.name = name
        self.context_length = min(
            context_length or model.config.context_length, model.config.context_length
        )
        self.slots = slots or new_slots(model, config)
        self.idle_memory = IdleMemory(model.release_memory, IDLE_SPILLS * config.idle_spill_s)
        self.activation_memory_bytes = (
            config.activation_memory_bytes or memory_bytes(model.device) // ACTIVATION_PARTS
        )

    def capabilities(self) -> Capabilities:
        return Capabilities(
            base_model=self.name,
            vocab_size=self.model.config.vocab_size,
            context_length=self.context_length,
            eos_token_ids=self.model.config.eos_token_ids,
            max_slots=self.config.max_slots,
            max_lora_rank=self.config.max_lora_rank,
            losses=frozenset(LOSSES),
        )

    # ------------------------------------------------------------------ slots

    def load_slot(
        self,
        slot: int,
        spec: LoraSpec,
        state_dir: Path | None = None,
        with_optimizer: bool = True,
    ) -> None:
        """Raises ``UserError`` where the saved state does not fit; the old slot then remains."""
        if not 1 <= spec.rank <= self.config.max_lora_rank:
            raise UserError(f"LoRA rank {spec.rank} is not in 1..{self.config.max_lora_rank}")
        layout = AdapterLayout.of(self.model.config, spec)
        saved = None
        if state_dir is not None:
            saved = read_state(state_dir, layout, self.model.config, self.name, with_optimizer)
        self.slots.allocate(slot, layout, saved)

    def unload_slot(self, slot: int) -> None:
        self.slots.free(slot)

    def discard_grads(self, slot: int) -> None:
        self.slots.discard_gradient(slot)

    def capture_state(self, slot: int) -> Capture:
        """A copy of weights, moments and step, to be written. Raises ``UnitError``."""
        return self.slots.capture(slot, with_optimizer=True, base_model=self.name)

    def capture_adapter(self, slot: int) -> Capture:
        """Of the weights alone."""
        return self.slots.capture(slot, with_optimizer=False, base_model=self.name)

    def slot(self, slot: int) -> Slot:
        """Brought into memory. Raises ``UnitError``."""
        return self.slots.use(slot)

    def tidy(self, busy: bool) -> float | None:
        """What the engine's loop calls between turns: one small piece of work at most. Returns the
        seconds until there is more to do if nothing else happens; None: nothing."""
        waits = (self.slots.tidy(busy), self.idle_memory.tidy(busy))
        return min((each for each in waits if each is not None), default=None)

    # ------------------------------------------------------------------ units

    def forward_backward(self, unit: TrainUnit) -> UnitRun:
        """Raises ``UserError`` (with the operation's index) or ``UnitError``; nothing changed."""
        return self._run(unit, with_gradient=True)

    def forward(self, unit: TrainUnit) -> UnitRun:
        return self._run(unit, with_gradient=False)

    def _run(self, unit: TrainUnit, with_gradient: bool) -> UnitRun:
        self._check(unit)
        budget_bytes = self.activation_memory_bytes
        work = UnitWork(self.model, unit, self.slots, with_gradient, budget_bytes)
        # Where bits do not depend on the company, small operations always share a pass.
        join = self.model.is_batch_invariant or self.config.join_operations
        try:
            for batch in plan_micro_batches(unit, self.config.micro_batch_tokens, join):
                work.micro_batch(batch)
                yield
            self.slots.keep_gradients()
            return work.outputs()
        except BackendError:
            raise
        except Exception as error:  # border: whatever torch raises, out of memory included
            raise UnitError(f"the unit failed: {type(error).__name__}: {error}") from error
        finally:
            self.slots.drop_gradients()  # of a unit that did not come to its end

    def _check(self, unit: TrainUnit) -> None:
        for op_index, op in enumerate(unit.ops):
            self.slots.check_exists(op.slot)
            if op.loss not in LOSSES:
                raise UserError(f"loss {op.loss!r} is not offered", op_index)
            for datum in op.data:
                if problem := self._problem(datum, LOSSES[op.loss]):
                    raise UserError(problem, op_index)

    def _problem(self, datum: Datum, loss: LossSpec) -> str | None:
        if not 1 <= datum.num_tokens <= self.context_length:
            return f"a sequence has {datum.num_tokens} tokens, not 1 to {self.context_length}"
        if len(datum.targets) != datum.num_tokens or datum.targets.ndim > loss.max_rank:
            return f"targets of shape {datum.targets.shape} do not fit {loss.name}"
        if missing := [name for name in loss.required if name not in datum.inputs]:
            return f"{loss.name} needs the inputs {missing}"
        if any(each.shape != datum.targets.shape for each in datum.inputs.values()):
            return "an input does not have the shape of the targets"
        for ids in (datum.tokens, datum.targets):
            if ids.size and (ids.min() < 0 or ids.max() >= self.model.config.vocab_size):
                return "a token id is outside the vocabulary"
        return None

    # ------------------------------------------------------------------ steps

    def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        for slot in params:
            self.slots.check_exists(slot)
        return {slot: self.slots.step(slot, each) for slot, each in params.items()}


def new_slots(model: Decoder, config: EngineConfig) -> AdapterSlots:
    parent = config.spill_dir or Path(tempfile.gettempdir()) / f"tinkercloud-{os.getuid()}"
    store = SlotStore(model, SpillDirectory(parent))
    return AdapterSlots(SlotMemory(store, config), config.max_slots, model.adam)
