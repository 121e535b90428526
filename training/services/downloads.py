"""Files of checkpoints, handed out to whoever has a link to them (see ``core.signing``)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from training.core.errors import Gone, NotFound
from training.core.ids import TinkerPath
from training.core.records import Checkpoint, utcnow
from training.core.signing import SIGNING_KEY_BYTES, Link, Signer
from training.core.threads import in_thread
from training.services.server import Server
from training.storage.database import Database
from training.storage.files import MANIFEST, CheckpointFiles
from training.storage.key_file import load_or_create_key
from training.storage.repositories import checkpoints

SIGNING_KEY_FILE = "signing.key"
"""In ``storage.metadata_dir``. Without it all links given out so far are worthless."""


class Links(NamedTuple):
    """File name -> path and query, relative to the route that lists them."""

    urls: Mapping[str, str]
    expires: datetime


async def open_downloads(server: Server) -> Downloads:
    """Raises ``StorageError``."""
    config = server.config
    path = config.storage.metadata_dir / SIGNING_KEY_FILE
    key = await in_thread(load_or_create_key, path, SIGNING_KEY_BYTES)
    return Downloads(server.database, server.files, Signer(key), config.server.download_url_s)


class Downloads:
    def __init__(
        self, database: Database, files: CheckpointFiles, signer: Signer, life_s: float
    ) -> None:
        self._database = database
        self._files = files
        self._signer = signer
        self._life_s = life_s

    async def links(self, checkpoint: Checkpoint) -> Links:
        """To every file, each compared with its checksum now. Raises ``DamagedFile``."""
        directory = await in_thread(self._files.verify, checkpoint.directory)
        names = await in_thread(_file_names, directory)
        expires_s = int(time.time() + self._life_s)
        if checkpoint.expires_at is not None:
            expires_s = min(expires_s, int(checkpoint.expires_at.timestamp()))
        urls = {
            name: f"{quote(name)}?"
            + urlencode(
                {
                    "expires": expires_s,
                    "signature": self._signer.sign(_link(checkpoint, name, expires_s)),
                }
            )
            for name in names
        }
        return Links(urls, datetime.fromtimestamp(expires_s, UTC))

    async def file(self, path: TinkerPath, name: str, expires_s: int, signature: str) -> Path:
        """Raises ``NotFound`` for everything but a genuine link, ``Gone`` for one that has expired.

        The name needs no other check: only names that ``links`` listed were ever signed.
        """
        checkpoint = await self._database.read(checkpoints.get, path)
        if checkpoint is None or not self._signer.is_genuine(
            _link(checkpoint, name, expires_s), signature
        ):
            raise NotFound("this link is not valid, or what it led to was deleted or replaced")
        is_over = checkpoint.expires_at is not None and checkpoint.expires_at <= utcnow()
        if is_over or expires_s <= time.time():
            raise Gone("this link has expired; ask for a new one")
        file = await in_thread(self._files.fetch, checkpoint.directory) / name
        if not await in_thread(file.is_file):
            raise NotFound("the checkpoint's files are gone from the server's disk")
        return file


def _link(checkpoint: Checkpoint, name: str, expires_s: int) -> Link:
    return Link(
        method="GET",
        owner=checkpoint.owner,
        path=str(checkpoint.path),
        directory=checkpoint.directory,
        file=name,
        expires_s=expires_s,
    )


def _file_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
