"""Who uses which block of the KV cache. Knows neither tokens nor tensors.

A block may have several users: sequences that begin alike share it. A block without users is free;
if it is marked as cached its content may still serve somebody, so it is given out last, the one
that was used longest ago first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from training.engine.decoder import BLOCK_TOKENS


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens``."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockPool:
    """``capacity`` blocks, numbered from 0. ``on_evict`` is told each cached block that is given
    out for something else; it may call ``uncache`` for others, not for that one."""

    def __init__(self, capacity: int, on_evict: Callable[[int], None]) -> None:
        if capacity < 1:
            raise ValueError(f"a KV cache needs at least one block of {BLOCK_TOKENS} tokens")
        self.capacity = capacity
        self._on_evict = on_evict
        self._num_users = [0] * capacity
        self._empty = list(reversed(range(capacity)))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, without users; oldest first
        self._cached: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks without users, cached ones among them."""
        return len(self._empty) + len(self._idle)

    def can_allocate(self, count: int) -> bool:
        return count <= self.available

    def allocate(self) -> int:
        """A block with one user. Raises ``MemoryError`` where ``can_allocate(1)`` says no."""
        if self._empty:
            block = self._empty.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._cached.remove(block)
            self._on_evict(block)
        else:
            raise MemoryError("every block of the KV cache is in use")
        self._num_users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block that has users or is cached."""
        if self._num_users[block] == 0:
            del self._idle[block]  # KeyError: its content is gone
        self._num_users[block] += 1

    def free(self, block: int) -> None:
        """One user less."""
        if self._num_users[block] == 0:
            raise RuntimeError(f"block {block} has no user")
        self._num_users[block] -= 1
        if self._num_users[block] > 0:
            return
        if block in self._cached:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def is_private(self, block: int) -> bool:
        """It has one user, and nobody will find its content later."""
        return self._num_users[block] == 1 and block not in self._cached

    def cache(self, block: int) -> None:
        """The content of a block in use is worth keeping after its users have gone."""
        if self._num_users[block] == 0:
            raise RuntimeError(f"block {block} has no user")
        self._cached.add(block)

    def uncache(self, block: int) -> None:
        self._cached.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._empty.append(block)

    def check_integrity(self, users: Mapping[int, int], cached: Iterable[int]) -> None:
        """Raises ``RuntimeError`` unless ``users`` (block -> number) and ``cached`` are what the
        pool believes, and every other block is free."""
        believed = {block: num for block, num in enumerate(self._num_users) if num}
        if believed != dict(users):
            wrong = sorted({*believed.items()} ^ {*users.items()})
            raise RuntimeError(f"(block, users) counted wrongly: {wrong}")
        if self._cached != set(cached):
            raise RuntimeError(f"blocks cached wrongly: {sorted(self._cached ^ set(cached))}")
        free = [*self._empty, *self._idle]
        if len(set(free)) != len(free) or set(free) | set(believed) != set(range(self.capacity)):
            raise RuntimeError("blocks of the KV cache are lost or free twice")
        if len(free) + len(believed) != self.capacity:
            raise RuntimeError("a block in use is free")
        if set(self._idle) != self._cached - set(believed):
            raise RuntimeError("a free block is cached and empty at once")
