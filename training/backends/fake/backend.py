"""``FakeBackend``: the whole backend interface over the numpy model, in the caller's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from training.backends.base import (
    AdamParams,
    BackendState,
    Capabilities,
    Health,
    LoraSpec,
    OptimOutput,
    SampleRequest,
    SampleResult,
    Saving,
    TrainOutput,
    TrainUnit,
)
from training.backends.fake import sampler, trainer
from training.backends.fake.model import LAYER_GROUPS, BaseWeights, HeadView
from training.backends.fake.turns import TenantTurns
from training.backends.state_files import storage_errors
from training.config import ModelConfig, TrainingConfig
from training.core.errors import BackendDead, DeathCause, UnitError, UserError
from training.core.records import utcnow
from training.core.threads import in_thread
from training.losses import LOSSES
from training.models.registry import served_model_info


class FakeBackend:
    """A backend whose answers are exact and instant.

    Vocabulary, context length and end tokens are those that ``served_model_info`` tells of the
    model. Texts are those of the ``tokenizer.json`` in its ``path``; without
    one, token i reads as the character of code point i.
    ``delay_s`` (the configured one, if None) is slept before each training call and each turn of a
    sample, for load tests.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainingConfig,
        *,
        delay_s: float | None = None,
    ) -> None:
        info = served_model_info(model, config)
        self._text_of = sampler.texts(model.path, info.vocab_size)
        self._base = BaseWeights(info.vocab_size)
        self._base_view = HeadView(self._base, None, {})
        self._delay_s = model.delay_s if delay_s is None else delay_s
        self._training = asyncio.Lock()
        self._slots: dict[int, trainer.Slot] = {}
        self._lost_slots: set[int] = set()
        self._snapshots: dict[str, HeadView] = {}
        self._sampling = TenantTurns()
        self._running: set[str] = set()
        self._cancelled: set[str] = set()
        self._death = DeathCause.CRASHED  # of the last generation
        self._writings: dict[asyncio.Task[None], asyncio.Future[None]] = {}
        self._state = BackendState.STOPPED
        self._since = utcnow()
        self._generation = 0
        self._capabilities = Capabilities(
            base_model=model.name,
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            eos_token_ids=info.eos_token_ids,
            max_slots=config.engine.max_slots,
            max_lora_rank=config.engine.max_lora_rank,
            losses=frozenset(LOSSES),
            layer_groups=frozenset(LAYER_GROUPS),
        )

    async def start(self) -> None:
        self._state, self._since = BackendState.RUNNING, utcnow()
        self._generation += 1

    async def close(self) -> None:
        self._state, self._since = BackendState.STOPPED, utcnow()
        await asyncio.gather(*self._writings)  # what was captured is written
        self._slots.clear()
        self._snapshots.clear()

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def health(self) -> Health:
        return Health(
            alive=self._state is BackendState.RUNNING,
            generation=self._generation,
            state=self._state,
            since=self._since,
            num_restarts=max(self._generation - 1, 0),
        )

    def crash(self, cause: DeathCause = DeathCause.CRASHED) -> None:
        """What a dying engine does to its callers: slots are gone, running calls and writings raise
        ``BackendDead``; it is back at once with its snapshots and the next generation. Calls for
        a lost slot raise ``BackendDead`` until it is loaded again."""
        self._death = cause
        self._lost_slots |= set(self._slots)
        self._slots.clear()
        self._generation += 1
        for writing in self._writings.values():
            _settle(writing, BackendDead("the fake engine has ended", cause))

    # ----------------------------------------------------------------- training

    async def load_slot(
        self,
        slot: int,
        spec: LoraSpec,
        state_dir: Path | None = None,
        with_optimizer: bool = True,
    ) -> None:
        async with self._training:
            await self._turn()
            limits = self._capabilities
            if slot not in self._slots and len(self._slots) >= limits.max_slots:
                raise UnitError(f"all {limits.max_slots} adapter slots are in use")
            if not 1 <= spec.rank <= limits.max_lora_rank:
                raise UserError(f"rank {spec.rank} is outside 1 to {limits.max_lora_rank}")
            self._slots[slot] = (
                trainer.new_slot(self._base, spec)
                if state_dir is None
                else trainer.read_slot(self._base, spec, state_dir, with_optimizer)
            )
            self._lost_slots.discard(slot)

    async def unload_slot(self, slot: int) -> None:
        async with self._training:
            await self._turn()
            self._slots.pop(slot, None)
            self._lost_slots.discard(slot)

    async def forward_backward(self, unit: TrainUnit) -> list[TrainOutput]:
        async with self._training:
            results = await self._compute(unit)
            for op, result in zip(unit.ops, results, strict=True):
                trainer.add_gradient(self._slots[op.slot], result.gradient_VD)
            return [result.output for result in results]

    async def forward(self, unit: TrainUnit) -> list[TrainOutput]:
        async with self._training:
            return [result.output for result in await self._compute(unit)]

    async def _compute(self, unit: TrainUnit) -> list[trainer.OpResult]:
        results = []
        await self._turn()
        for index, op in enumerate(unit.ops):
            try:
                results.append(
                    trainer.compute_op(self._slot(op.slot), op, self._capabilities.context_length)
                )
            except UserError as error:
                raise UserError(str(error), op_index=index) from error
            await self._turn(0.0)
        return results

    async def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        async with self._training:
            await self._turn()
            slots = {slot: self._slot(slot) for slot in params}
            outputs = {}
            for slot, adam in params.items():
                outputs[slot] = trainer.adamw_step(slots[slot], adam)
                await self._turn(0.0)  # whoever waits for the event loop need not wait for all
            return outputs

    async def discard_grads(self, slot: int) -> None:
        async with self._training:
            await self._turn()
            self._slot(slot).gradients = {}

    async def save_state(self, slot: int, directory: Path) -> Saving:
        return await self._save(slot, directory, trainer.write_state)

    async def export_adapter(self, slot: int, directory: Path) -> Saving:
        return await self._save(slot, directory, trainer.write_adapter)

    async def _save(
        self, slot: int, directory: Path, write: Callable[[trainer.Slot, Path, str], None]
    ) -> Saving:
        async with self._training:
            await self._turn()
            captured = trainer.captured(self._slot(slot))
        writing = asyncio.get_running_loop().create_future()

        def write_now() -> None:
            with storage_errors():
                write(captured, directory, self._capabilities.base_model)

        async def settle() -> None:
            try:
                await in_thread(write_now)
            except Exception as error:
                _settle(writing, error)
            else:
                _settle(writing, None)

        task = asyncio.create_task(settle())
        self._writings[task] = writing
        task.add_done_callback(self._writings.pop)
        return Saving(writing)

    def _slot(self, slot: int) -> trainer.Slot:
        if slot in self._lost_slots:
            message = f"slot {slot} went with an engine that died; load it again"
            raise BackendDead(message, DeathCause.LOST)
        if slot not in self._slots:
            raise UnitError(f"slot {slot} holds no adapter")
        return self._slots[slot]

    async def _turn(self, delay_s: float | None = None) -> None:
        """Lets others run; raises ``BackendDead`` when the backend went meanwhile."""
        generation = self._generation
        await asyncio.sleep(self._delay_s if delay_s is None else delay_s)
        self._check_alive(generation)

    def _check_alive(self, generation: int) -> None:
        if self._state is not BackendState.RUNNING:
            raise BackendDead("the fake engine has ended", DeathCause.CLOSED)
        if generation != self._generation:
            raise BackendDead("the fake engine has ended", self._death)

    # ----------------------------------------------------------------- sampling

    async def publish(self, snapshot_id: str, directory: Path) -> None:
        await self._turn(0.0)
        self._snapshots[snapshot_id] = trainer.read_view(self._base, directory)

    async def retire(self, snapshot_id: str) -> None:
        await self._turn(0.0)
        self._snapshots.pop(snapshot_id, None)

    async def sample(self, request: SampleRequest) -> SampleResult:
        limits = self._capabilities
        sampler.check_request(request, limits.vocab_size, limits.context_length)
        view = self._base_view
        if request.snapshot_id is not None:
            if request.snapshot_id not in self._snapshots:
                raise UserError(f"unknown snapshot {request.snapshot_id!r}")
            view = self._snapshots[request.snapshot_id]
        self._running.add(request.request_id)
        try:
            await self._sampling_turn(request.tenant)
            for result in sampler.run_request(view, request, limits.context_length, self._text_of):
                if request.request_id in self._cancelled:
                    raise UserError("the request was cancelled")
                if result is not None:
                    return result
                await self._sampling_turn(request.tenant)
            raise AssertionError("a request ends with its result")
        finally:
            self._running.discard(request.request_id)
            self._cancelled.discard(request.request_id)

    async def _sampling_turn(self, tenant: str) -> None:
        generation = self._generation
        await self._turn()
        await self._sampling.turn(tenant)
        self._check_alive(generation)

    async def cancel(self, request_id: str) -> None:
        if request_id in self._running:
            self._cancelled.add(request_id)


def _settle(writing: asyncio.Future[None], error: Exception | None) -> None:
    if writing.done():
        return
    if error is None:
        writing.set_result(None)
    else:
        writing.set_exception(error)
