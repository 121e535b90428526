"""``LocalBackend``: one supervised engine process for one base model.

The engine loses its slots with its process: the service loads them again when it sees a new
generation. Published snapshots come back by themselves, from the directories they came from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import structlog

from training.backends import ipc
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
from training.backends.child import EngineChild
from training.config import ModelConfig, TrainingConfig
from training.core import metrics
from training.core.errors import BackendDead, DeathCause, TinkercloudError
from training.core.records import utcnow
from training.models.registry import resolve_model_path

FIRST_RESTART_S = 0.1
SHORTEST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
CLOSE_GRACE_S = 10.0
START_ATTEMPTS = 3

_log = structlog.get_logger(__name__)


def restart_delay(num_fruitless: int) -> float:
    """Seconds until the next restart, after so many in a row that came to nothing."""
    if num_fruitless == 0:
        return FIRST_RESTART_S
    # 2.0**1024 would overflow.
    return min(SHORTEST_BACKOFF_S * 2.0 ** min(num_fruitless - 1, 10), LONGEST_BACKOFF_S)


class LocalBackend:
    """The engine is restarted for as long as the backend is not closed; calls wait for it.

    A call for a slot that a dead engine held raises ``BackendDead`` until the slot is loaded again,
    so that no operation meets an engine that has forgotten its adapter.
    """

    def __init__(self, model: ModelConfig, config: TrainingConfig) -> None:
        self._model = model
        self._config = config
        self._child: EngineChild | None = None
        self._capabilities: Capabilities | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._state = BackendState.STOPPED
        self._since = utcnow()
        self._detail = "not started"
        self._closed = False
        self._generation = 0
        self._num_restarts = 0
        self._num_fruitless = 0
        """Restarts in a row whose engine could not load, or died before it had finished any work:
        only then is it of use to wait longer before the next one."""
        self._slots: set[int] = set()
        self._lost_slots: set[int] = set()
        self._snapshots: dict[str, Path] = {}

    async def start(self) -> None:
        """Returns with the model loaded. Raises ``ConfigError`` where it cannot be."""
        self._enter(BackendState.STARTING)
        try:
            await self._bring_up_first()
        except Exception as error:
            self._enter(BackendState.STOPPED, str(error))
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._enter(BackendState.STOPPED, "the backend is closed")
            self._changed.notify_all()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._child is not None:
            await self._child.close(CLOSE_GRACE_S)
            self._child = None

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise BackendDead("the backend has not been started", DeathCause.CLOSED)
        return self._capabilities

    def health(self) -> Health:
        return Health(
            alive=self._is_live(),
            generation=self._generation,
            state=self._state,
            since=self._since,
            num_restarts=self._num_restarts,
            detail=self._detail,
        )

    def _is_live(self) -> bool:
        return self._child is not None and not self._child.ended.is_set()

    def _enter(self, state: BackendState, detail: str = "") -> None:
        if state is not self._state:
            self._since = utcnow()
        self._state, self._detail = state, detail

    @property
    def engine_pid(self) -> int | None:
        """The running engine's process id; None while there is none."""
        return self._child.pid if self._child is not None else None

    # ----------------------------------------------------------------- supervision

    async def _bring_up_first(self) -> None:
        """An engine that somebody killed while it loaded says nothing about the model."""
        for num_killed in range(1, START_ATTEMPTS):
            try:
                await self._bring_up()
                return
            except BackendDead as error:
                if error.cause is not DeathCause.KILLED:
                    raise
                _log.error("engine.start_failed", model=self._model.name, error=str(error))
            await asyncio.sleep(restart_delay(num_killed))
        await self._bring_up()

    async def _bring_up(self) -> None:
        child = await self._spawn()
        try:
            await self._adopt(child)
        except BaseException:
            await child.close(0.0)
            raise

    async def _spawn(self) -> EngineChild:
        path = await asyncio.to_thread(resolve_model_path, self._model, self._config)
        child = EngineChild(
            ipc.Configure(
                self._model.name, path, self._model.context_length, self._config.resolved_engine()
            ),
            self._on_line,
        )
        started_at = time.monotonic()
        try:
            self._capabilities = await child.start()
        except BackendDead as error:
            message = f"{error} while loading:\n{child.last_lines()}"
            raise BackendDead(message, error.cause) from error
        _log.info(
            "engine.started",
            model=self._model.name,
            pid=child.pid,
            seconds=round(time.monotonic() - started_at, 2),
        )
        return child

    async def _adopt(self, child: EngineChild) -> None:
        """Republishes the snapshots, then opens the engine to calls as a new generation."""
        for snapshot_id, directory in list(self._snapshots.items()):
            if snapshot_id not in self._snapshots:
                continue  # retired meanwhile
            try:
                await child.call(ipc.Publish(snapshot_id, directory))
            except BackendDead:
                break  # the supervisor sees it too
            except TinkercloudError as error:
                _log.warning("engine.snapshot_lost", snapshot=snapshot_id, error=str(error))
                self._snapshots.pop(snapshot_id, None)
        async with self._changed:
            if self._closed:  # while it was loading
                raise _closed()
            self._child = child
            self._generation += 1
            self._enter(BackendState.RUNNING)
            self._changed.notify_all()

    async def _supervise(self) -> None:
        """Until ``close``: whatever happens, another engine is tried."""
        while True:
            try:
                if self._child is not None:
                    await self._attend(self._child)
                await self._restart()
            except (TinkercloudError, OSError) as error:
                self._num_fruitless += 1
                self._go_down(str(error))
                _log.error("engine.restart_failed", model=self._model.name, error=str(error))
            except Exception as error:
                # The border of the job: with nobody watching, every call would wait for ever.
                self._num_fruitless += 1
                self._go_down(f"{type(error).__name__}: {error}")
                _log.exception("engine.supervisor_failed", model=self._model.name)

    async def _attend(self, child: EngineChild) -> None:
        """To its end."""
        await child.ended.wait()
        _log.error(
            "engine.died", model=self._model.name, cause=str(child.cause), detail=child.detail
        )
        metrics.ENGINE_DEATHS.labels(str(child.cause)).inc()
        self._child = None
        self._lost_slots |= self._slots
        self._slots = set()
        if child.has_worked:
            self._num_fruitless = 0
        elif self._generation > 1:
            self._num_fruitless += 1
        self._go_down(child.detail)

    def _go_down(self, detail: str) -> None:
        failing = self._num_fruitless >= self._config.engine.max_restarts
        state = BackendState.FAILING if failing else BackendState.RESTARTING
        self._enter(state, f"{detail}; it is being restarted")

    async def _restart(self) -> None:
        """One try, after its delay."""
        await asyncio.sleep(restart_delay(self._num_fruitless))
        self._num_restarts += 1
        await self._bring_up()

    def _on_line(self, pid: int, line: str) -> None:
        _log.info("engine.output", model=self._model.name, pid=pid, line=line)

    # ----------------------------------------------------------------- calls

    async def _live(self) -> EngineChild:
        """The engine that takes calls; waits for a restart. Raises ``BackendDead``."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_live() or self._closed)
        if self._child is None or self._closed:
            raise _closed()
        return self._child

    async def _call(self, command: ipc.TrainingCommand, *slots: int) -> object:
        """``slots`` must have been loaded into the engine that answers."""
        child = await self._live_with(*slots)
        return await child.call(command)

    async def _live_with(self, *slots: int) -> EngineChild:
        child = await self._live()
        if lost := sorted(self._lost_slots.intersection(slots)):
            message = f"slot {lost[0]} went with an engine that died; load it again"
            raise BackendDead(message, DeathCause.LOST)
        return child

    async def load_slot(
        self,
        slot: int,
        spec: LoraSpec,
        state_dir: Path | None = None,
        with_optimizer: bool = True,
    ) -> None:
        child = await self._live()
        await child.call(ipc.LoadSlot(slot, spec, state_dir, with_optimizer))
        if child is not self._child:
            raise BackendDead(child.detail, DeathCause.LOST)
        self._slots.add(slot)
        self._lost_slots.discard(slot)

    async def unload_slot(self, slot: int) -> None:
        child = await self._live()
        self._slots.discard(slot)
        self._lost_slots.discard(slot)
        await child.call(ipc.UnloadSlot(slot))

    async def forward_backward(self, unit: TrainUnit) -> list[TrainOutput]:
        outputs = await self._call(ipc.ForwardBackward(unit), *(op.slot for op in unit.ops))
        return cast(list[TrainOutput], outputs)

    async def forward(self, unit: TrainUnit) -> list[TrainOutput]:
        outputs = await self._call(ipc.Forward(unit), *(op.slot for op in unit.ops))
        return cast(list[TrainOutput], outputs)

    async def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        outputs = await self._call(ipc.OptimStep(params), *params)
        return cast(dict[int, OptimOutput], outputs)

    async def discard_grads(self, slot: int) -> None:
        await self._call(ipc.DiscardGrads(slot), slot)

    async def save_state(self, slot: int, directory: Path) -> Saving:
        child = await self._live_with(slot)
        return await child.save(ipc.SaveState(slot, directory))

    async def export_adapter(self, slot: int, directory: Path) -> Saving:
        child = await self._live_with(slot)
        return await child.save(ipc.ExportAdapter(slot, directory))

    async def publish(self, snapshot_id: str, directory: Path) -> None:
        child = await self._live()
        await child.call(ipc.Publish(snapshot_id, directory))
        self._snapshots[snapshot_id] = directory
        if child is not self._child:
            # Its successor may have started without this one.
            raise BackendDead(child.detail, DeathCause.LOST)

    async def retire(self, snapshot_id: str) -> None:
        self._snapshots.pop(snapshot_id, None)
        child = self._child
        if child is not None and not child.ended.is_set():  # else nobody knows it any longer
            await child.call(ipc.Retire(snapshot_id))

    async def sample(self, request: SampleRequest) -> SampleResult:
        child = await self._live()
        try:
            return cast(SampleResult, await child.call(ipc.Sample(request)))
        except asyncio.CancelledError:
            child.post(ipc.Cancel(request.request_id))
            raise

    async def cancel(self, request_id: str) -> None:
        if self._child is not None:
            await self._child.call(ipc.Cancel(request_id))


def _closed() -> BackendDead:
    return BackendDead("the backend is closed", DeathCause.CLOSED)
