"""Forward pass of a Llama-family decoder over packed sequences, with many adapters at once.

Used by the trainer (with gradients, packed causal attention) and the sampler (without, attention
over its KV cache); it knows neither. The base weights are frozen.

Shape legend: T tokens of all sequences packed, H hidden, N heads, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from training.backends.base import Int32Array
from training.engine import torch_sampling
from training.engine.adapter import UNEMBED_LAYER, Adapter, AdapterLayout, Group
from training.engine.adapter import Segment as Segment
from training.engine.attention import PackedAttention
from training.engine.buffers import converted
from training.engine.decoder import Chunk, KvCache
from training.engine.elementwise import rms_norm, rotate, swiglu
from training.engine.lora_linear import (
    Lora,
    SegmentLora,
    lora_linear,
    lora_linear_backward,
)
from training.engine.machine import return_free_memory
from training.engine.model_config import ModelConfig as ModelConfig
from training.engine.optimizer import TorchAdam
from training.engine.torch_graphs import DecodeGraphs
from training.engine.torch_grouped import AdapterStacks
from training.engine.torch_head import TorchHeadPass
from training.engine.torch_paths import FastPaths
from training.engine.torch_sampling import TorchKvCache
from training.engine.torch_training import TorchTrainingPass, activation_bytes, pack
from training.engine.torch_varlen import VarlenAttention
from training.engine.torch_vocabulary import TorchVocabulary
from training.engine.weights import LayerWeights, ModelWeights, load_weights


class Attention(Protocol):
    """What the layers do not know: which tokens see which."""

    def __call__(
        self, layer: int, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Returns o [T, N, D]. q and k are rotated; scores are scaled by 1 / sqrt(D)."""


class Rotation(NamedTuple):
    """``cos`` and ``sin`` [T, 1, D] of each token's position, in the compute dtype."""

    cos: torch.Tensor
    sin: torch.Tensor


