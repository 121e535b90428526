"""The prefix cache against a plain list of what was put into it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.backends.base import Int32Array
from training.engine.decoder import BLOCK_TOKENS
from training.engine.kv_cache import num_blocks
from training.engine.prefix_cache import PrefixCache, common_prefix

ALPHABET = 2
ENTRIES = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 100), st.integers(0, 5)),
    min_size=1,
    max_size=12,
)


def text(stem: int, length: int, tail: int) -> Int32Array:
    """Texts of one stem agree up to a place that depends on their tails."""
    tokens = np.random.default_rng(stem).integers(0, ALPHABET, length, dtype=np.int32)
    place = tail * 17
    if tail and place < length:
        tokens[place:] = np.random.default_rng(tail).integers(0, ALPHABET, length - place)
    return tokens


def put(cache: PrefixCache, version: int, tokens: Int32Array) -> list[int]:
    """As the sampler does: what is there already is shared, the rest is computed."""
    match = cache.find(version, tokens)
    for block in match.blocks:
        cache.pool.share(block)
    blocks = list(match.blocks)
    while len(blocks) < num_blocks(len(tokens)):
        blocks.append(cache.pool.allocate())
    cache.put(version, tokens, blocks)
    for block in reversed(blocks):
        cache.pool.free(block)
    return blocks


@given(entries=ENTRIES, asked=st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 100)))
def test_finds_the_longest_common_beginning(
    entries: list[tuple[int, int, int, int]], asked: tuple[int, int, int]
) -> None:
    cache = PrefixCache(64)
    content: dict[int, Int32Array] = {}
    known: dict[int, list[Int32Array]] = {0: [], 1: []}
    for version, stem, length, tail in entries:
        tokens = text(stem, length, tail)
        for start, block in enumerate(put(cache, version, tokens)):
            written = tokens[start * BLOCK_TOKENS : (start + 1) * BLOCK_TOKENS]
            if len(written) >= len(content.get(block, ())):
                content[block] = written
        known[version].append(tokens)
        cache.pool.check_integrity({}, cache.blocks)
    version, stem, length = asked
    tokens = text(stem, length, 0)
    match = cache.find(version, tokens)
    longest = max((common_prefix(each, tokens) for each in known[version]), default=0)
    assert match.num_tokens == longest
    blocks = match.blocks + ([] if match.partial is None else [match.partial])
    for place, block in enumerate(blocks):
        num = BLOCK_TOKENS if place < len(match.blocks) else match.num_partial
        start = place * BLOCK_TOKENS
        np.testing.assert_array_equal(content[block][:num], tokens[start : start + num])


def test_a_longer_text_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(4)
    whole = text(0, 40, 0)
    put(cache, 0, whole[:10])
    put(cache, 0, whole)
    assert len(cache.blocks) == 2
    put(cache, 0, whole[:5])
    assert len(cache.blocks) == 2
    assert cache.find(0, whole).num_tokens == 40


def test_the_pool_takes_the_end_of_a_text_first() -> None:
    cache = PrefixCache(3)
    whole = text(0, 96, 0)
    put(cache, 0, whole)
    for num_left in (64, 32, 0):
        cache.pool.allocate()
        assert cache.find(0, whole).num_tokens == num_left


def test_what_lies_behind_a_lost_block_is_lost_too() -> None:
    cache = PrefixCache(4)
    whole = text(0, 96, 0)
    blocks = put(cache, 0, whole)
    for block in blocks[1:]:  # the first one is now the one unused for longest
        cache.pool.share(block)
    for block in blocks[1:]:
        cache.pool.free(block)
    cache.pool.allocate()
    assert cache.pool.allocate() == blocks[0]
    assert cache.find(0, whole).num_tokens == 0
    assert cache.blocks == set()
    assert cache.pool.available == 2


def test_versions_are_apart_and_dropped_alone() -> None:
    cache = PrefixCache(8)
    for version in (0, 1):
        put(cache, version, text(version, 50, 0))
    assert cache.find(0, text(1, 50, 0)).num_tokens < 50
    cache.drop(0)
    assert cache.find(0, text(0, 50, 0)).num_tokens == 0
    assert cache.find(1, text(1, 50, 0)).num_tokens == 50
    cache.clear()
    assert cache.blocks == set()
    cache.pool.check_integrity({}, [])


def test_a_block_has_one_place() -> None:
    cache = PrefixCache(2)
    block = cache.pool.allocate()
    cache.put(0, text(0, 32, 0), [block])
    with pytest.raises(RuntimeError, match="cached twice"):
        cache.put(1, text(0, 32, 0), [block])
