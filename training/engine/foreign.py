"""Models of any architecture that transformers knows, as its own modules: the general, slower path.

Sequences run one after another, those of one length and one segment together: no padding and no
packing, which not every architecture allows. Everything linear in attention and MLP is adapted,
experts of a mixture too, also those that lie in one 3-D parameter (each expert has matrices of its
own, of the full rank). Where a model's experts are of a kind that transformers' own interface for
them does not cover, ``train_mlp`` is refused.

Shape legend: T rows, R rows of a part, H hidden, V vocab, n sequences of one length L.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from training.backends.base import Int32Array
from training.core.errors import ConfigError
from training.engine.adapter import Adapter, AdapterLayout, Segment
from training.engine.buffers import converted
from training.engine.decoder import Chunk, KvCache
from training.engine.foreign_cache import ForeignCache
from training.engine.foreign_load import load_model
from training.engine.foreign_lora import ForeignLora
from training.engine.foreign_shape import (
    expert_parameters,
    find_head,
    find_shape,
    find_stack,
    linear_sizes,
)
from training.engine.machine import return_free_memory
from training.engine.optimizer import TorchAdam
from training.engine.packing import equal_length_runs
from training.engine.projections import UNEMBED_LAYER
from training.engine.torch_head import TorchHeadPass
from training.engine.torch_training import TorchTrainingPass, activation_bytes, pack
from training.engine.torch_vocabulary import TorchVocabulary

_log = logging.getLogger(__name__)


class ForeignDecoder:
    """``decoder.Decoder`` around a causal language model, whose weights are frozen."""

    is_batch_invariant = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ``ConfigError`` where the model is built in a way that this class cannot use."""
        self.config = find_shape(model)
        self.device = model.device
        self.dtype = model.dtype
        self.vocabulary = TorchVocabulary()
        self.adam = TorchAdam()
        model.eval()  # type: ignore[no-untyped-call]
        self._model = model.requires_grad_(False)
        self._body: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        self._lora = ForeignLora()
        self._checkpointing = False
        self._given_TH: torch.Tensor | None = None
        self._output_type: Callable[..., Any] = BaseModelOutputWithPast
        self._wrap_body()
        self._wrap_layers()
        self._check_head()

    @classmethod
    def from_directory(cls, path: Path, device: torch.device, dtype: torch.dtype) -> ForeignDecoder:
        decoder = cls(load_model(path, device, dtype))
        _log.warning(
            "%s is not one of the architectures that this engine computes itself: it runs as "
            "modules of transformers, which is general but slower",
            type(decoder._model).__name__,
        )
        if decoder.config.has_fused_experts:
            _log.info("each of its experts gets LoRA matrices of its own, of the full rank")
        for part, reason in decoder.config.unadaptable.items():
            _log.warning("train_%s is refused for this model: %s", part, reason)
        return decoder

    def activation_bytes(self, num_tokens: int) -> int:
        return activation_bytes(self.config, num_tokens, self.dtype)

    def release_memory(self) -> None:
        return_free_memory()

    def new_adapter(self, layout: AdapterLayout, weights: torch.Tensor, trainable: bool) -> Adapter:
        return Adapter(layout, converted(weights, self.device, self.dtype))

    # ------------------------------------------------------------------ training

    def training_pass(
        self,
        sequences: Sequence[Int32Array],
        segments: Sequence[Segment],
        with_gradient: bool,
        checkpointing: bool,
    ) -> TorchTrainingPass:
        packed = pack(sequences, segments)
        tokens_T = self._ids(packed.tokens_T)
        self._checkpointing = checkpointing and with_gradient
        outputs = []
        row = 0
        try:
            for segment, lengths in zip(segments, packed.lengths, strict=True):
                for length, count in equal_length_runs(lengths):
                    stop = row + length * count
                    tokens_nL = tokens_T[row:stop].view(count, length)
                    with torch.set_grad_enabled(with_gradient):
                        outputs.append(self._hidden(tokens_nL, segment, None).flatten(0, 1))
                    row = stop
        finally:
            self._checkpointing = False
        return TorchTrainingPass(torch.cat(outputs))

    def head_pass(
        self, hidden_RH: torch.Tensor, targets_RK: Int32Array, segment: Segment, keep: bool
    ) -> TorchHeadPass:
        return TorchHeadPass(self, hidden_RH, targets_RK, segment, keep)

    @torch.no_grad()
    def head_logits(self, hidden_RH: torch.Tensor, segment: Segment) -> torch.Tensor:
        """See ``torch_head.HeadProduct``."""
        return self._logits(hidden_RH, segment)

    @torch.enable_grad()
    def head_backward(
        self, hidden_RH: torch.Tensor, dlogits_RV: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """See ``torch_head.HeadProduct``. The logits are computed again, for their history."""
        leaf_RH = hidden_RH.detach().requires_grad_()
        torch.autograd.backward(self._logits(leaf_RH, segment), dlogits_RV)
        assert leaf_RH.grad is not None
        return leaf_RH.grad

    # ------------------------------------------------------------------ sampling

    def new_cache(self, num_blocks: int) -> KvCache:
        return ForeignCache(num_blocks)

    @torch.no_grad()
    def sampling_pass(
        self,
        cache: KvCache,
        tokens_T: Int32Array,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
    ) -> torch.Tensor:
        assert isinstance(cache, ForeignCache)
        outputs = []
        row = 0
        for chunk, adapter in zip(chunks, _adapters(chunks, segments), strict=True):
            cache.write(chunk, tokens_T[row : row + chunk.num_rows])
            row += chunk.num_rows
            past = cache.recall(chunk, adapter)
            first = chunk.start if past is not None else 0
            if past is None:
                past = DynamicCache(config=self._model.config)
            tokens = cache.read(chunk, chunk.start + chunk.num_rows)[first:]
            segment = Segment(adapter, 0, len(tokens))
            hidden_TH = self._hidden(self._ids(tokens)[None], segment, past)[0]
            outputs.append(hidden_TH[-chunk.num_rows :])
            cache.remember(chunk, adapter, past)
        return torch.cat(outputs)

    @torch.no_grad()
    def logits(self, hidden_RH: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        parts = [self._logits(hidden_RH[each.start : each.stop], each) for each in segments]
        return torch.cat(parts).float()

    # ------------------------------------------------------------------ the modules

    def _hidden(
        self, tokens_nL: torch.Tensor, segment: Segment, past: DynamicCache | None
    ) -> torch.Tensor:
        """Final-normed hidden states [n, L, H]."""
        with self._lora.use(segment):
            output = self._body(
                input_ids=tokens_nL, past_key_values=past, use_cache=past is not None
            )
        hidden_nLH: torch.Tensor = output.last_hidden_state
        return hidden_nLH

    def _logits(self, hidden_RH: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The model's own way from hidden states to logits [R, V], which may scale or cap them."""
        self._given_TH = hidden_RH
        try:
            with self._lora.use(segment):
                logits: torch.Tensor = self._model(use_cache=False).logits[0]
        finally:
            self._given_TH = None
        return logits

    def _wrap_body(self) -> None:
        """Lets the body return hidden states that it is given, so that the model's forward does
        what comes after the body and nothing else."""
        forward = self._body.forward

        def given_or_computed(*args: Any, **kwargs: Any) -> Any:
            if self._given_TH is not None:
                return self._output_type(last_hidden_state=self._given_TH[None])
            output = forward(*args, **kwargs)
            self._output_type = type(output)
            return output

        self._body.forward = given_or_computed

    def _wrap_layers(self) -> None:
        known = {(group.layer, group.name) for group in self.config.adapted_groups}
        stack = find_stack(self._model, self._model.config.get_text_config())
        for index, layer in enumerate(stack.layers):
            for path, module in layer.named_modules():
                names = expert_parameters(module)
                if linear_sizes(module) is not None and (index, path) in known:
                    self._lora.wrap_linear(module, (index, path))
                elif names is not None:
                    self._lora.wrap_experts(module, index, path, names)
            self._wrap_checkpoint(layer)
        path, head = find_head(self._model)
        self._lora.wrap_linear(head, (UNEMBED_LAYER, path))

    def _wrap_checkpoint(self, layer: nn.Module) -> None:
        """Not transformers' own checkpointing: that wants a model in training mode, with dropout.

        The second forward pass runs inside the backward pass, when another segment may be in use.
        """
        forward = layer.forward

        def maybe_checkpointed(*args: Any, **kwargs: Any) -> Any:
            if not self._checkpointing:
                return forward(*args, **kwargs)
            segment = self._lora.segment

            def run(*args: Any, **kwargs: Any) -> Any:
                with self._lora.use(segment):
                    return forward(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        layer.forward = maybe_checkpointed

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises ``ConfigError`` unless body and head, run apart, give the model's own logits."""
        name = type(self._model).__name__
        tokens_1L = self._ids(np.arange(min(4, self.config.vocab_size), dtype=np.int32))[None]
        segment = Segment(None, 0, tokens_1L.shape[1])
        try:
            expected_LV = self._model(input_ids=tokens_1L, use_cache=False).logits[0]
            found_LV = self._logits(self._hidden(tokens_1L, segment, None)[0], segment)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"{name} cannot be used: {error}") from error
        if not torch.allclose(found_LV, expected_LV, rtol=1e-2, atol=1e-2):
            raise ConfigError(f"{name} cannot be used: its head needs more than its hidden states")

    def _ids(self, tokens: Int32Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device, torch.int64)


def _adapters(chunks: Sequence[Chunk], segments: Sequence[Segment]) -> Iterator[Adapter | None]:
    """The adapter of each chunk; a segment holds whole chunks."""
    stops = [segment.stop for segment in segments]
    row = 0
    for chunk in chunks:
        yield segments[int(np.searchsorted(stops, row, side="right"))].adapter
        row += chunk.num_rows
