"""LoRA adapters: where each matrix lies in one flat buffer, and views of it.

Everything of an adapter (weights, gradient, moments) has the same flat layout, so that a step, a
copy or a norm is one operation. Matrices of projections that share an input lie side by side:
their A's are one matrix [g * r, in], their B's one matrix [sum of outs, r].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.backends.base import LoraSpec
from training.core.errors import UserError
from training.engine.projections import UNEMBED_LAYER as UNEMBED_LAYER
from training.engine.projections import Group as Group
from training.engine.projections import ModelShape, Part, Projection

GroupKey = tuple[int, str]
"""Layer number and name of a group."""


class LoraMatrices(NamedTuple):
    """Views of one group: ``a`` [g * r, in] and ``b`` [sum of ``out_sizes``, r]."""

    a: torch.Tensor
    b: torch.Tensor
    out_sizes: list[int]


class Place(NamedTuple):
    """Where a group's A's begin, followed at once by its B's."""

    offset: int
    projections: tuple[Projection, ...]


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """The flat layout that ``spec`` has on a model."""

    spec: LoraSpec
    places: Mapping[GroupKey, Place]
    num_params: int

    @classmethod
    def of(cls, model: ModelShape, spec: LoraSpec) -> AdapterLayout:
        """Raises ``UserError`` where the model has a part that ``spec`` trains and we cannot."""
        wanted = {Part.ATTN: spec.train_attn, Part.MLP: spec.train_mlp}
        wanted[Part.UNEMBED] = spec.train_unembed
        for part, reason in model.unadaptable.items():
            if wanted[part]:
                raise UserError(f"train_{part} must be off for this model: {reason}")
        places: dict[GroupKey, Place] = {}
        offset = 0
        for layer, name, part, members in model.adapted_groups:
            if wanted[part]:
                places[layer, name] = Place(offset, members)
                offset += sum(spec.rank * (each.in_size + each.out_size) for each in members)
        return cls(spec, places, offset)

    def views(self, flat: torch.Tensor) -> dict[GroupKey, LoraMatrices]:
        """Views of ``flat`` [num_params], by (layer, group)."""
        rank = self.spec.rank
        views = {}
        for key, (offset, members) in self.places.items():
            in_size = members[0].in_size
            out_sizes = [each.out_size for each in members]
            a_end = offset + len(members) * rank * in_size
            b_end = a_end + sum(out_sizes) * rank
            a = flat[offset:a_end].view(len(members) * rank, in_size)
            b = flat[a_end:b_end].view(sum(out_sizes), rank)
            views[key] = LoraMatrices(a, b, out_sizes)
        return views

    def matrices(
        self, flat: torch.Tensor
    ) -> Iterator[tuple[Projection, torch.Tensor, torch.Tensor]]:
        """Views of ``flat`` by projection: A [r, in] and B [out, r]."""
        for key, (a, b, out_sizes) in self.views(flat).items():
            a_parts = torch.split(a, self.spec.rank)
            b_parts = torch.split(b, out_sizes)
            yield from zip(self.places[key].projections, a_parts, b_parts, strict=True)


class Adapter:
    """Weights of one adapter in the dtype that the model computes in; ``flat`` is shared with the
    views. A decoder that arranges weights otherwise derives from this class."""

    def __init__(self, layout: AdapterLayout, flat: torch.Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.rank = layout.spec.rank
        self.scale = layout.spec.alpha / layout.spec.rank
        self._views = layout.views(flat)
        self.version = 0
        """Changes whenever the weights do: for those who keep copies of them."""

    @property
    def num_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def update(self, weights_fp32: torch.Tensor) -> None:
        """Takes over fp32 weights [num_params], as they are after a step.

        In fp32 ``flat`` may be the very tensor given: there is then nothing to do.
        """
        self.version += 1
        if self.flat is not weights_fp32:
            self.flat.copy_(weights_fp32)

    def check(self) -> None:
        """Raises ``UserError`` where no pass may compute with these weights."""

    def group(self, layer: int, group: str) -> LoraMatrices | None:
        """The matrices of a group of projections, or None where this adapter has none."""
        return self._views.get((layer, group))


def fresh_weights(layout: AdapterLayout, into: torch.Tensor | None = None) -> torch.Tensor:
    """Initial fp32 weights [num_params] on the CPU: A uniform in +-1/sqrt(in), B zero.

    The bound is that of a kaiming-uniform ``nn.Linear``, as PEFT draws it. The draw depends on
    the layout and ``spec.seed`` alone: its generator is its own. ``into``: zeros to write to.
    """
    generator = torch.Generator().manual_seed(layout.spec.seed)
    flat = torch.zeros(layout.num_params) if into is None else into
    for a, _, _ in layout.views(flat).values():
        bound = 1 / math.sqrt(a.shape[1])
        a.uniform_(-bound, bound, generator=generator)
    return flat


class Segment(NamedTuple):
    """Rows [``start``, ``stop``) of a packed batch use ``adapter`` (None: the base model alone).

    ``sink``: what a backward pass adds the adapter's gradient to; None where it is not wanted.
    """

    adapter: Adapter | None
    start: int
    stop: int
    sink: GradientSink | None = None


class GradientSink:
    """Sums one operation's adapter gradient in ``flat``, fp32 [num_params] of any content.

    The first addition to a group overwrites it: filling with zeros first and reading them back
    would cost two more passes over memory. ``finish`` zeroes what nothing was added to.
    """

    def __init__(self, layout: AdapterLayout, flat: torch.Tensor) -> None:
        self._flat = flat
        self._views = layout.views(flat)
        self._untouched = set(self._views)

    def holds(self, layer: int, group: str) -> bool:
        return (layer, group) in self._views

    def add(self, layer: int, group: str, da: torch.Tensor, dbs: Sequence[torch.Tensor]) -> None:
        """``da`` [g * r, in]; ``dbs`` [out, r] of each projection. Of any dtype."""
        a, b, out_sizes = self._views[layer, group]
        parts = zip((a, *torch.split(b, out_sizes)), (da, *dbs), strict=True)
        first = (layer, group) in self._untouched
        self._untouched.discard((layer, group))
        for into, value in parts:
            if first:
                into.copy_(value)
            else:
                into.add_(value)

    def claim(self, keys: Iterable[GroupKey]) -> tuple[torch.Tensor, bool]:
        """``flat``, for a caller that writes all of these groups there itself; and whether they
        hold something to add to."""
        mine = {key for key in keys if key in self._views}
        untouched = mine & self._untouched
        if untouched and untouched != mine:
            raise RuntimeError("some of these groups hold a gradient, some do not")
        self._untouched -= mine
        return self._flat, not untouched

    def finish(self) -> torch.Tensor:
        """The sum; nothing is added after."""
        for key in self._untouched:
            self._views[key].a.zero_()
            self._views[key].b.zero_()
        return self._flat
