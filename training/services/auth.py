"""Who is calling."""

from __future__ import annotations

import hashlib
import hmac

from training.config import KEY_PREFIX, AuthConfig
from training.core.errors import Unauthenticated

ANONYMOUS = "anonymous"


class Authenticator:
    """Compares keys by digest, all of them and in constant time; keeps no key in clear.

    The SDK refuses keys without the prefix ``tml-``, so each secret is known with and without it.
    An owner id is derived from the key's digest and tells nothing about the key.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._enabled = config.enabled
        self._digests = [_digest(key.get_secret_value()) for key in config.api_keys]

    @property
    def enabled(self) -> bool:
        return self._enabled

    def authenticate(self, api_key: str | None, authorization: str | None = None) -> str:
        """The key of either header as an owner id. Raises ``Unauthenticated``."""
        if not self._enabled:
            return ANONYMOUS
        key = api_key or _bearer(authorization)
        if not key:
            raise Unauthenticated("no API key: send it in the header X-API-Key")
        digest = _digest(key)
        matches = [known for known in self._digests if hmac.compare_digest(known, digest)]
        if not matches:
            raise Unauthenticated("the API key is not known to this server")
        return f"key-{matches[0].hex()[:16]}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.removeprefix(KEY_PREFIX).encode()).digest()


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
