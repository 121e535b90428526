"""Tries each fast path of torch once, on small random input, before a model uses it.

A path that raises, or whose result is not that of the plain path, is switched off and the log says
so. Nothing here has run on a GPU yet: the first server on one runs it, and its log tells.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from training.backends.base import LoraSpec
from training.engine.adapter import (
    UNEMBED_LAYER,
    Adapter,
    AdapterLayout,
    GradientSink,
    Group,
    Segment,
    fresh_weights,
)
from training.engine.decoder import BLOCK_TOKENS, Chunk
from training.engine.lora_linear import Lora, SegmentLora
from training.engine.model import Transformer
from training.engine.torch_graphs import Capture, CudaCapture, DecodeGraphs
from training.engine.torch_grouped import AdapterStacks
from training.engine.torch_paths import FastPaths
from training.engine.torch_varlen import Jagged, VarlenKernel, flash_varlen, plain_varlen
from training.engine.weights import Linear

PRODUCT_TOLERANCE = 2e-2
"""Relative, of the norm: some roundings to bfloat16, of 4e-3 each. A wrong sum is of order 1."""
MODEL_TOLERANCE = {torch.bfloat16: 1e-1, torch.float32: 1e-3}
"""The same after all layers of a model, which carry roundings on and let them grow."""
GROUPED_MAJORS = (9, 10)
"""Compute capabilities for which torch has a grouped kernel. On others it waits for the device and
loops over groups, which is no better than our own loop."""
PROBE_RANKS = (8, 32)

_log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """``error`` runs a path and says how far, relatively, it is from the plain one."""

    name: str
    error: Callable[[], float]
    tolerance: float


def works(candidate: Candidate) -> bool:
    """False, with a warning, where it raises or disagrees."""
    try:
        error = candidate.error()
    except Exception as reason:  # border: whatever a library or a driver raises
        first_line = (str(reason).splitlines() or [""])[0]
        _log.warning(
            "fast path %s is off: %s: %s", candidate.name, type(reason).__name__, first_line
        )
        return False
    if error <= candidate.tolerance:  # not so where it is NaN
        return True
    _log.warning(
        "fast path %s is off: it differs from the plain path by %.3g, over %.3g",
        candidate.name,
        error,
        candidate.tolerance,
    )
    return False


def probed_paths(model: Transformer) -> FastPaths:
    """Those that work for this model on its CUDA device."""
    # cuBLAS adds in a fixed order only with workspaces of a fixed size; read at its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    wanted = FastPaths(capture=CudaCapture(), in_order=True)
    if model.dtype != torch.bfloat16:
        _log.info("no packed attention, no grouped LoRA: they compute in bfloat16 alone")
        return working_paths(model, wanted)
    major, minor = torch.cuda.get_device_capability(model.device)
    if major not in GROUPED_MAJORS:
        _log.info("no grouped LoRA: torch has no kernel for capability %d.%d", major, minor)
    grouped = major in GROUPED_MAJORS
    return working_paths(model, replace(wanted, varlen=flash_varlen, grouped=grouped))


def working_paths(model: Transformer, wanted: FastPaths) -> FastPaths:
    """Those of ``wanted`` that work; the log says which they are, and why others are not."""
    kernel, capture = wanted.varlen, wanted.capture
    if kernel is not None:
        heads = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
        error = partial(varlen_error, kernel, heads, model.device)
        if not works(Candidate("packed attention", error, PRODUCT_TOLERANCE)):
            wanted = replace(wanted, varlen=None)
    if wanted.grouped:
        error = partial(grouped_error, model)
        if not works(Candidate("grouped LoRA", error, PRODUCT_TOLERANCE)):
            wanted = replace(wanted, grouped=False)
    if capture is not None:
        error = partial(graphs_error, model, capture)
        if not works(Candidate("recorded decoding", error, MODEL_TOLERANCE[model.dtype])):
            wanted = replace(wanted, capture=None)
    if wanted.in_order:
        error = partial(repeated_error, Transformer(model.config, model.weights, wanted))
        if not works(Candidate("repeatable training", error, 0.0)):
            _log.warning("the same operation may give other bits when it is run again")
            wanted = replace(wanted, in_order=False)
    found = {
        "packed attention": wanted.varlen is not None,
        "grouped LoRA": wanted.grouped,
        "recorded decoding": wanted.capture is not None,
        "repeatable training": wanted.in_order,
    }
    names = [name for name, is_on in found.items() if is_on]
    _log.info("fast paths on %s: %s", model.device, ", ".join(names) or "none")
    return wanted


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def _largest(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """NaN where any is: ``max`` alone might pass over it."""
    return float(np.max([_relative(found, expected) for found, expected in pairs]))


# --------------------------------------------------------------------------- attention


def varlen_error(kernel: VarlenKernel, heads: tuple[int, int, int], device: torch.device) -> float:
    """Forward and backward as in training, and forward with keys that came before, as in
    sampling. ``heads``: of queries, of keys, and their size."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    errors = []
    for window in (None, 5):
        for num_queries, num_keys in (((1, 33, 70), (1, 33, 70)), ((1, 7, 1), (40, 20, 1))):
            jagged = Jagged(num_queries, num_keys, device)
            q, k, v, do = (
                torch.randn(rows, count, head_dim, generator=generator).to(device, torch.bfloat16)
                for rows, count in (
                    (sum(num_queries), num_heads),
                    (sum(num_keys), num_kv_heads),
                    (sum(num_keys), num_kv_heads),
                    (sum(num_queries), num_heads),
                )
            )
            trains = num_queries == num_keys
            found = _attended(kernel, (q, k, v), do, jagged, window, trains)
            wide = (q.float(), k.float(), v.float())
            expected = _attended(plain_varlen, wide, do.float(), jagged, window, trains)
            errors.append(_largest(zip(found, expected, strict=True)))
    return float(np.max(errors))


