"""Gives sequences their cache blocks and takes them back, so that what was computed once is found
again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from training.engine.decoder import BLOCK_TOKENS, KvCache
from training.engine.kv_cache import num_blocks
from training.engine.prefix_cache import Match, PrefixCache
from training.engine.sampler_state import Sequence


class SequenceBlocks:
    """A running sequence has blocks for all tokens it wants computed, and gets one more each time
    it has filled the last. Only its own blocks are written to: of a shared one it takes a copy."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._prefixes = PrefixCache(cache.num_blocks)
        self._pool = self._prefixes.pool

    @property
    def num_tokens(self) -> int:
        return self._pool.capacity * BLOCK_TOKENS

    @property
    def available(self) -> int:
        """Free blocks, those with cached beginnings among them."""
        return self._pool.available

    def find(self, sequence: Sequence) -> Match:
        """What is cached of the sequence's tokens."""
        return self._prefixes.find(sequence.version, sequence.context[: sequence.num_reusable])

    def start(self, sequence: Sequence, match: Match, num_reserved: int) -> bool:
        """Gives it what ``match`` found and blocks for the rest; False, and nothing done, where
        that would leave fewer than ``num_reserved``."""
        pool = self._pool
        # Taken into use first: making room must not cost what was found.
        taken = [*match.blocks, *([] if match.partial is None else [match.partial])]
        for block in taken:
            pool.share(block)
        num_new = num_blocks(sequence.num_wanted) - len(match.blocks)
        if not pool.can_allocate(num_new + num_reserved):
            for block in reversed(taken):
                pool.free(block)
            if match.partial is None:
                return False
            # The block that would be copied may be the very one that is missing.
            return self.start(sequence, Match(match.blocks, None, 0), num_reserved)
        sequence.blocks = match.blocks + [pool.allocate() for _ in range(num_new)]
        sequence.table = np.array(sequence.blocks, np.int32)
        sequence.num_computed = match.num_tokens
        if match.partial is not None:
            self._cache.copy_block(match.partial, sequence.blocks[len(match.blocks)])
            pool.free(match.partial)
        return True

    def needs_block(self, sequence: Sequence) -> bool:
        return sequence.num_wanted > len(sequence.blocks) * BLOCK_TOKENS

    def grow(self, sequence: Sequence) -> bool:
        """One more block; False where there is none."""
        if not self._pool.can_allocate(1):
            return False
        sequence.blocks.append(self._pool.allocate())
        sequence.table = np.array(sequence.blocks, np.int32)
        return True

    def keep(self, sequence: Sequence) -> None:
        """What it has computed can be found from now on."""
        tokens = sequence.tokens[: sequence.num_computed]
        self._prefixes.put(sequence.version, tokens, sequence.blocks)

    def release(self, sequence: Sequence) -> None:
        """Its end comes first to be reused: what it began with serves more."""
        for block in reversed(sequence.blocks):
            self._pool.free(block)
        sequence.blocks = []
        sequence.num_computed = 0

    def wipe(self, sequence: Sequence) -> None:
        """Before ``release``: the blocks may hold NaN, which the next owner must not find."""
        self._prefixes.drop(sequence.version)
        for block in sequence.blocks:
            if self._pool.is_private(block):
                self._cache.clear(block)

    def forget(self, version: int) -> None:
        self._prefixes.drop(version)

    def forget_all(self) -> None:
        self._prefixes.clear()

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raises ``RuntimeError`` if blocks are lost or counted wrongly."""
        users = Counter(block for each in running for block in each.blocks)
        self._pool.check_integrity(users, self._prefixes.blocks)
