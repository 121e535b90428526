"""The fake's model: a bigram language model with a frozen base and low-rank adapters on its head.

logits of position i = (head + sum over groups of scale * B A) @ embedding[tokens[i]]

Every row is computed alone by the same products, so a sequence gets the same bits whoever is in the
batch, and the sampler the same bits as the trainer.

Shape legend: V vocabulary, D width, R rank, N positions, C distinct context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from training.backends.base import Float32Array, LoraSpec

Float64Array = NDArray[np.float64]

BASE_SEED = 20250917
WIDTH = 16
LAYER_GROUPS = ("attn", "mlp", "unembed")
_CACHED_VALUES = 4_000_000  # 32 MB of rows for each set of weights


class BaseWeights:
    """Frozen ``embedding_VD`` and ``head_VD``, the same for every vocabulary of one size."""

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.Generator(np.random.Philox(BASE_SEED))
        self.vocab_size = vocab_size
        self.embedding_VD: Float64Array = rng.standard_normal((vocab_size, WIDTH))
        self.head_VD: Float64Array = 0.4 * rng.standard_normal((vocab_size, WIDTH))
        self.embedding_VD.setflags(write=False)
        self.head_VD.setflags(write=False)


def spec_groups(spec: LoraSpec) -> tuple[str, ...]:
    """The layer groups that ``spec`` trains. In this model each is one product on the head."""
    flags = (spec.train_attn, spec.train_mlp, spec.train_unembed)
    return tuple(group for group, on in zip(LAYER_GROUPS, flags, strict=True) if on)


def fresh_adapter(spec: LoraSpec, vocab_size: int) -> dict[str, Float32Array]:
    """``<group>.lora_A`` [R, D] uniform from the seed, ``<group>.lora_B`` [V, R] zero."""
    weights: dict[str, Float32Array] = {}
    for index, group in enumerate(LAYER_GROUPS):
        if group not in spec_groups(spec):
            continue
        rng = stream(spec.seed, index)
        bound = WIDTH**-0.5
        draws = rng.uniform(-bound, bound, (spec.rank, WIDTH))
        weights[f"{group}.lora_A"] = draws.astype(np.float32)
        weights[f"{group}.lora_B"] = np.zeros((vocab_size, spec.rank), np.float32)
    return weights


def stream(seed: int, index: int) -> np.random.Generator:
    """An independent random stream for each (seed, index); any 64-bit seed, also negative ones."""
    mask = 2**64 - 1
    key = np.array([seed & mask, index & mask], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class HeadView:
    """Log-probabilities under one fixed set of weights; rows are computed once and kept."""

    def __init__(
        self, base: BaseWeights, spec: LoraSpec | None, adapter: Mapping[str, Float32Array]
    ) -> None:
        self.base = base
        self._rows: dict[int, Float64Array] = {}
        self._head_VD = base.head_VD
        if spec is not None:
            scale = spec.alpha / spec.rank
            for group in spec_groups(spec):
                down = adapter[f"{group}.lora_A"].astype(np.float64)
                up = adapter[f"{group}.lora_B"].astype(np.float64)
                self._head_VD = self._head_VD + scale * (up @ down)

    def logprobs(self, context: int) -> Float64Array:
        """[V], of the token after ``context``."""
        row = self._rows.get(context)
        if row is None:
            if (len(self._rows) + 1) * self.base.vocab_size > _CACHED_VALUES:
                self._rows.clear()
            row = log_softmax(self._head_VD @ self.base.embedding_VD[context])
            self._rows[context] = row
        return row

    def logprobs_of(
        self, contexts_N: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> Float64Array:
        """Shape of ``targets`` ([N] or [N, K]): log p(target | context)."""
        out = np.empty(targets.shape, np.float64)
        for context in np.unique(contexts_N):
            chosen = contexts_N == context
            out[chosen] = self.logprobs(int(context))[targets[chosen]]
        return out


def log_softmax(logits_V: Float64Array) -> Float64Array:
    shifted = logits_V - logits_V.max()
    result: Float64Array = shifted - np.log(np.exp(shifted).sum())
    return result


def head_gradient(
    view: HeadView,
    contexts_N: NDArray[np.integer],
    targets_NK: NDArray[np.integer],
    dlogprobs_NK: Float64Array,
) -> Float64Array:
    """[V, D]: gradient of the loss by the head, from its derivative by the target logprobs.

    d logits of one position = sum over k of dlogprob_k * (onehot(target_k) - p); positions with
    the same context share p, so one outer product for each distinct context is enough.
    """
    base = view.base
    gradient_VD = np.zeros((base.vocab_size, WIDTH), np.float64)
    for context in np.unique(contexts_N):
        chosen = contexts_N == context
        weights = dlogprobs_NK[chosen].ravel()
        dlogits_V = np.bincount(
            targets_NK[chosen].ravel(), weights=weights, minlength=base.vocab_size
        )
        dlogits_V -= weights.sum() * np.exp(view.logprobs(int(context)))
        gradient_VD += np.outer(dlogits_V, base.embedding_VD[context])
    return gradient_VD


def adapter_gradient(
    spec: LoraSpec, adapter: Mapping[str, Float32Array], gradient_VD: Float64Array
) -> dict[str, Float64Array]:
    """Chain rule through scale * B A, keyed like the adapter."""
    scale = spec.alpha / spec.rank
    gradients: dict[str, Float64Array] = {}
    for group in spec_groups(spec):
        down = adapter[f"{group}.lora_A"].astype(np.float64)
        up = adapter[f"{group}.lora_B"].astype(np.float64)
        gradients[f"{group}.lora_A"] = scale * (up.T @ gradient_VD)
        gradients[f"{group}.lora_B"] = scale * (gradient_VD @ down.T)
    return gradients