def _attended(
    kernel: VarlenKernel,
    qkv: Sequence[torch.Tensor],
    do_TND: torch.Tensor,
    jagged: Jagged,
    window: int | None,
    trains: bool,
) -> list[torch.Tensor]:
    """o and, if ``trains``, the gradients of q, k and v."""
    with torch.set_grad_enabled(trains):
        q, k, v = (each.detach().requires_grad_(trains) for each in qkv)
        o_TND = kernel(q, k, v, jagged, window)
    if not trains:
        return [o_TND]
    return [o_TND.detach(), *torch.autograd.grad(o_TND, (q, k, v), do_TND)]


# --------------------------------------------------------------------------- adapters


def random_adapter(model: Transformer, rank: int, seed: int) -> Adapter:
    """Neither A nor B is zero."""
    layout = AdapterLayout.of(model.config, LoraSpec(rank, seed))
    flat = fresh_weights(layout)
    generator = torch.Generator().manual_seed(seed)
    for _, b, _ in layout.views(flat).values():
        b.uniform_(-0.1, 0.1, generator=generator)
    return model.new_adapter(layout, flat, trainable=False)


def grouped_error(model: Transformer) -> float:
    """The products of the first layer and the head, forward and backward, against the loop."""
    layer = model.weights.layers[0]
    linears = {
        (0, Group.QKV): layer.qkv,
        (0, Group.O): layer.o,
        (0, Group.GATE_UP): layer.gate_up,
        (0, Group.DOWN): layer.down,
        (UNEMBED_LAYER, Group.UNEMBED): model.weights.head,
    }
    errors = []
    for rank in PROBE_RANKS:
        adapters = [random_adapter(model, rank, seed) for seed in (1, 2)]
        for (number, group), linear in linears.items():
            errors.append(_grouped_error(model.device, adapters, linear, number, group))
    return float(np.max(errors))


