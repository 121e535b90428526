"""Which linears of a model an adapter may change, as a decoder tells it; knows no torch.

An adapter's layout follows from this list alone, and so do its names in PEFT's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

UNEMBED_LAYER = -1
"""Layer number of the head, which belongs to no layer."""


class Group(StrEnum):
    """Projections of the Llama family that share one input. Other models name theirs freely."""

    QKV = "qkv"
    O = "o"  # noqa: E741 (the projection's usual name)
    GATE_UP = "gate_up"
    DOWN = "down"
    UNEMBED = "unembed"


class Part(StrEnum):
    """What ``LoraSpec.train_attn``, ``train_mlp`` and ``train_unembed`` switch on."""

    ATTN = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


class Projection(NamedTuple):
    """One adapted linear.

    ``path``: its module in PEFT's model, which is transformers' own but for a 3-D parameter
    (``model.layers.0.self_attn.q_proj``). ``target``: how PEFT's ``target_modules`` name it and its
    like in other layers (``q_proj``). ``is_parameter``: ``target`` is one of ``target_parameters``
    instead. Projections of one path are the experts in one 3-D parameter, in their order.
    """

    path: str
    target: str
    in_size: int
    out_size: int
    is_parameter: bool = False


class AdaptedGroup(NamedTuple):
    """Projections that share one input. (``layer``, ``name``) is unique in a model."""

    layer: int
    name: str
    part: Part
    projections: tuple[Projection, ...]


class ModelShape(Protocol):
    """What the trainer and the sampler know of a model, whatever its architecture."""

    @property
    def model_type(self) -> str: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def adapted_groups(self) -> Sequence[AdaptedGroup]:
        """All that can be adapted; attention before MLP within a layer, the head last."""

    @property
    def unadaptable(self) -> Mapping[Part, str]:
        """Parts that cannot be adapted in this model, and why."""
