"""Operations that never arrive: waited for, then given up, so that what follows them can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from training.core.background import Background
from training.core.errors import TinkercloudError
from training.core.keeper import Keeper
from training.core.model_queue import ModelQueue

log = structlog.get_logger(__name__)

_LARGEST_STORED = 1024
"""Places. What leaves more of them empty is no client of ours; its places are not stored."""


class Gaps:
    """``wake`` makes the task manager's loop look at its queues again."""

    def __init__(
        self, keeper: Keeper, background: Background, timeout_s: float, wake: Callable[[], None]
    ) -> None:
        self._keeper = keeper
        self._background = background
        self._timeout_s = timeout_s
        self._wake = wake
        self._since_s: dict[str, float] = {}

    def forget(self, model_id: str) -> None:
        self._since_s.pop(model_id, None)

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until a gap is to be given up; None: there is none."""
        if not self._since_s:
            return None
        return max(min(self._since_s.values()) + self._timeout_s - now_s, 0.0)

    def give_up(self, queues: Iterable[ModelQueue], now_s: float) -> None:
        for queue in queues:
            if queue.must_revive or queue.busy or not queue.has_gap():
                self.forget(queue.model_id)
                continue
            waited_s = now_s - self._since_s.setdefault(queue.model_id, now_s)
            if waited_s < self._timeout_s and not queue.gap_is_settled():
                continue
            self.forget(queue.model_id)
            missing = queue.missing()
            log.warning(
                "queue.gap_given_up",
                model_id=queue.model_id,
                first_seq=missing.start,
                num_missing=len(missing),
            )
            if len(missing) > _LARGEST_STORED:
                queue.skip_gap()
            else:
                queue.busy = True
                self._background.start(queue.model_id, self._fill(queue, missing))

    async def _fill(self, queue: ModelQueue, missing: range) -> None:
        """What never arrived becomes operations that failed, which is what a replay will see; one
        that arrives while they are stored runs after all."""
        try:
            for operation in await self._keeper.fill_gap(queue.model_id, missing):
                queue.push(operation)
        except TinkercloudError as error:
            log.error("queue.gap_not_stored", model_id=queue.model_id, error=str(error))
        finally:
            queue.busy = False
            self._wake()
