"""Which database the servers of these tests use."""

from __future__ import annotations

import pytest


@pytest.fixture
def each_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that use this one run on both; ``test_server.config`` looks there."""
    monkeypatch.setenv("DATABASE_URL", database_url)
