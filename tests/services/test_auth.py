"""Keys: the alias, the refusals, owners that tell nothing."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from training.config import AuthConfig
from training.core.errors import Unauthenticated
from training.services.auth import ANONYMOUS, Authenticator

KEYS = AuthConfig(api_keys=(SecretStr("first"), SecretStr("tml-second")))


@pytest.mark.parametrize("name", ["first", "second"])
def test_each_secret_is_known_with_and_without_the_prefix(name: str) -> None:
    authenticator = Authenticator(KEYS)
    owner = authenticator.authenticate(name)
    assert authenticator.authenticate(f"tml-{name}") == owner
    assert authenticator.authenticate(None, f"Bearer tml-{name}") == owner
    assert name not in owner


def test_each_key_is_an_owner_of_its_own() -> None:
    authenticator = Authenticator(KEYS)
    assert authenticator.authenticate("first") != authenticator.authenticate("second")


@pytest.mark.parametrize("key", [None, "", "firs", "first ", "tml-", "FIRST", "é"])
def test_anything_else_is_refused(key: str | None) -> None:
    with pytest.raises(Unauthenticated):
        Authenticator(KEYS).authenticate(key)
    with pytest.raises(Unauthenticated):
        Authenticator(KEYS).authenticate(None, f"Basic {key}")


def test_auth_can_be_switched_off() -> None:
    assert Authenticator(AuthConfig(enabled=False)).authenticate(None) == ANONYMOUS
