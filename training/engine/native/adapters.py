"""An adapter in the form that the kernels read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from training.core.errors import UserError
from training.engine.adapter import Adapter, AdapterLayout
from training.engine.buffers import new_flat
from training.engine.model_config import ModelConfig
from training.engine.native import library
from training.engine.projections import UNEMBED_LAYER, Group

ALIGNMENT = 64
"""Bytes: tiles are loaded by whole cache lines."""
GROUPS = (Group.QKV, Group.O, Group.GATE_UP, Group.DOWN)
"""Of one layer, in the kernels' order."""


class _Pointers:
    """Addresses of bfloat16 arrays, one after the other."""

    def __init__(self, address: int) -> None:
        self.next_address = address

    def take(self, count: int) -> int:
        address = self.next_address
        self.next_address += -(-2 * count // ALIGNMENT) * ALIGNMENT
        return address


class NativeAdapter(Adapter):
    """Matrices in tiles of bfloat16.

    Nothing may be computed with weights that are not finite: rows of several adapters meet in one
    tile, where zero times infinity is not zero. See ``check``.
    """

    def __init__(self, layout: AdapterLayout, weights: torch.Tensor, config: ModelConfig) -> None:
        self.layout = layout
        self.rank = layout.spec.rank
        self.scale = layout.spec.alpha / layout.spec.rank
        self._kernels = library.load()
        self._padded_rank = -(-self.rank // 32) * 32
        keys = [(layer, group) for layer in range(config.num_layers) for group in GROUPS]
        keys.append((UNEMBED_LAYER, Group.UNEMBED))
        self._groups = (library.LoraGroup * len(keys))()
        self._inputs = (ctypes.c_int32 * len(keys))()
        sizes = _Pointers(0)  # once over all of it to see how much it is
        self._place_all(keys, sizes)
        # Zeros: what pads the rank is never written.
        self._flat = new_flat(sizes.next_address // 2, weights.device, torch.bfloat16)
        self._place_all(keys, _Pointers(self._flat.data_ptr()))
        self.struct = library.Adapter(
            groups=ctypes.cast(self._groups, ctypes.POINTER(library.LoraGroup)),
            rank=self.rank,
            padded_rank=self._padded_rank,
            scale=self.scale,
        )
        self.update(weights)

    def _place_all(self, keys: Sequence[tuple[int, str]], pointers: _Pointers) -> None:
        for index, key in enumerate(keys):
            if key in self.layout.places:
                self._place(index, key, pointers)

    def _place(self, index: int, key: tuple[int, str], pointers: _Pointers) -> None:
        offset, projections = self.layout.places[key]
        in_size = projections[0].in_size
        out_sizes = [each.out_size for each in projections]
        ends = [sum(out_sizes[: part + 1]) for part in range(len(out_sizes))]
        padded, total = self._padded_rank, self._padded_rank * len(projections)
        group = self._groups[index]
        group.a = pointers.take(self._elements(total, in_size))
        group.b = pointers.take(self._elements(sum(out_sizes), padded))
        group.num_parts = len(projections)
        group.part_end = (ctypes.c_int32 * 3)(*(ends + ends[-1:] * 3)[:3])
        group.gradient = offset
        self._inputs[index] = in_size

    def _elements(self, out_size: int, in_size: int) -> int:
        return int(self._kernels.tc_packed_elements(out_size, in_size))

    @property
    def num_bytes(self) -> int:
        return self._flat.nbytes

    def update(self, weights_fp32: torch.Tensor) -> None:
        weights = weights_fp32.contiguous()
        self._pack(self._kernels.tc_pack_adapter, weights.data_ptr())

    def step(self, buffers: Sequence[int | None], params: library.AdamStep) -> None:
        """A step of AdamW on ``buffers``, the addresses of fp32 weights, exp_avg, exp_avg_sq and
        gradient, and ``update`` with what it makes: in one pass over memory."""
        self._pack(self._kernels.tc_step_adapter, *buffers, ctypes.byref(params))

    def _pack(self, function: Callable[..., int], *source: object) -> None:
        groups = (self._groups, self._inputs, len(self._inputs), self.rank, self._padded_rank)
        self.is_finite = function(*source, *groups) != library.NOT_FINITE

    def check(self) -> None:
        if not self.is_finite:
            raise UserError("the adapter's weights are not finite")
