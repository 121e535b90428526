"""The KV cache's block pool under random use."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.engine.kv_cache import BlockPool, num_blocks

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "share", "free", "cache", "uncache"]), st.integers(0)),
    max_size=80,
)


def make_pool(capacity: int) -> tuple[BlockPool, list[int]]:
    """And the blocks that it took back from the cache."""
    evicted: list[int] = []
    return BlockPool(capacity, evicted.append), evicted


@given(capacity=st.integers(1, 12), actions=ACTIONS)
def test_integrity_under_random_use(capacity: int, actions: list[tuple[str, int]]) -> None:
    pool, evicted = make_pool(capacity)
    users: Counter[int] = Counter()
    cached: set[int] = set()
    for action, choice in actions:
        used = sorted(users)
        if action == "allocate":
            if not pool.can_allocate(1):
                with pytest.raises(MemoryError):
                    pool.allocate()
                continue
            block = pool.allocate()
            assert users[block] == 0
            users[block] += 1
            cached -= set(evicted)
            assert block not in cached
        elif action == "share" and (both := sorted({*used, *cached})):
            block = both[choice % len(both)]
            pool.share(block)
            users[block] += 1
        elif action == "free" and used:
            block = used[choice % len(used)]
            pool.free(block)
            users[block] -= 1
        elif action == "cache" and used:
            block = used[choice % len(used)]
            pool.cache(block)
            cached.add(block)
        elif action == "uncache" and cached:
            block = sorted(cached)[choice % len(cached)]
            pool.uncache(block)
            cached.remove(block)
        users = +users
        pool.check_integrity(users, cached)
        assert pool.available == capacity - len(users)
        assert all(pool.is_private(b) == (n == 1 and b not in cached) for b, n in users.items())


def test_cached_blocks_are_given_out_last_and_the_longest_unused_first() -> None:
    pool, evicted = make_pool(4)
    blocks = [pool.allocate() for _ in range(4)]
    for block in blocks[1:]:
        pool.cache(block)
    for block in reversed(blocks):
        pool.free(block)
    pool.share(blocks[3])
    pool.free(blocks[3])
    assert pool.allocate() == blocks[0]
    assert evicted == []
    assert [pool.allocate() for _ in range(3)] == [blocks[2], blocks[1], blocks[3]]
    assert evicted == [blocks[2], blocks[1], blocks[3]]


def test_misuse_is_seen() -> None:
    pool, _ = make_pool(2)
    block = pool.allocate()
    with pytest.raises(RuntimeError, match="counted wrongly"):
        pool.check_integrity({}, [])
    with pytest.raises(RuntimeError, match="cached wrongly"):
        pool.check_integrity({block: 1}, [block])
    pool.free(block)
    with pytest.raises(RuntimeError, match="no user"):
        pool.free(block)
    with pytest.raises(RuntimeError, match="no user"):
        pool.cache(block)
    with pytest.raises(KeyError):
        pool.share(block)
    with pytest.raises(ValueError, match="at least"):
        make_pool(0)


def test_blocks_of_tokens() -> None:
    assert [num_blocks(tokens) for tokens in (0, 1, 32, 33, 64)] == [0, 1, 1, 2, 2]
