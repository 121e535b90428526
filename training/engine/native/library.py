"""The kernels as Python sees them: C structs and functions, declared once.

Structs hold addresses of tensors; whoever fills one in keeps the tensors alive. Fields are those of
``kernels/model.hpp`` and ``kernels/head.hpp``.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch

from training.engine.native.build import BuildError, library_path

OK, NO_MEMORY, NOT_FINITE = range(3)
KEEP_NOTHING, KEEP_INPUTS, KEEP_EVERYTHING = range(3)


class Linear(Structure):
    _fields_ = (
        ("w", c_void_p),
        ("w_t", c_void_p),
        ("bias", c_void_p),
        ("in_size", c_int32),
        ("out_size", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("window", c_int32),
    )


class Model(Structure):
    _fields_ = (
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("inner", c_int32),
        ("vocab", c_int32),
        ("norm_eps", c_float),
        ("embedding", c_void_p),
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("head", Linear),
        ("cos_sin", c_void_p),
    )


class LoraGroup(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("num_parts", c_int32),
        ("part_end", c_int32 * 3),
        ("gradient", c_int64),
    )


class Adapter(Structure):
    _fields_ = (
        ("groups", POINTER(LoraGroup)),
        ("rank", c_int32),
        ("padded_rank", c_int32),
        ("scale", c_float),
    )


class AdamStep(Structure):
    _fields_ = (
        ("step", c_int64),
        ("learning_rate", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("weight_decay", c_double),
        ("gradient_scale", c_double),
    )


class Segment(Structure):
    _fields_ = (
        ("adapter", POINTER(Adapter)),
        ("begin", c_int32),
        ("end", c_int32),
        ("gradient", c_void_p),
        ("accumulate", c_int32),
    )


class SequenceRows(Structure):
    _fields_ = (
        ("row", c_int32),
        ("num_rows", c_int32),
        ("position", c_int32),
        ("blocks", c_void_p),
    )


class Batch(Structure):
    _fields_ = (
        ("num_rows", c_int32),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("num_sequences", c_int32),
        ("segments", c_void_p),
        ("num_segments", c_int32),
    )


class Cache(Structure):
    _fields_ = (("k", c_void_p), ("v", c_void_p), ("layer_stride", c_int64))


class HeadRows(Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("num_rows", c_int32),
        ("targets", c_void_p),
        ("num_targets", c_int32),
        ("segment", Segment),
        ("logprobs", c_void_p),
        ("lse", c_void_p),
        ("kept", c_void_p),
    )


_LOGITS = (c_void_p, c_int64, c_int32, c_int32)  # address, row stride, rows, vocab
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "tc_available": (c_int32, ()),
    "tc_num_threads": (c_int32, ()),
    "tc_set_num_threads": (None, (c_int32,)),
    "tc_packed_elements": (c_int64, (c_int32, c_int32)),
    "tc_pack_linear": (None, (c_void_p, c_int32, c_int32, c_void_p, c_void_p)),
    "tc_pack_adapter": (c_int32, (*(c_void_p,) * 3, *(c_int32,) * 3)),
    "tc_multiply": (None, (c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p)),
    "tc_pass_new": (c_void_p, (c_void_p,)),
    "tc_pass_free": (None, (c_void_p,)),
    "tc_pass_release": (None, (c_void_p,)),
    "tc_pass_forward": (c_int32, (c_void_p, c_void_p, c_void_p, c_int32, c_void_p)),
    "tc_pass_backward": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "tc_workspace_new": (c_void_p, ()),
    "tc_workspace_free": (None, (c_void_p,)),
    "tc_workspace_release": (None, (c_void_p,)),
    "tc_kept_stride": (c_int64, (c_int32,)),
    "tc_head_logits": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_void_p),
    ),
    "tc_head_forward": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "tc_head_backward": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p),
    ),
    "tc_sample_rows": (None, (*_LOGITS, *(c_void_p,) * 6)),
    "tc_draw_rows": (None, (*_LOGITS, c_void_p, c_void_p, c_int32, c_void_p, c_void_p)),
    "tc_top_rows": (None, (*_LOGITS, c_void_p, c_int32, c_void_p, c_void_p)),
    "tc_target_rows": (None, (*_LOGITS, c_void_p, c_int32, c_void_p, c_void_p)),
    "tc_adamw_step": (None, (*(c_void_p,) * 4, c_int64, c_void_p)),
    "tc_step_adapter": (c_int32, (*(c_void_p,) * 7, *(c_int32,) * 3)),
    "tc_global_norm": (c_double, (c_void_p, c_int64)),
}


@cache
def load() -> ctypes.CDLL:
    """The library, built if need be. Raises ``BuildError`` where it cannot run here."""
    library = ctypes.CDLL(str(library_path()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = library[name]
        function.restype = result  # type: ignore[assignment]
        function.argtypes = arguments  # type: ignore[assignment]
        setattr(library, name, function)  # subscripts make a new one each time
    if not library.tc_available():
        raise BuildError("the operating system does not let this process use tile registers")
    return library


def address(tensor: torch.Tensor | None) -> int | None:
    """For a struct's field; the tensor must be contiguous."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def check(status: int) -> None:
    """Raises ``MemoryError`` for a call that found no memory."""
    if status == NO_MEMORY:
        raise MemoryError("the kernels found no memory for a pass")
