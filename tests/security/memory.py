"""How much memory a server process holds."""

from __future__ import annotations

import psutil

from tests.servers import Server

MIB = 2**20


def resident_bytes(server: Server) -> int:
    """Of the API process alone."""
    return int(psutil.Process(server.process.pid).memory_info().rss)
