"""The KV cache of models that run as modules of transformers.

A cell of a block holds a token id. What the model itself remembers of a sequence lies beside, under
the sequence's last block; where it is gone or was never there, the ids are enough to compute it
again. So sharing and copying of blocks need to know nothing of the architecture.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import DynamicCache

from training.backends.base import Int32Array
from training.engine.adapter import Adapter
from training.engine.decoder import BLOCK_TOKENS, Chunk


class Memory(NamedTuple):
    """What a model with ``adapter`` remembers of ``tokens``. Whoever goes on from it changes it."""

    tokens: Int32Array
    adapter: Adapter | None
    past: DynamicCache


class ForeignCache:
    """``decoder.KvCache``. Memories together are never longer than the blocks."""

    def __init__(self, num_blocks: int) -> None:
        self._tokens = np.zeros((num_blocks, BLOCK_TOKENS), np.int32)
        self._memories: dict[int, Memory] = {}
        self._num_remembered = 0

    @property
    def num_blocks(self) -> int:
        return len(self._tokens)

    def copy_block(self, source: int, destination: int) -> None:
        self._tokens[destination] = self._tokens[source]

    def clear(self, block: int) -> None:
        self._tokens[block] = 0
        self._drop(block)

    def read(self, chunk: Chunk, stop: int) -> Int32Array:
        """Tokens of the chunk's sequence at positions [0, ``stop``)."""
        num_blocks = -(-stop // BLOCK_TOKENS)
        return self._tokens[chunk.blocks[:num_blocks]].reshape(-1)[:stop]

    def write(self, chunk: Chunk, tokens: Int32Array) -> None:
        positions = np.arange(chunk.start, chunk.start + chunk.num_rows)
        blocks = chunk.blocks[positions // BLOCK_TOKENS]
        self._tokens[blocks, positions % BLOCK_TOKENS] = tokens

    def recall(self, chunk: Chunk, adapter: Adapter | None) -> DynamicCache | None:
        """The memory of what lies before the chunk, if it is there; it is then gone from here."""
        if chunk.start == 0:
            return None
        memory = self._drop(_last_block(chunk, chunk.start))
        if memory is None or memory.adapter is not adapter:
            return None
        # The block may have come to another sequence since.
        same = np.array_equal(memory.tokens, self.read(chunk, chunk.start))
        return memory.past if same else None

    def remember(self, chunk: Chunk, adapter: Adapter | None, past: DynamicCache) -> None:
        """Of everything up to the chunk's end; the oldest memories make room."""
        stop = chunk.start + chunk.num_rows
        block = _last_block(chunk, stop)
        self._drop(block)
        self._memories[block] = Memory(self.read(chunk, stop), adapter, past)
        self._num_remembered += stop
        while self._num_remembered > self._tokens.size:
            self._drop(next(iter(self._memories)))

    def _drop(self, block: int) -> Memory | None:
        memory = self._memories.pop(block, None)
        if memory is not None:
            self._num_remembered -= len(memory.tokens)
        return memory


def _last_block(chunk: Chunk, stop: int) -> int:
    return int(chunk.blocks[(stop - 1) // BLOCK_TOKENS])
