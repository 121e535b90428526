"""The KV cache's allocator under random use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.engine.kv_cache import MIN_EXTENT_TOKENS, Extent, ExtentPool, extent_size

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "free", "shrink", "grow"]), st.integers(1, 400), st.integers(0)
    ),
    max_size=60,
)


@given(capacity=st.integers(MIN_EXTENT_TOKENS, 1500), actions=ACTIONS)
def test_integrity_under_random_use(capacity: int, actions: list[tuple[str, int, int]]) -> None:
    pool = ExtentPool(capacity)
    owned: list[Extent] = []
    for action, num_tokens, choice in actions:
        place = choice % len(owned) if owned else None
        if action == "allocate":
            _allocate(pool, owned, num_tokens)
        elif place is None:
            continue
        elif action == "free":
            pool.free(owned.pop(place))
        elif action == "shrink":
            smaller = pool.shrink(owned[place], num_tokens)
            assert smaller.start == owned[place].start
            assert smaller.size == min(owned[place].size, extent_size(num_tokens))
            owned[place] = smaller
        elif (grown := pool.grow(owned[place])) is not None:
            assert grown == (owned[place].start, owned[place].size * 2)
            owned[place] = grown
        pool.check_integrity(set(owned))
        assert pool.available == pool.num_tokens - sum(extent.size for extent in owned)
    for extent in owned:
        pool.free(extent)
    pool.check_integrity(set())
    assert pool.can_allocate(pool.largest_extent)


def _allocate(pool: ExtentPool, owned: list[Extent], num_tokens: int) -> None:
    if not pool.can_allocate(num_tokens):
        with pytest.raises(MemoryError):
            pool.allocate(num_tokens)
        return
    extent = pool.allocate(num_tokens)
    assert num_tokens <= extent.size < 2 * max(num_tokens, MIN_EXTENT_TOKENS)
    assert extent.start % extent.size == 0
    owned.append(extent)


def test_the_whole_pool_is_one_extent() -> None:
    pool = ExtentPool(1024)
    whole = pool.allocate(1024)
    assert not pool.can_allocate(1)
    pool.free(whole)
    assert pool.available == 1024


def test_equal_extents_lie_side_by_side() -> None:
    pool = ExtentPool(1024)
    assert [pool.allocate(100).start for _ in range(4)] == [0, 128, 256, 384]


def test_an_extent_grows_into_its_free_upper_buddy_only() -> None:
    pool = ExtentPool(64)
    lower, upper = pool.allocate(16), pool.allocate(16)
    assert pool.grow(lower) is None
    pool.free(upper)
    assert pool.grow(lower) == (0, 32)


def test_misuse_is_seen() -> None:
    pool = ExtentPool(64)
    extent = pool.allocate(16)
    pool.free(extent)
    with pytest.raises(RuntimeError, match="not owned"):
        pool.free(extent)
    with pytest.raises(RuntimeError, match="owned wrongly"):
        pool.check_integrity({extent})
    with pytest.raises(ValueError, match="at least"):
        ExtentPool(MIN_EXTENT_TOKENS - 1)
