"""LoRA products of several adapters by grouped products: one call for all segments of a pass.

For CUDA in bfloat16. The loop of ``lora_linear`` starts two kernels and more for each segment; here
their number does not depend on how many segments there are, but for the copies into their sinks.
What a segment gets is a product of its own rows and its own adapter; still nothing is promised
about bits, since the kernel that the library picks may depend on the sizes of all groups.

Written without a GPU at hand: the products have run on the CPU alone (``torch_probe`` tries them on
a GPU before they are used there).

Shape legend: T rows, I inputs, O outputs of a whole group of projections, S segments, r rank,
R = g * r for g projections, P num_params.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch.nn import functional as F

from training.backends.base import LoraSpec
from training.engine.adapter import Adapter, Group, Place, Segment
from training.engine.lora_linear import anchor_of, lora_linear
from training.engine.weights import Linear

MOST_BYTES = 2**30
"""Of weights side by side; more are computed one adapter after another."""
MULTIPLE = 8
"""Rows of every operand begin at multiples of 16 bytes: sizes and ranks are multiples of this."""
NUM_KEPT = 2
"""Stacks kept: the trainer and the sampler take turns."""


def shape_of(adapter: Adapter) -> LoraSpec:
    """Equal for adapters of one model whose matrices lie at the same places."""
    return replace(adapter.layout.spec, seed=0)


class _Kept(NamedTuple):
    """``flat_SP`` holds the adapters' weights as they were at ``versions``."""

    adapters: tuple[ref[Adapter] | None, ...]
    versions: tuple[int, ...]
    flat_SP: torch.Tensor

    def is_of(self, adapters: Sequence[Adapter | None], versions: tuple[int, ...]) -> bool:
        kept = [None if each is None else each() for each in self.adapters]
        return (
            self.versions == versions
            and len(kept) == len(adapters)
            and all(mine is other for mine, other in zip(kept, adapters, strict=True))
        )