def _grouped_error(
    device: torch.device, adapters: Sequence[Adapter], linear: Linear, layer: int, group: Group
) -> float:
    generator = torch.Generator().manual_seed(0)
    num_out, num_in = linear.weight.shape
    x_TI, dy_TO = (
        torch.randn(60, size, generator=generator).to(device, torch.bfloat16)
        for size in (num_in, num_out)
    )
    found = _trained(adapters, x_TI, dy_TO, linear, layer, group, grouped=True)
    expected = _trained(adapters, x_TI, dy_TO, linear, layer, group, grouped=False)
    return _largest(zip(found, expected, strict=True))


def _trained(
    adapters: Sequence[Adapter],
    x_TI: torch.Tensor,
    dy_TO: torch.Tensor,
    linear: Linear,
    layer: int,
    group: Group,
    grouped: bool,
) -> list[torch.Tensor]:
    """y, dx and the gradient of each adapter, with rows of the base model between them."""
    first, second = adapters
    flats = [torch.zeros(each.layout.num_params, device=x_TI.device) for each in adapters]
    sinks = [GradientSink(first.layout, flat) for flat in flats]
    segments = [
        Segment(first, 0, 7, sinks[0]),
        Segment(None, 7, 19),
        Segment(second, 19, 60, sinks[1]),
    ]
    lora: Lora = SegmentLora(segments)
    if grouped:
        stack = AdapterStacks().of(segments)
        assert stack is not None, "two adapters of one rank, a multiple of 8"
        lora = stack
    x = x_TI.clone().requires_grad_()
    with torch.enable_grad():
        y_TO = lora(x, linear, layer, group)
        torch.autograd.backward(y_TO, dy_TO)
    assert x.grad is not None
    return [y_TO.detach(), x.grad, *(sink.finish() for sink in sinks)]


def repeated_error(model: Transformer) -> float:
    """Of gradients of one operation that is run twice, sequences of many lengths in it."""
    adapter = random_adapter(model, PROBE_RANKS[0], 1)
    lengths = [length for length in (300, 300, 64, 5) if length <= model.config.context_length]
    rng = np.random.default_rng(0)
    sequences = [
        rng.integers(0, model.config.vocab_size, length).astype(np.int32) for length in lengths
    ]
    gradients = []
    for _ in range(2):
        flat = torch.zeros(adapter.layout.num_params, device=model.device)
        sink = GradientSink(adapter.layout, flat)
        segments = [Segment(adapter, 0, sum(lengths), sink)]
        training_pass = model.training_pass(sequences, segments, True, checkpointing=False)
        generator = torch.Generator().manual_seed(0)
        dhidden_TH = torch.randn(training_pass.hidden_TH.shape, generator=generator)
        training_pass.backward(dhidden_TH.to(training_pass.hidden_TH))
        gradients.append(sink.finish())
    return _relative(gradients[0], gradients[1])


# --------------------------------------------------------------------------- graphs


@torch.inference_mode()
def graphs_error(model: Transformer, capture: Capture) -> float:
    """Hidden states, keys and values of steps that are recorded and run again, with and without an
    adapter, against the plain passes."""
    plain, fast = (model.new_cache(8) for _ in range(2))
    graphs = DecodeGraphs(model, fast, capture)
    adapters = [None, *(random_adapter(model, 8, seed) for seed in (1, 2))]
    pairs = []
    for position in range(BLOCK_TOKENS - 1, BLOCK_TOKENS + 2):  # into a second block
        for number, adapter in enumerate(adapters):
            # Three rows, padded to four, each with blocks of its own.
            chunks = [Chunk(np.array([2 * n, 2 * n + 1], np.int32), position, 1) for n in range(3)]
            tokens = np.arange(3, dtype=np.int32) + np.int32(10 * number + position)
            tokens %= model.config.vocab_size
            segments = [Segment(adapter, 0, 3)]
            expected = model.sampling_pass(plain, tokens, chunks, segments)
            found = graphs.run(tokens, chunks, segments)
            if found is None:
                raise RuntimeError("the steps were not recorded")
            pairs += [(found, expected), (fast.k.clone(), plain.k.clone())]
    return _largest([*pairs, (fast.v, plain.v)])
