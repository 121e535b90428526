"""``decoder.Decoder`` by our own kernels: bfloat16 on processors with AVX-512 or AMX.

A row's bits depend on its own sequence and adapter alone, in training and in sampling, and both use
the same kernels: a sampler's logprob of a token is the trainer's, to the last bit.

Shape legend: T packed rows, H hidden, R rows of a part, V vocab, K targets of a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from training.backends.base import Float32Array, Int32Array
from training.engine.adapter import AdapterLayout, Segment
from training.engine.decoder import BLOCK_TOKENS, Chunk, KvCache
from training.engine.machine import return_free_memory
from training.engine.model_config import ModelConfig
from training.engine.native import library
from training.engine.native.adapters import NativeAdapter
from training.engine.native.batch import (
    TrainingBatch,
    point_at,
    sampling_batch,
    segment_structs,
)
from training.engine.native.optimizer import NativeAdam
from training.engine.native.vocabulary import NativeVocabulary
from training.engine.native.weights import NativeWeights, check_shape
from training.engine.projections import UNEMBED_LAYER
from training.engine.weights import ModelWeights, load_weights


class NativeDecoder:
    """One pass of training at a time: a new one takes the memory of the one before."""

    is_batch_invariant = True
    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        """Raises ``ConfigError`` for a shape, ``BuildError`` for a machine without the kernels."""
        check_shape(config)
        self.config = config
        self.kernels = library.load()
        self.weights = NativeWeights(config, weights)
        self._training = _PassMemory(self)
        self._sampling = _PassMemory(self)
        self.head_memory = _HeadMemory(self)
        self.vocabulary = NativeVocabulary()
        self.adam = NativeAdam()
        self._logits = torch.empty(0)

    @classmethod
    def from_directory(cls, path: Path) -> NativeDecoder:
        """Loads a Hugging Face directory; raises ``ConfigError`` where it is not supported."""
        config = ModelConfig.from_directory(path)
        check_shape(config)
        return cls(config, load_weights(path, config, cls.device, cls.dtype))

    def set_num_threads(self, count: int) -> None:
        """Of all kernels in this process. No result depends on it."""
        self.kernels.tc_set_num_threads(count)

    @property
    def model(self) -> library.Model:
        return self.weights.model

    def activation_bytes(self, num_tokens: int) -> int:
        config = self.config
        heads = config.num_heads + 2 * config.num_kv_heads
        qkv = heads * config.head_dim * (2 if config.qk_norm else 1)
        o = config.num_heads * config.head_dim
        values = 2 * config.hidden_size + qkv + o + 2 * config.intermediate_size
        return num_tokens * config.num_layers * values * self.dtype.itemsize

    def release_memory(self) -> None:
        for memory in (self._training, self._sampling, self.head_memory):
            memory.release()
        self._logits = torch.empty(0)
        return_free_memory()

    def new_adapter(
        self, layout: AdapterLayout, weights: torch.Tensor, trainable: bool
    ) -> NativeAdapter:
        adapter = NativeAdapter(layout, weights, self.config)
        if not trainable:
            adapter.check()  # it will never be updated
        return adapter

    def training_pass(
        self,
        sequences: Sequence[Int32Array],
        segments: Sequence[Segment],
        with_gradient: bool,
        checkpointing: bool,
    ) -> NativeTrainingPass:
        batch = TrainingBatch(sequences, segments)
        keep = library.KEEP_INPUTS if checkpointing else library.KEEP_EVERYTHING
        hidden = self._training.forward(
            batch.struct, batch.num_rows, None, keep if with_gradient else library.KEEP_NOTHING
        )
        return NativeTrainingPass(self._training, batch, hidden)

    def head_pass(
        self, hidden_RH: torch.Tensor, targets_RK: Int32Array, segment: Segment, keep: bool
    ) -> NativeHeadPass:
        return NativeHeadPass(self, hidden_RH, targets_RK, segment, keep)

    def new_cache(self, num_blocks: int) -> NativeCache:
        return NativeCache(self.config, num_blocks)

    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        assert isinstance(cache, NativeCache)
        batch = sampling_batch(tokens_T, chunks, segments)
        return self._sampling.forward(
            batch.struct, batch.num_rows, cache.struct, library.KEEP_NOTHING
        )

    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        # Kept from call to call: fresh memory of this size costs more than the product.
        count = len(hidden_RH) * self.config.vocab_size
        if self._logits.numel() < count:
            self._logits = torch.empty(count)
        logits_RV = self._logits[:count].view(len(hidden_RH), self.config.vocab_size)
        structs = segment_structs((each, each.start, each.stop) for each in segments)
        status = self.kernels.tc_head_logits(
            ctypes.byref(self.model),
            self.head_memory.handle,
            library.address(hidden_RH),
            len(hidden_RH),
            structs,
            len(structs),
            logits_RV.data_ptr(),
        )
        library.check(status)
        return logits_RV


class NativeCache:
    """``decoder.KvCache``: K and V [layers, blocks, kv heads, 32 * D], each block in the tiles that
    attention multiplies with."""

    def __init__(self, config: ModelConfig, num_blocks: int) -> None:
        cells = config.num_kv_heads * BLOCK_TOKENS * config.head_dim
        shape = (config.num_layers, num_blocks, cells)
        # calloc: pages that are never used take no memory.
        self._k, self._v = (np.zeros(shape, np.uint16) for _ in range(2))
        self.num_blocks = num_blocks
        self.struct = library.Cache(
            k=self._k.ctypes.data, v=self._v.ctypes.data, layer_stride=num_blocks * cells
        )

    def copy_block(self, source: int, destination: int) -> None:
        for array in (self._k, self._v):
            array[:, destination] = array[:, source]

    def clear(self, block: int) -> None:
        for array in (self._k, self._v):
            array[:, block] = 0


class NativeTrainingPass:
    """``decoder.TrainingPass``; valid until the decoder's next one."""

    def __init__(self, memory: _PassMemory, batch: TrainingBatch, hidden: torch.Tensor) -> None:
        self._memory = memory
        self._batch = batch
        self._num_padded = batch.num_rows
        self._places = torch.from_numpy(batch.places)
        self._is_packed = len(batch.places) == batch.num_rows
        self.hidden_TH = hidden if self._is_packed else hidden[self._places]

    def backward(self, dhidden_TH: torch.Tensor) -> None:
        if not self._is_packed:
            padded = torch.zeros(self._num_padded, dhidden_TH.shape[1], dtype=torch.bfloat16)
            padded[self._places] = dhidden_TH
            dhidden_TH = padded
        self._batch.claim_gradients()
        self._memory.backward(self._batch, dhidden_TH)


