"""Stop strings: found at the token that completes them, never earlier or later."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.engine.sampler_cases import byte_tokenizer
from training.backends.base import REPLACEMENT
from training.engine.stop import StopStrings

BYTES = byte_tokenizer()
TEXT = "the cat – naïve façade 日本語 🙂🙃 sat\n\nUser: on the mat "


def merged_tokenizer() -> Tokenizer:
    """Byte-level BPE with merges, so that tokens hold pieces of characters and several letters."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return tokenizer


MERGED = merged_tokenizer()


def metaspace_tokenizer() -> Tokenizer:
    """SentencePiece style: the first token of a text loses its space."""
    pieces = ["▁the", "▁cat", "s", "▁", "at", "."]
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def found_at(tokenizer: Tokenizer, tokens: list[int], *stops: str) -> int | None:
    watcher = StopStrings(tokenizer, stops)
    return next((place for place, token in enumerate(tokens) if watcher.push(token)), None)


def slow_found_at(tokenizer: Tokenizer, tokens: list[int], *stops: str) -> int | None:
    """Decodes everything after every token."""
    for place in range(len(tokens)):
        text = tokenizer.decode(tokens[: place + 1], skip_special_tokens=False)
        if any(stop in text for stop in stops):
            return place
    return None


@given(
    tokens=st.lists(st.integers(0, MERGED.get_vocab_size() - 1), max_size=40),
    stops=st.lists(
        st.sampled_from(["t", "ca", "\n\nUser:", " naïve", "語", "🙂", "é"]), min_size=1
    ),
)
def test_equals_decoding_everything(tokens: list[int], stops: list[str]) -> None:
    assert found_at(MERGED, tokens, *stops) == slow_found_at(MERGED, tokens, *stops)


@given(start=st.integers(0, len(TEXT) - 1), length=st.integers(1, 12), data=st.data())
def test_any_piece_of_the_text(start: int, length: int, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([BYTES, MERGED]))
    tokens = tokenizer.encode(TEXT).ids
    stop = TEXT[start : start + length]
    place = found_at(tokenizer, tokens, stop)
    assert place is not None
    assert place == slow_found_at(tokenizer, tokens, stop)


ANY_STOP = st.text(min_size=1, max_size=3).filter(lambda stop: not stop.endswith(REPLACEMENT))
ODD_TEXT = st.text(REPLACEMENT + "🙂é日a", max_size=12)
"""Genuine replacement characters among characters of which some bytes look the same as one."""


@given(text=st.text(max_size=30) | ODD_TEXT, stop=ANY_STOP)
def test_bytes_of_any_text(text: str, stop: str) -> None:
    tokens = BYTES.encode(text + stop).ids
    assert found_at(BYTES, tokens, stop) == slow_found_at(BYTES, tokens, stop)


@example(text=2 * REPLACEMENT, stop="", last="🙂")
@given(text=ODD_TEXT, stop=st.text(REPLACEMENT, max_size=4), last=st.sampled_from("🙂é日a"))
def test_text_that_holds_replacement_characters(text: str, stop: str, last: str) -> None:
    for tokenizer in (BYTES, MERGED):
        tokens = tokenizer.encode(text + stop + last).ids
        assert found_at(tokenizer, tokens, stop + last) == slow_found_at(
            tokenizer, tokens, stop + last
        )


@pytest.mark.parametrize("stop", ["cat", "\n\nUser:", "日本語", "🙂", "🙂🙃", " "])
def test_the_token_that_completes_it(stop: str) -> None:
    end = TEXT.index(stop) + len(stop)
    num_bytes = len(TEXT[:end].encode())
    assert found_at(BYTES, BYTES.encode(TEXT).ids, stop) == num_bytes - 1


def test_a_letter_before_half_a_character_counts() -> None:
    (char,) = [index for index in range(256) if BYTES.decode([index]) == "a"]
    assert found_at(BYTES, [char, BYTES.encode("語").ids[0]], "a") == 0


def test_broken_bytes_do_not_hide_what_follows() -> None:
    broken = [BYTES.encode("語").ids[0]] * 30
    tokens = broken + BYTES.encode("stop").ids
    assert found_at(BYTES, tokens, "stop") == len(tokens) - 1


def test_a_special_token_counts_with_its_text() -> None:
    tokens = [*BYTES.encode("ab").ids, 260, *BYTES.encode("c").ids]
    assert found_at(BYTES, tokens, "<|260|>") == 2
    assert found_at(BYTES, tokens, "b<|260|>c") == 3


def test_spaces_of_a_decoder_that_strips_the_first() -> None:
    assert found_at(metaspace_tokenizer(), [0, 1, 2, 0, 4], "cats the") == 3
    assert found_at(metaspace_tokenizer(), [1, 1, 1, 1], "catcat") is None


def test_no_stop_string() -> None:
    assert found_at(BYTES, BYTES.encode(TEXT).ids, "dog") is None
