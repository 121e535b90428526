"""The seam between the service and whatever computes: two async interfaces over numpy arrays.

Ordering, retries, tenants, sequence numbers and ``tinker://`` paths are not known here.

Shape legend: N positions of a datum, K targets per position, P prompt tokens, S sampled tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

LORA_ALPHA = 32.0
"""Tinker's convention: products are scaled by alpha / rank, with alpha fixed."""


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter. A is random from ``seed``, B is zero, masters are fp32."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = LORA_ALPHA


@dataclass(frozen=True)
class AdamParams:
    """Per-call hyper-parameters; ``weight_decay`` is decoupled (torch's AdamW).

    ``grad_clip_norm`` bounds the global gradient norm; 0 means no clipping.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


MAX_STEP_NORM = 1.8e19
"""Of the gradient that enters the moments, clipped already: the square of more overflows fp32. The
second moment would be infinite from then on, so that no later step changes the weights."""


@dataclass(frozen=True, eq=False)
class Datum:
    """One packed training sequence.

    ``tokens`` int32 [N]; ``targets`` int64 [N] or [N, K]; ``inputs`` name -> float32, each of the
    shape of ``targets``. Position i predicts ``targets[i]`` after reading ``tokens[: i + 1]``.
    """

    tokens: Int32Array
    targets: Int64Array
    inputs: Mapping[str, Float32Array]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class TrainOp:
    """One client operation: ``data`` of one loss for the model in ``slot``."""

    slot: int
    loss: str
    loss_config: Mapping[str, float]
    data: Sequence[Datum]

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.data)


@dataclass(frozen=True, eq=False)
class TrainUnit:
    """Operations, perhaps of many slots, computed together; order within a slot is kept."""

    ops: Sequence[TrainOp]


@dataclass(frozen=True, eq=False)
class TrainOutput:
    """``logprobs`` float32 per datum, shaped like its targets; ``metrics`` has ``loss:sum``."""

    logprobs: Sequence[Float32Array]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class OptimOutput:
    """``metrics`` of the step taken, or ``error`` when it was refused.

    A refused step changed neither weights nor moments; the gradients are discarded either way.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a backend honours. The service refuses everything else before it is queued."""

    base_model: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    max_slots: int
    """Adapters that may be loaded at once. The backend decides which of them are in memory."""
    max_lora_rank: int
    losses: frozenset[str]
    optimizers: frozenset[str] = frozenset({"adamw"})
    layer_groups: frozenset[str] = frozenset({"attn", "mlp", "unembed"})
    max_topk: int = 20


class BackendState(StrEnum):
    """Only ``RUNNING`` takes calls; in the others but ``STOPPED`` they wait."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    FAILING = "failing"
    """Restarted so often in vain that somebody should look; restarts go on."""
    STOPPED = "stopped"


@dataclass(frozen=True)
class Health:
    """``generation`` counts starts: state of an older generation is gone.

    ``detail`` says why it is not running. ``num_restarts`` counts those that were tried, in vain or
    not. ``since``: when it came into this state, UTC.
    """

    alive: bool
    generation: int
    state: BackendState
    since: datetime
    num_restarts: int = 0
    detail: str = ""


class Saving:
    """A captured state on its way to disk: what is done to its slot now changes nothing of it."""

    def __init__(self, writing: asyncio.Future[None]) -> None:
        self._writing = writing
        # Nobody has to ask: a failure that nobody asked about is no error of asyncio's.
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def written(self) -> None:
        """Returns when every file is on disk, synced.

        Raises ``StorageError`` (the disk refuses), ``UnitError`` or ``BackendDead`` (the process
        went before it was done); the directory then holds anything. May be awaited any number of
        times; cancelling it does not stop the writing.
        """
        await asyncio.shield(self._writing)


