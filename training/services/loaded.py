"""The models that may be trained now, by id; and how stored operations become work again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from training.core import metrics
from training.core.errors import BackendError
from training.core.operations import Work
from training.core.records import FutureKind, Model
from training.services.hosts import Host


@dataclass(eq=False)
class LoadedModel:
    """``slot`` is None until the creation has run.

    Whether the slot holds the model is the affair of the task manager, which brings it back before
    anything runs.
    """

    model: Model
    host: Host
    slot: int | None = None

    def held_slot(self) -> int:
        """Raises ``BackendError`` when the creation failed."""
        if self.slot is None:
            raise BackendError(f"model {self.model.model_id} was not created")
        return self.slot


DecodeWork = Callable[[LoadedModel, int, bytes], Awaitable[Work]]
"""From an operation's model, seq and payload. Bad content gives ``RefusedWork``."""

Decoders = Mapping[FutureKind, DecodeWork]


class LoadedModels:
    def __init__(self) -> None:
        self._models: dict[str, LoadedModel] = {}

    def get(self, model_id: str) -> LoadedModel | None:
        return self._models.get(model_id)

    def of_session(self, session_id: str) -> list[LoadedModel]:
        return [each for each in self._models.values() if each.model.session_id == session_id]

    def num_by_owner(self) -> Counter[str]:
        """Models that hold a slot."""
        held = (each for each in self._models.values() if each.slot is not None)
        return Counter(each.model.owner for each in held)

    def add(self, loaded: LoadedModel) -> None:
        self._models[loaded.model.model_id] = loaded
        metrics.LOADED_MODELS.set(len(self._models))

    def remove(self, model_id: str) -> None:
        self._models.pop(model_id, None)
        metrics.LOADED_MODELS.set(len(self._models))
