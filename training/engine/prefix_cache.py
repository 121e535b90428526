"""Which blocks hold the keys and values of which beginnings: a tree of blocks for each version of
the weights.

A node is a block and the tokens in it; its place in the tree says which tokens come before. Blocks
belong to the pool, which may take them back whenever nobody uses them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from training.backends.base import Int32Array
from training.engine.decoder import BLOCK_TOKENS
from training.engine.kv_cache import BlockPool

TOKEN_BYTES = 4
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


class Match(NamedTuple):
    """``blocks`` hold the first tokens whole; ``partial``, if there is one, holds ``num_partial``
    more at its beginning and must be copied: somebody may go on writing behind them."""

    blocks: list[int]
    partial: int | None
    num_partial: int

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS + self.num_partial


@dataclass(eq=False, slots=True)
class _Node:
    """``tokens``: big-endian int32, so that sorting the bytes sorts the tokens. No child's tokens
    are the beginning of another's; a node of less than a block has no children."""

    tokens: bytes
    block: int
    parent: _Node | None
    children: dict[bytes, _Node] = field(default_factory=dict)
    ordered: list[bytes] = field(default_factory=list)


class PrefixCache:
    """``num_blocks`` blocks in a pool of its own making."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, self._forget)
        self._roots: dict[int, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # by block

    def find(self, version: int, tokens: Int32Array) -> Match:
        """The longest beginning of ``tokens`` that is there; takes no block into use."""
        blocks: list[int] = []
        node = self._roots.get(version)
        text = _as_bytes(tokens)
        start = 0
        while node is not None:
            child = node.children.get(text[start : start + BLOCK_BYTES])
            if child is None or len(child.tokens) < BLOCK_BYTES:
                break
            blocks.append(child.block)
            node, start = child, start + BLOCK_BYTES
        if node is None or start == len(text):
            return Match(blocks, None, 0)
        nearest, num_tokens = _nearest(node, text[start : start + BLOCK_BYTES])
        return Match(blocks, nearest.block if nearest and num_tokens else None, num_tokens)

    def put(self, version: int, tokens: Int32Array, blocks: Sequence[int]) -> None:
        """``blocks``, all in use, hold ``tokens``. Where others hold the same, those stay."""
        node = self._roots.setdefault(version, _Node(b"", -1, None))
        text = _as_bytes(tokens)
        for start, block in zip(range(0, len(text), BLOCK_BYTES), blocks, strict=False):
            part = text[start : start + BLOCK_BYTES]
            child = node.children.get(part)
            if child is None:
                child = self._add(node, part, block)
            if child is None:
                return
            node = child

    def drop(self, version: int) -> None:
        """Forgets what was computed with these weights."""
        root = self._roots.pop(version, None)
        if root is not None:
            self._forget_below(root)

    def clear(self) -> None:
        for version in list(self._roots):
            self.drop(version)

    @property
    def blocks(self) -> set[int]:
        return set(self._nodes)

    def _add(self, parent: _Node, part: bytes, block: int) -> _Node | None:
        """None where a sibling holds ``part`` and more already."""
        place = bisect_left(parent.ordered, part)
        if place < len(parent.ordered) and parent.ordered[place].startswith(part):
            return None
        if place > 0 and part.startswith(parent.ordered[place - 1]):
            shorter = parent.children[parent.ordered[place - 1]]
            self._remove(shorter)
            self.pool.uncache(shorter.block)
        if block in self._nodes:  # it was found under another beginning: cannot be
            raise RuntimeError(f"block {block} is cached twice")
        node = _Node(part, block, parent)
        parent.children[part] = node
        insort(parent.ordered, part)
        self._nodes[block] = node
        self.pool.cache(block)
        return node

    def _forget(self, block: int) -> None:
        """The pool has taken the block; what lies below it in the tree cannot be reached."""
        node = self._nodes[block]
        self._remove(node)
        self._forget_below(node)

    def _forget_below(self, node: _Node) -> None:
        below = list(node.children.values())
        while below:
            child = below.pop()
            below += child.children.values()
            del self._nodes[child.block]
            self.pool.uncache(child.block)

    def _remove(self, node: _Node) -> None:
        del self._nodes[node.block]
        parent = node.parent
        if parent is None:
            return
        del parent.children[node.tokens]
        del parent.ordered[bisect_left(parent.ordered, node.tokens)]


def common_prefix(a: Int32Array, b: Int32Array) -> int:
    num = min(len(a), len(b))
    differ = np.flatnonzero(a[:num] != b[:num])
    return int(differ[0]) if len(differ) else num


def _as_bytes(tokens: Int32Array) -> bytes:
    return tokens.astype(">i4").tobytes()


def _nearest(node: _Node, part: bytes) -> tuple[_Node | None, int]:
    """The child that has the most tokens in common with ``part``, and how many. Of sorted texts
    it is one of the two that ``part`` would lie between."""
    place = bisect_left(node.ordered, part)
    best: _Node | None = None
    most = 0
    for text in node.ordered[max(place - 1, 0) : place + 1]:
        num = _common_tokens(text, part)
        if num > most:
            best, most = node.children[text], num
    return best, most


def _common_tokens(a: bytes, b: bytes) -> int:
    return common_prefix(np.frombuffer(a, ">i4"), np.frombuffer(b, ">i4"))