class TrainerBackend(Protocol):
    """Trains many adapters ("slots") on one frozen base model.

    Errors: ``UserError`` (an operation is wrong), ``UnitError`` (nothing of the unit remains),
    ``BackendDead`` (the process is gone: every slot with it).
    """

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def capabilities(self) -> Capabilities: ...

    def health(self) -> Health: ...

    async def load_slot(
        self,
        slot: int,
        spec: LoraSpec,
        state_dir: Path | None = None,
        with_optimizer: bool = True,
    ) -> None:
        """Makes a fresh adapter, or one from ``state_dir`` (written by ``save_state``).

        Replaces what the slot held, gradients included. Without ``with_optimizer`` the moments and
        the step count start at zero.
        """

    async def unload_slot(self, slot: int) -> None: ...

    async def forward_backward(self, unit: TrainUnit) -> list[TrainOutput]:
        """Adds the gradients of each operation's token-sum loss to its slot; all or nothing."""

    async def forward(self, unit: TrainUnit) -> list[TrainOutput]:
        """The same outputs, changing nothing."""

    async def optim_step(self, params: Mapping[int, AdamParams]) -> dict[int, OptimOutput]:
        """Steps each slot with its own parameters, then clears its gradients.

        A slot without gradients takes the same step with a gradient of zero. A gradient that is not
        finite refuses the step of that slot alone. ``metrics`` has ``grad_norm`` (before clipping).
        """

    async def discard_grads(self, slot: int) -> None: ...

    async def save_state(self, slot: int, directory: Path) -> Saving:
        """Captures adapter, moments and step, to be written into an empty directory; gradients are
        not part. Returns when they are captured: the slot may then be changed, or unloaded."""

    async def export_adapter(self, slot: int, directory: Path) -> Saving:
        """The same of the PEFT layout: ``adapter_model.safetensors`` + ``adapter_config.json``."""


# --------------------------------------------------------------------------- sampling


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no character decode to."""


class StopReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One prompt, ``num_samples`` independent continuations.

    ``snapshot_id`` None samples from the base model. Sample i draws from a stream that depends on
    (``seed``, i) alone. ``max_tokens`` 0 only scores the prompt. ``temperature`` 0 is greedy.
    ``stop_strings`` are looked for in the text of the sampled tokens, and none ends in
    ``REPLACEMENT``: whether that has come, or the first bytes of another character, no decoder
    tells. The token that completes one, or a token of ``stop_token_ids``, is the last token
    returned. Those of one ``tenant`` take turns
    with those of the others, however many each has; results do not depend on it.
    """

    request_id: str
    snapshot_id: str | None
    prompt: Int32Array
    num_samples: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_tokens: Int64Array | None = None
    """[P-1, K]: tokens to score at prompt position row + 1; -1 scores nothing."""
    prompt_alt_tokens_k: int = 0
    tenant: str = ""


class TopK(NamedTuple):
    """Row-major ``token_ids`` int32 [L, k] and ``logprobs`` float32 [L, k].

    A cell that was not computed holds token 0 and NaN.
    """

    token_ids: Int32Array
    logprobs: Float32Array


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """``tokens`` int32 [S]; ``logprobs`` float32 [S] of the temperature-scaled distribution, before
    top-k and top-p cut it (at temperature 0: of the unscaled one)."""

    tokens: Int32Array
    logprobs: Float32Array
    stop_reason: StopReason
    topk: TopK | None = None


@dataclass(frozen=True, eq=False)
class SampleResult:
    """``prompt_logprobs`` float32 [P], NaN where not computed (position 0 always)."""

    sequences: Sequence[SampledSequence]
    prompt_logprobs: Float32Array | None = None
    topk_prompt: TopK | None = None
    target_prompt_logprobs: Float32Array | None = None
    """[P-1, K], 0 where the target was -1."""
    prompt_alt: TopK | None = None
    """[P-1, k] draws with replacement at the request's temperature."""
    prompt_cache_hit_tokens: int = 0


class SamplerBackend(Protocol):
    """Samples from a base model and from published adapter snapshots of it."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def capabilities(self) -> Capabilities: ...

    def health(self) -> Health: ...

    async def publish(self, snapshot_id: str, directory: Path) -> None:
        """Makes the adapter in ``directory`` (``export_adapter``'s or ``save_state``'s layout)
        available as ``snapshot_id``; publishing a known id replaces it for later requests."""

    async def retire(self, snapshot_id: str) -> None:
        """Forgets a snapshot; requests already running on it finish."""

    async def sample(self, request: SampleRequest) -> SampleResult:
        """Raises ``UserError`` for an unknown snapshot, ``BackendDead`` when the process goes."""

    async def cancel(self, request_id: str) -> None:
        """Ends a running request early; its ``sample`` raises ``UserError``. Unknown ids pass."""


class Backend(TrainerBackend, SamplerBackend, Protocol):
    """Both halves on one base model, as ``local`` and ``fake`` offer them."""