class NativeHeadPass:
    """``decoder.HeadPass``."""

    def __init__(
        self,
        decoder: NativeDecoder,
        hidden_RH: torch.Tensor,
        targets_RK: Int32Array,
        segment: Segment,
        keep: bool,
    ) -> None:
        self._decoder = decoder
        self._hidden_RH = hidden_RH.contiguous()
        self._targets_RK = np.ascontiguousarray(targets_RK, np.int32)
        self._segment = segment
        num_rows, num_targets = self._targets_RK.shape
        self.logprobs_RK: Float32Array = np.empty((num_rows, num_targets), np.float32)
        self._lse_R = np.empty(num_rows, np.float64)
        vocab = decoder.config.vocab_size
        (struct,) = segment_structs([(segment, 0, num_rows)])
        self._rows = library.HeadRows(
            hidden=self._hidden_RH.data_ptr(),
            num_rows=num_rows,
            targets=self._targets_RK.ctypes.data,
            num_targets=num_targets,
            segment=struct,
            logprobs=self.logprobs_RK.ctypes.data,
            lse=self._lse_R.ctypes.data,
            kept=decoder.head_memory.kept(num_rows, vocab) if keep else None,
        )
        status = decoder.kernels.tc_head_forward(
            ctypes.byref(decoder.model), decoder.head_memory.handle, ctypes.byref(self._rows)
        )
        library.check(status)

    def backward(self, dlogprobs_RK: Float32Array, dhidden_RH: torch.Tensor) -> None:
        used = np.flatnonzero(dlogprobs_RK.any(1)).astype(np.int32)
        dlogprobs_RK = np.ascontiguousarray(dlogprobs_RK, np.float32)
        adapter, sink = self._segment.adapter, self._segment.sink
        if adapter is not None and sink is not None:
            keys = [key for key in adapter.layout.places if key[0] == UNEMBED_LAYER]
            point_at(self._rows.segment, sink, keys)
        assert dhidden_RH.is_contiguous()
        decoder = self._decoder
        status = decoder.kernels.tc_head_backward(
            ctypes.byref(decoder.model),
            decoder.head_memory.handle,
            ctypes.byref(self._rows),
            dlogprobs_RK.ctypes.data,
            used.ctypes.data,
            len(used),
            dhidden_RH.data_ptr(),
        )
        library.check(status)


class _PassMemory:
    """A pass of the kernels, and the memory that the next one will reuse."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._kernels = decoder.kernels
        self._hidden_size = decoder.config.hidden_size
        self._weights = decoder.weights  # must outlive the handle
        self._handle = self._kernels.tc_pass_new(ctypes.byref(decoder.model))

    def forward(
        self, batch: library.Batch, num_rows: int, cache: library.Cache | None, keep: int
    ) -> torch.Tensor:
        hidden_TH = torch.empty(num_rows, self._hidden_size, dtype=torch.bfloat16)
        status = self._kernels.tc_pass_forward(
            self._handle,
            ctypes.byref(batch),
            None if cache is None else ctypes.byref(cache),
            keep,
            hidden_TH.data_ptr(),
        )
        library.check(status)
        return hidden_TH

    def backward(self, batch: TrainingBatch, dhidden_TH: torch.Tensor) -> None:
        status = self._kernels.tc_pass_backward(
            self._handle, ctypes.byref(batch.struct), dhidden_TH.data_ptr()
        )
        library.check(status)

    def release(self) -> None:
        self._kernels.tc_pass_release(self._handle)

    def __del__(self) -> None:
        self._kernels.tc_pass_free(self._handle)


class _HeadMemory:
    """Memory of passes through the head: what they use, and probabilities kept between them."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._kernels = decoder.kernels
        self.handle = self._kernels.tc_workspace_new()
        self._kept = torch.empty(0, dtype=torch.bfloat16)

    def kept(self, num_rows: int, vocab: int) -> int:
        """Address of room for the rows' probabilities, good until the next call."""
        count = num_rows * self._kernels.tc_kept_stride(vocab)
        if self._kept.numel() < count:
            self._kept = torch.empty(count, dtype=torch.bfloat16)
        return self._kept.data_ptr()

    def release(self) -> None:
        self._kernels.tc_workspace_release(self.handle)
        self._kept = torch.empty(0, dtype=torch.bfloat16)

    def __del__(self) -> None:
        self._kernels.tc_workspace_free(self.handle)