class AdapterStacks:
    """Copies adapters side by side, once for each set of them until one is changed."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def of(self, segments: Sequence[Segment]) -> Stack | None:
        """None where the loop over segments has to do it: fewer than two adapted segments, ranks
        or parts that differ, a rank that the kernel does not take, or too much memory."""
        adapters = [segment.adapter for segment in segments]
        adapted = [adapter for adapter in adapters if adapter is not None]
        if len(adapted) < 2 or len({shape_of(adapter) for adapter in adapted}) > 1:
            return None
        first = adapted[0]
        if first.rank % MULTIPLE or len(segments) * first.flat.nbytes > MOST_BYTES:
            return None
        ends_S = torch.tensor(
            [segment.stop for segment in segments], dtype=torch.int32, device=first.flat.device
        )
        return Stack(segments, first, self._flat(adapters, first), ends_S)

    def _flat(self, adapters: Sequence[Adapter | None], first: Adapter) -> torch.Tensor:
        versions = tuple(0 if each is None else each.version for each in adapters)
        for kept in self._kept:
            if kept.is_of(adapters, versions):
                self._kept.remove(kept)
                self._kept.append(kept)
                return kept.flat_SP
        # A segment without an adapter gets one of zeros, which changes nothing.
        zeros = torch.zeros_like(first.flat) if None in adapters else first.flat
        flat_SP = torch.stack([zeros if each is None else each.flat for each in adapters])
        refs = tuple(None if each is None else ref(each) for each in adapters)
        self._kept = [*self._kept[1 - NUM_KEPT :], _Kept(refs, versions, flat_SP)]
        return flat_SP


def _is_aligned(place: Place) -> bool:
    return all(
        projection.in_size % MULTIPLE == 0 and projection.out_size % MULTIPLE == 0
        for projection in place.projections
    )


class _Matrices(NamedTuple):
    """``a`` [S, R, I]; ``bs`` [S, O_i, r] of each projection i; ``columns`` of x W^T that are its
    own, ``ranks`` of x A^T."""

    a: torch.Tensor
    bs: list[torch.Tensor]
    columns: list[slice]
    ranks: list[slice]


class Stack:
    """``lora_linear.Lora`` of segments that cover the rows in order. ``first`` is any of their
    adapters, ``flat_SP`` the weights of each segment's, ``ends_S`` where each ends."""

    def __init__(
        self,
        segments: Sequence[Segment],
        first: Adapter,
        flat_SP: torch.Tensor,
        ends_S: torch.Tensor,
    ) -> None:
        self.segments = segments
        self.scale = first.scale
        self._layout = first.layout
        self._flat_SP = flat_SP
        self._ends_S = ends_S

    def __call__(
        self, x_TI: torch.Tensor, linear: Linear, layer: int, group: Group
    ) -> torch.Tensor:
        """Groups of a size that the kernel does not take (a head of odd size) are looped over."""
        place = self._layout.places.get((layer, group))
        if place is not None and not _is_aligned(place):
            return lora_linear(x_TI, linear, self.segments, layer, group)
        if not torch.is_grad_enabled():
            return self.forward(x_TI, linear, layer, group)[0]
        y_TO: torch.Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
            x_TI, anchor_of(x_TI, self.segments, layer, group), self, linear, layer, group
        )
        return y_TO

    def forward(
        self, x_TI: torch.Tensor, linear: Linear, layer: int, group: Group
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y [T, O] and scale * x A^T [T, R]; None where nothing is adapted here."""
        y_TO = F.linear(x_TI, linear.weight, linear.bias)
        found = self._matrices(layer, group)
        if found is None:
            return y_TO, None
        z_TR = self._products(x_TI, found.a.mT).mul_(self.scale)
        for b, columns, ranks in zip(found.bs, found.columns, found.ranks, strict=True):
            y_TO[:, columns] += self._products(z_TR[:, ranks], b.mT)
        return y_TO, z_TR

    def backward(
        self,
        needs_dx: bool,
        x_TI: torch.Tensor,
        z_TR: torch.Tensor | None,
        dy_TO: torch.Tensor,
        linear: Linear,
        layer: int,
        group: Group,
    ) -> torch.Tensor | None:
        """Returns dx [T, I]; adds to the sinks."""
        dx_TI = dy_TO @ linear.weight if needs_dx else None
        found = self._matrices(layer, group)
        if z_TR is None or found is None:
            return dx_TI
        dys = [dy_TO[:, columns] for columns in found.columns]
        dz_TR = torch.cat([self._products(dy, b) for dy, b in zip(dys, found.bs, strict=True)], 1)
        dz_TR.mul_(self.scale)
        if any(segment.sink for segment in self.segments):
            da_SRI = self._products(dz_TR.T, x_TI)
            dbs = [
                self._products(dy.T, z_TR[:, ranks])
                for dy, ranks in zip(dys, found.ranks, strict=True)
            ]
            for number, segment in enumerate(self.segments):
                if segment.sink is not None:
                    segment.sink.add(layer, group, da_SRI[number], [db[number] for db in dbs])
        if dx_TI is not None:
            dx_TI += self._products(dz_TR, found.a)
        return dx_TI

    def _products(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Rows [T, k] by matrices [S, k, m] -> [T, m]; or [k, T] by [T, m] -> [S, k, m], a sum over
        each segment's rows."""
        product: torch.Tensor = F.grouped_mm(left, right, offs=self._ends_S)
        return product

    def _matrices(self, layer: int, group: Group) -> _Matrices | None:
        place = self._layout.places.get((layer, group))
        if place is None:
            return None
        num_segments, rank = len(self._flat_SP), self._layout.spec.rank
        in_size, num_ranks = place.projections[0].in_size, rank * len(place.projections)
        out_sizes = [projection.out_size for projection in place.projections]
        middle = place.offset + num_ranks * in_size
        a = self._flat_SP[:, place.offset : middle].view(num_segments, num_ranks, in_size)
        b = self._flat_SP[:, middle : middle + sum(out_sizes) * rank]
        bs = torch.split(b.view(num_segments, sum(out_sizes), rank), out_sizes, 1)
        stops = [sum(out_sizes[: index + 1]) for index in range(len(out_sizes))]
        columns = [slice(stop - size, stop) for stop, size in zip(stops, out_sizes, strict=True)]
        ranks = [slice(index * rank, (index + 1) * rank) for index in range(len(out_sizes))]
        return _Matrices(a, list(bs), columns, ranks)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        anchor: torch.Tensor | None,
        stack: Stack,
        linear: Linear,
        layer: int,
        group: Group,
    ) -> torch.Tensor:
        y_TO, z_TR = stack.forward(x_TI, linear, layer, group)
        ctx.save_for_backward(x_TI, z_TR)
        ctx.stack, ctx.call = stack, (linear, layer, group)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor) -> Any:
        x_TI, z_TR = ctx.saved_tensors
        dx_TI = ctx.stack.backward(ctx.needs_input_grad[0], x_TI, z_TR, dy_TO, *ctx.call)
        return dx_TI, None, None, None, None, None
