"""Links that are their own permission: who has one may read one file until it expires.

Nothing is remembered about a link. Its signature covers everything that it says and the directory
that the checkpoint had when it was made: a directory's name is never used twice, so a link to a
checkpoint that was deleted or replaced since is worthless.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import astuple, dataclass

SIGNING_KEY_BYTES = 32


@dataclass(frozen=True)
class Link:
    """``path`` is the checkpoint's ``tinker://`` path, ``file`` a name in its ``directory``;
    ``expires_s`` counts from 1970."""

    method: str
    owner: str
    path: str
    directory: str
    file: str
    expires_s: int


class Signer:
    def __init__(self, key: bytes) -> None:
        if len(key) != SIGNING_KEY_BYTES:
            raise ValueError(f"a signing key has {SIGNING_KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    def sign(self, link: Link) -> str:
        """64 hexadecimal digits: HMAC-SHA256."""
        # As JSON, no two links have the same text.
        text = json.dumps(["tinkercloud link v1", *astuple(link)])
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def is_genuine(self, link: Link, signature: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.sign(link).encode(), signature.encode())
