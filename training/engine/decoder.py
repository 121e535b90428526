"""What the trainer and the sampler ask of a frozen model. Three things answer to it:

- ``native.NativeDecoder``: our own kernels, bfloat16 on processors with AVX-512; the fast one.
- ``model.Transformer``: torch operations; float32, CUDA and every other processor.
- ``foreign.ForeignDecoder``: the modules of transformers, for architectures we have no code for.

All arrays of ids are numpy int32. Shape legend: T packed rows, H hidden, R rows of a part, V vocab,
K targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from training.backends.base import Float32Array, Int32Array
from training.engine.adapter import Adapter, AdapterLayout, Segment
from training.engine.optimizer import AdamArithmetic
from training.engine.projections import ModelShape
from training.engine.sampling import Vocabulary

BLOCK_TOKENS = 32
"""Tokens of one block of the KV cache: what is allocated, shared and copied."""


class Chunk(NamedTuple):
    """Rows of one sequence at positions [``start``, ``start + num_rows``).

    ``blocks`` are the numbers of its cache blocks, in order, enough for all of these positions;
    before ``start`` they hold keys and values already.
    """

    blocks: Int32Array
    start: int
    num_rows: int


class KvCache(Protocol):
    """Keys and values of ``num_blocks`` blocks in every layer; zero at first."""

    @property
    def num_blocks(self) -> int: ...

    def copy_block(self, source: int, destination: int) -> None: ...

    def clear(self, block: int) -> None:
        """Zeros a block that may hold NaN, before somebody else owns it."""


class TrainingPass(Protocol):
    """One forward pass over packed sequences, and what its backward pass needs."""

    @property
    def hidden_TH(self) -> torch.Tensor:
        """Final-normed hidden states in the compute dtype; no autograd history."""

    def backward(self, dhidden_TH: torch.Tensor) -> None:
        """Adds the adapter gradients of every segment to its sink. At most once."""


class HeadPass(Protocol):
    """Rows taken through the head."""

    @property
    def logprobs_RK(self) -> Float32Array: ...

    def backward(self, dlogprobs_RK: Float32Array, dhidden_RH: torch.Tensor) -> None:
        """Given d loss / d logprobs, writes d loss / d hidden (rows without a derivative are left
        as they are) and adds the unembed adapter's gradient to the segment's sink."""


class Decoder(Protocol):
    @property
    def config(self) -> ModelShape: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's bits depend on its own sequence and adapter alone: never on which other
        rows, or how many, are computed with it."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Draws tokens from this decoder's logits."""

    @property
    def adam(self) -> AdamArithmetic:
        """Steps the adapters' fp32 weights."""

    def activation_bytes(self, num_tokens: int) -> int:
        """About what a training pass over so many rows keeps until its backward pass, where it is
        not ``checkpointing``."""

    def release_memory(self) -> None:
        """Gives back what finished passes have left for the next ones. Not within a pass."""

    def new_adapter(self, layout: AdapterLayout, weights: torch.Tensor, trainable: bool) -> Adapter:
        """``weights``: fp32 [num_params]. ``Adapter.update`` brings later ones in."""

    def training_pass(
        self,
        sequences: Sequence[Int32Array],
        segments: Sequence[Segment],
        with_gradient: bool,
        checkpointing: bool,
    ) -> TrainingPass:
        """Each sequence attends to itself alone. ``segments`` cover the packed rows in order.

        ``checkpointing`` keeps each layer's input only and computes the layer again in the
        backward pass: less memory, same bits.
        """

    def head_pass(
        self, hidden_RH: torch.Tensor, targets_RK: Int32Array, segment: Segment, keep: bool
    ) -> HeadPass:
        """``segment`` covers rows [0, R). ``keep``: hold what the backward needs, where it fits,
        instead of computing it again there."""

    def new_cache(self, num_blocks: int) -> KvCache: ...

    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        """Hidden states [T, H] of the chunks' rows, packed in their order; stores their keys and
        values. Segments cover the rows in order, their sinks are None."""

    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """fp32 logits [R, V]: head plus each segment's unembed adapter.

        Good until the next call."""
