"""Links: only what was signed is genuine."""

from __future__ import annotations

import hmac
import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.core.signing import SIGNING_KEY_BYTES, Link, Signer

KEY = bytes(range(SIGNING_KEY_BYTES))
SIGNER = Signer(KEY)
LINK = Link("GET", "key-1", "tinker://s:train:0/weights/a", "f00d", "adapter.safetensors", 99)

TEXTS = st.text(max_size=12)
LINKS = st.builds(Link, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, st.integers(0, 2**40))


def test_a_link_is_genuine_as_it_was_signed() -> None:
    signature = SIGNER.sign(LINK)
    assert len(signature) == 64
    assert SIGNER.is_genuine(LINK, signature)
    assert Signer(KEY).is_genuine(LINK, signature)


@pytest.mark.parametrize("field", [field.name for field in fields(Link)])
def test_every_field_is_signed(field: str) -> None:
    value = getattr(LINK, field)
    other: Any = value + 1 if isinstance(value, int) else value + "x"
    changed = replace(LINK, **{field: other})
    assert not SIGNER.is_genuine(changed, SIGNER.sign(LINK))


@given(LINKS, LINKS)
def test_different_links_have_different_signatures(one: Link, other: Link) -> None:
    assert (SIGNER.sign(one) == SIGNER.sign(other)) == (one == other)


@given(st.text(max_size=70))
def test_no_other_text_is_a_signature(text: str) -> None:
    assert SIGNER.is_genuine(LINK, text) == (text == SIGNER.sign(LINK))


def test_another_key_signs_differently() -> None:
    assert not Signer(bytes(SIGNING_KEY_BYTES)).is_genuine(LINK, SIGNER.sign(LINK))
    with pytest.raises(ValueError, match="32 bytes"):
        Signer(KEY[:-1])


def test_signatures_are_compared_in_constant_time() -> None:
    source = inspect.getsource(Signer.is_genuine)
    assert f"{hmac.__name__}.compare_digest" in source
    assert "==" not in source
