"""``LocalBackend``: one supervised engine process for one base model.

The engine loses its slots with its process: the service loads them again when it sees a new
generation. Published snapshots come back by themselves, from the directories they came from.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import structlog

from training.backends import ipc
from training.backends.base import (
    AdamParams,
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
from training.core.errors import BackendDead, ConfigError, TinkercloudError
from training.models.registry import resolve_model_path

RESTART_WINDOW_S = 600.0
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
CLOSE_GRACE_S = 10.0

_log = structlog.get_logger(__name__)


def restart_delay(restarts_at: deque[float], now: float, max_restarts: int) -> float | None:
    """Seconds to wait before the next restart, doubling with each one in the window.

    ``restarts_at`` are the times of earlier ones; None: there were too many.
    """
    recent = sum(now - at < RESTART_WINDOW_S for at in restarts_at)
    if recent >= max_restarts:
        return None
    return min(FIRST_BACKOFF_S * 2.0**recent, LONGEST_BACKOFF_S)


class LocalBackend:
    """Calls wait while the engine restarts, and raise ``BackendDead`` when it is given up.

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
        self._ended: str | None = None
        """Why there will be no engine any more."""
        self._detail = "not started"
        self._generation = 0
        self._restarts_at: deque[float] = deque()
        self._slots: set[int] = set()
        self._lost_slots: set[int] = set()
        self._snapshots: dict[str, Path] = {}

    async def start(self) -> None:
        """Returns with the model loaded. Raises ``ConfigError`` where it cannot be."""
        child = await self._spawn()
        if self._ended is not None:  # closed while it was loading
            await child.close(0.0)
            raise BackendDead(self._ended)
        await self._adopt(child)
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        await self._give_up("the backend is closed")
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._child is not None:
            await self._child.close(CLOSE_GRACE_S)
            self._child = None

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise BackendDead("the backend has not been started")
        return self._capabilities

    def health(self) -> Health:
        return Health(self._is_live(), self._generation, self._detail)

    def _is_live(self) -> bool:
        return self._child is not None and not self._child.ended.is_set()

    @property
    def engine_pid(self) -> int | None:
        """The running engine's process id; None while there is none."""
        return self._child.pid if self._child is not None else None

    # ----------------------------------------------------------------- supervision

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
            raise BackendDead(f"{error} while loading:\n{child.last_lines()}") from error
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
            try:
                await child.call(ipc.Publish(snapshot_id, directory))
            except BackendDead:
                break  # the supervisor sees it too
            except TinkercloudError as error:
                _log.warning("engine.snapshot_lost", snapshot=snapshot_id, error=str(error))
                self._snapshots.pop(snapshot_id, None)
        async with self._changed:
            self._child = child
            self._generation += 1
            self._detail = ""
            self._changed.notify_all()

    async def _supervise(self) -> None:
        try:
            await self._watch()
        except Exception as error:
            # The border of the job: with nobody watching, every call would wait for ever.
            _log.exception("engine.supervisor_failed", model=self._model.name)
            await self._give_up(f"the engine's supervisor failed: {type(error).__name__}")

    async def _watch(self) -> None:
        while self._child is not None:
            child = self._child
            await child.ended.wait()
            _log.error("engine.died", model=self._model.name, detail=child.detail)
            async with self._changed:
                self._child = None
                self._detail = child.detail
                self._lost_slots |= self._slots
                self._slots = set()
            await self._restart()

    async def _restart(self) -> None:
        """Tries until an engine is adopted or none will be."""
        while self._child is None:
            delay_s = restart_delay(
                self._restarts_at, time.monotonic(), self._config.engine.max_restarts
            )
            if delay_s is None:
                await self._give_up(f"{self._detail}; it was restarted too often")
                return
            await asyncio.sleep(delay_s)
            self._restarts_at.append(time.monotonic())
            try:
                child = await self._spawn()
            except ConfigError as error:
                await self._give_up(str(error))
                return
            except (BackendDead, OSError) as error:
                _log.error("engine.restart_failed", model=self._model.name, error=str(error))
                self._detail = str(error)
                continue
            await self._adopt(child)

    async def _give_up(self, reason: str) -> None:
        async with self._changed:
            if self._ended is None:
                self._ended = self._detail = reason
            self._changed.notify_all()

    def _on_line(self, pid: int, line: str) -> None:
        _log.info("engine.output", model=self._model.name, pid=pid, line=line)

    # ----------------------------------------------------------------- calls

    async def _live(self) -> EngineChild:
        """The engine that takes calls; waits for a restart. Raises ``BackendDead``."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_live() or self._ended is not None)
        if self._child is None or self._ended is not None:
            raise BackendDead(self._ended or self._detail)
        return self._child

    async def _call(self, command: ipc.TrainingCommand, *slots: int) -> object:
        """``slots`` must have been loaded into the engine that answers."""
        child = await self._live_with(*slots)
        return await child.call(command)

    async def _live_with(self, *slots: int) -> EngineChild:
        child = await self._live()
        if lost := sorted(self._lost_slots.intersection(slots)):
            raise BackendDead(f"slot {lost[0]} went with an engine that died; load it again")
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
            raise BackendDead(child.detail)
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
            raise BackendDead(child.detail)  # its successor may have started without this one

    async def retire(self, snapshot_id: str) -> None:
        self._snapshots.pop(snapshot_id, None)
        child = await self._live()
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
