"""Every error the server raises on purpose. No HTTP in here.

    TinkercloudError
    ├── RequestError              the caller is at fault (category "user")
    │   ├── InvalidRequest        malformed or out of range
    │   ├── Unsupported           understood, but not offered by this server
    │   ├── Unauthenticated       no key, or a wrong one
    │   ├── NotFound              no such object, or somebody else's
    │   ├── Gone                  the object existed and has ended
    │   ├── TooLarge              over a configured limit
    │   ├── OverQuota             the caller has as much as it may have, until it ends some of it
    │   └── Busy                  over a queue limit; carries when to try again
    ├── BackendError              the computation did not happen
    │   ├── UserError             this operation is wrong; its model survives
    │   ├── UnitError             this unit failed; it left no gradient behind
    │   ├── ModelLost             what is stored of a model cannot bring it back
    │   └── BackendDead           the backend's process is gone; carries the cause
    ├── StorageError              database or disk (full, read-only, damaged)
    │   └── DamagedFile           a checksum does not match
    └── ConfigError               the configuration cannot be used

``routers/errors.py`` maps classes to HTTP statuses, in one table.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCategory(StrEnum):
    """Who is at fault, in the SDK's words (``RequestErrorCategory``)."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"


class TinkercloudError(Exception):
    """Base of all errors below; ``str(error)`` is safe to show to a client."""

    category = ErrorCategory.SERVER


class RequestError(TinkercloudError):
    category = ErrorCategory.USER


class InvalidRequest(RequestError):
    pass


class Unsupported(RequestError):
    pass


class Unauthenticated(RequestError):
    pass


class NotFound(RequestError):
    pass


class Gone(RequestError):
    pass


class TooLarge(RequestError):
    pass


class OverQuota(RequestError):
    pass


class Busy(RequestError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendError(TinkercloudError):
    pass


class UserError(BackendError):
    """One operation of a unit is wrong (its loss is not finite, say); the unit changed nothing.

    ``op_index`` is the operation's place in ``TrainUnit.ops``, or None outside a unit.
    """

    category = ErrorCategory.USER

    def __init__(self, message: str, op_index: int | None = None) -> None:
        super().__init__(message, op_index)
        self.op_index = op_index

    def __str__(self) -> str:
        return str(self.args[0])


class UnitError(BackendError):
    pass


class ModelLost(BackendError):
    """Nothing that is stored can bring the model back."""


class DeathCause(StrEnum):
    """Why the process of a backend is gone, and so who is to blame."""

    CRASHED = "crashed"
    """It broke: a signal, an exit code, or the kernel when memory ran out."""
    STALLED = "stalled"
    """It did not get on with one piece of work, and its watchdog ended it."""
    KILLED = "killed"
    """Somebody outside killed it."""
    BYSTANDER = "bystander"
    """It ended while it was at work on something else: this call only waited."""
    LOST = "lost"
    """It died before this call, which never ran, and with it what the call needs."""
    CLOSED = "closed"
    """We ended it."""

    @property
    def blames_work(self) -> bool:
        """Whether what the process was doing may have ended it."""
        return self in (DeathCause.CRASHED, DeathCause.STALLED)


class BackendDead(BackendError):
    def __init__(self, message: str, cause: DeathCause = DeathCause.CRASHED) -> None:
        super().__init__(message)
        self.cause = cause


class StorageError(TinkercloudError):
    pass


class DamagedFile(StorageError):
    pass


class ConfigError(TinkercloudError):
    category = ErrorCategory.USER