class Transformer:
    """``decoder.Decoder`` of torch operations. Thread-safe for reading; computes in the dtype of
    its weights."""

    is_batch_invariant = False
    """A matrix product of torch rounds differently for another number of rows. Nor do the fast
    paths promise it: what flash attention does for a sequence may be apart from its neighbours, but
    the products around it are not, and grouped ones may be cut by the sizes of all groups."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, paths: FastPaths | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.paths = paths or FastPaths()
        self._stacks = AdapterStacks()
        self._graphs: DecodeGraphs | None = None
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.vocabulary = TorchVocabulary()
        self.adam = TorchAdam()
        frequencies = config.rope.inverse_frequencies(config.head_dim)
        self._frequencies = frequencies.to(self.device)

    @classmethod
    def from_directory(cls, path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
        """Loads a Hugging Face directory; raises ``ConfigError`` where it is not supported."""
        config = ModelConfig.from_directory(path)
        return cls(config, load_weights(path, config, device, dtype))

    def activation_bytes(self, num_tokens: int) -> int:
        return activation_bytes(self.config, num_tokens, self.dtype)

    def release_memory(self) -> None:
        return_free_memory()

    def new_adapter(self, layout: AdapterLayout, weights: torch.Tensor, trainable: bool) -> Adapter:
        """In fp32 it computes on ``weights`` themselves, where they lie on the device: no copy."""
        return Adapter(layout, converted(weights, self.device, self.dtype))

    def training_pass(
        self,
        sequences: Sequence[Int32Array],
        segments: Sequence[Segment],
        with_gradient: bool,
        checkpointing: bool,
    ) -> TorchTrainingPass:
        packed = pack(sequences, segments)
        with torch.set_grad_enabled(with_gradient):
            hidden_TH = self.hidden(
                torch.from_numpy(packed.tokens_T).to(self.device),
                torch.from_numpy(packed.positions_T).to(self.device),
                segments,
                self._packed_attention(packed.lengths),
                checkpointing=checkpointing and with_gradient,
            )
        return TorchTrainingPass(hidden_TH, self.paths.in_order)

    def _packed_attention(self, lengths: Sequence[Sequence[int]]) -> Attention:
        windows, kernel = self.config.windows, self.paths.varlen
        if kernel is None:
            return PackedAttention(lengths, windows)
        together = [length for each in lengths for length in each]
        return VarlenAttention(together, windows, kernel, self.device)

    def head_pass(
        self, hidden_RH: torch.Tensor, targets_RK: Int32Array, segment: Segment, keep: bool
    ) -> TorchHeadPass:
        return TorchHeadPass(self, hidden_RH, targets_RK, segment, keep)

    def head_logits(self, hidden_RH: torch.Tensor, segment: Segment) -> torch.Tensor:
        """See ``torch_head.HeadProduct``."""
        return lora_linear(hidden_RH, self.weights.head, [segment], UNEMBED_LAYER, Group.UNEMBED)

    def head_backward(
        self, hidden_RH: torch.Tensor, dlogits_RV: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """See ``torch_head.HeadProduct``."""
        head = self.weights.head
        return lora_linear_backward(
            hidden_RH, dlogits_RV, head, [segment], UNEMBED_LAYER, Group.UNEMBED
        )

    def hidden(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        segments: Sequence[Segment],
        attention: Attention,
        checkpointing: bool = False,
    ) -> torch.Tensor:
        """Final-normed hidden states [T, H].

        ``checkpointing`` keeps only each layer's input for the backward pass and computes the
        layer again there.
        """
        rotation = self.rotation(positions_T)
        lora = self._lora(segments)
        x_TH = self.weights.embedding[tokens_T]
        for index, layer in enumerate(self.weights.layers):
            if checkpointing:
                x_TH = checkpoint(
                    self._layer,
                    x_TH,
                    index,
                    layer,
                    rotation,
                    lora,
                    attention,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_TH = self._layer(x_TH, index, layer, rotation, lora, attention)
        return rms_norm(x_TH, self.weights.final_norm, self.config.norm_eps)

    def _lora(self, segments: Sequence[Segment]) -> Lora:
        stack = self._stacks.of(segments) if self.paths.grouped else None
        return stack or SegmentLora(segments)

    def new_cache(self, num_blocks: int) -> TorchKvCache:
        """Decode steps are recorded for the last one made."""
        cache = TorchKvCache(self.config, num_blocks, self.device, self.dtype)
        if self.paths.capture is not None:
            self._graphs = DecodeGraphs(self, cache, self.paths.capture)
        return cache

    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        assert isinstance(cache, TorchKvCache)
        if self._graphs is not None and self._graphs.cache is cache:
            hidden_TH = self._graphs.run(tokens_T, chunks, segments)
            if hidden_TH is not None:
                return hidden_TH
        varlen = self.paths.varlen
        return torch_sampling.sampling_pass(self, cache, tokens_T, chunks, segments, varlen)

    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """In bfloat16 they are rounded to it before they become fp32."""
        lora = self._lora(segments)
        return lora(hidden_RH, self.weights.head, UNEMBED_LAYER, Group.UNEMBED).float()

    def rotation(self, positions_T: torch.Tensor) -> Rotation:
        angles = positions_T.float()[:, None] * self._frequencies
        angles = torch.cat((angles, angles), 1)[:, None]
        return Rotation(angles.cos().to(self.dtype), angles.sin().to(self.dtype))

    def _layer(
        self,
        x_TH: torch.Tensor,
        index: int,
        layer: LayerWeights,
        rotation: Rotation,
        lora: Lora,
        attention: Attention,
    ) -> torch.Tensor:
        normed_TH = rms_norm(x_TH, layer.input_norm, self.config.norm_eps)
        o_TX = self._attend(normed_TH, index, layer, rotation, lora, attention)
        x_TH = x_TH + lora(o_TX, layer.o, index, Group.O)
        normed_TH = rms_norm(x_TH, layer.mlp_norm, self.config.norm_eps)
        gate_up = lora(normed_TH, layer.gate_up, index, Group.GATE_UP)
        return x_TH + lora(swiglu(gate_up), layer.down, index, Group.DOWN)

    def _attend(
        self,
        normed_TH: torch.Tensor,
        index: int,
        layer: LayerWeights,
        rotation: Rotation,
        lora: Lora,
        attention: Attention,
    ) -> torch.Tensor:
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        qkv = lora(normed_TH, layer.qkv, index, Group.QKV)
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, config.head_dim)
        q_TND, k_TKD, v_TKD = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TND = rms_norm(q_TND, layer.q_norm, config.norm_eps)
            k_TKD = rms_norm(k_TKD, layer.k_norm, config.norm_eps)
        q_TND = rotate(q_TND, rotation.cos, rotation.sin)
        k_TKD = rotate(k_TKD, rotation.cos, rotation.sin)
        o_TND = attention(index, q_TND, k_TKD, v_TKD)
        return o_TND.reshape(-1, num_heads * config.head_dim)
