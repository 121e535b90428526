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
from training.engine.lora_linear import lora_linear, lora_linear_backward
from training.engine.model_config import ModelConfig as ModelConfig
from training.engine.optimizer import TorchAdam
from training.engine.torch_head import TorchHeadPass
from training.engine.torch_sampling import TorchKvCache
from training.engine.torch_training import TorchTrainingPass, pack
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
    """A matrix product of torch rounds differently for another number of rows."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
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
                PackedAttention(packed.lengths, self.config.windows),
                checkpointing=checkpointing and with_gradient,
            )
        return TorchTrainingPass(hidden_TH)

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
        x_TH = self.weights.embedding[tokens_T]
        for index, layer in enumerate(self.weights.layers):
            if checkpointing:
                x_TH = checkpoint(
                    self._layer,
                    x_TH,
                    index,
                    layer,
                    rotation,
                    segments,
                    attention,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_TH = self._layer(x_TH, index, layer, rotation, segments, attention)
        return rms_norm(x_TH, self.weights.final_norm, self.config.norm_eps)

    def new_cache(self, num_blocks: int) -> TorchKvCache:
        return TorchKvCache(self.config, num_blocks, self.device, self.dtype)

    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        assert isinstance(cache, TorchKvCache)
        return torch_sampling.sampling_pass(self, cache, tokens_T, chunks, segments)

    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """In bfloat16 they are rounded to it before they become fp32."""
        head = self.weights.head
        return lora_linear(hidden_RH, head, segments, UNEMBED_LAYER, Group.UNEMBED).float()

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
        segments: Sequence[Segment],
        attention: Attention,
    ) -> torch.Tensor:
        normed_TH = rms_norm(x_TH, layer.input_norm, self.config.norm_eps)
        o_TX = self._attend(normed_TH, index, layer, rotation, segments, attention)
        x_TH = x_TH + lora_linear(o_TX, layer.o, segments, index, Group.O)
        normed_TH = rms_norm(x_TH, layer.mlp_norm, self.config.norm_eps)
        gate_up = lora_linear(normed_TH, layer.gate_up, segments, index, Group.GATE_UP)
        return x_TH + lora_linear(swiglu(gate_up), layer.down, segments, index, Group.DOWN)

    def _attend(
        self,
        normed_TH: torch.Tensor,
        index: int,
        layer: LayerWeights,
        rotation: Rotation,
        segments: Sequence[Segment],
        attention: Attention,
    ) -> torch.Tensor:
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        qkv = lora_linear(normed_TH, layer.qkv, segments, index, Group.QKV)
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, config.head_dim)
        q_TND, k_TKD, v_TKD = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TND = rms_norm(q_TND, layer.q_norm, config.norm_eps)
            k_TKD = rms_norm(k_TKD, layer.k_norm, config.norm_eps)
        q_TND = rotate(q_TND, rotation.cos, rotation.sin)
        k_TKD = rotate(k_TKD, rotation.cos, rotation.sin)
        o_TND = attention(index, q_TND, k_TKD, v_TKD)
        return o_TND.reshape(-1, num_heads * config.head_dim)
