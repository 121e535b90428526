"""What an engine without work gives back."""

from __future__ import annotations

import time
from collections.abc import Callable


class IdleMemory:
    """Calls ``release`` once for each time that nothing was done for ``after_s``."""

    def __init__(
        self,
        release: Callable[[], None],
        after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._release = release
        self._after_s = after_s
        self._clock = clock
        self._worked_at_s: float | None = None  # None: nothing since the last release

    @property
    def is_released(self) -> bool:
        return self._worked_at_s is None

    def tidy(self, busy: bool) -> float | None:
        """Returns the seconds until there is something to do if nothing else happens; None: never.

        ``busy``: the engine has worked since the last call.
        """
        now_s = self._clock()
        if busy:
            self._worked_at_s = now_s
        if self._worked_at_s is None:
            return None
        if now_s - self._worked_at_s < self._after_s:
            return self._worked_at_s + self._after_s - now_s
        self._worked_at_s = None
        self._release()
        return None
