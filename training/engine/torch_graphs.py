"""Decode steps as recorded graphs: one launch in place of several hundred.

For CUDA, where a step of few rows takes less time than starting its kernels one by one. A graph has
fixed shapes and addresses, so rows and blocks are padded to a few sizes, inputs are copied into
buffers of the graph, and so are the adapter's weights. Recorded are only steps of one row per
sequence whose rows all use one adapter or none; every other step runs as if there were no graphs.

Written without a GPU at hand: recording itself has never run (``torch_probe`` tries it before it is
used); all else has, with a ``Capture`` that records nothing.

Shape legend: n sequences of a step (after padding), m blocks of each, H hidden.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import ref

import numpy as np
import torch

from training.backends.base import Int32Array, LoraSpec
from training.engine.adapter import Adapter, Segment
from training.engine.decoder import BLOCK_TOKENS, Chunk
from training.engine.torch_grouped import shape_of
from training.engine.torch_sampling import HiddenStates, TorchKvCache, decoding_attention

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MOST_BLOCKS = 1024
"""n * m of a graph. Beyond, a step is long enough to hide its launches, and the padding would cost:
every sequence is read as if it were as long as the longest. A guess; nobody has measured it."""
MOST_GRAPHS = 32
"""Those used longest ago are let go."""

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]
"""Records a step, which it may also run, and returns what runs it again: same inputs and output by
address, whatever they hold by then."""

_log = logging.getLogger(__name__)


class CudaCapture:
    """``Capture`` by CUDA graphs. They share their scratch memory, which is safe as long as nobody
    keeps an output while another graph runs: ``DecodeGraphs`` copies it at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # libraries set themselves up at first use, which cannot be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class Shape(NamedTuple):
    num_rows: int
    num_blocks: int


def padded_shape(chunks: Sequence[Chunk]) -> Shape | None:
    """None where no graph is worth it."""
    if len(chunks) > BATCH_SIZES[-1] or any(chunk.num_rows != 1 for chunk in chunks):
        return None
    num_rows = next(size for size in BATCH_SIZES if size >= len(chunks))
    longest = max(chunk.start // BLOCK_TOKENS + 1 for chunk in chunks)
    shape = Shape(num_rows, 1 << (longest - 1).bit_length())
    return shape if shape.num_rows * shape.num_blocks <= MOST_BLOCKS else None


def packed_inputs(
    tokens_T: Int32Array, chunks: Sequence[Chunk], shape: Shape
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """[n, 3 + m]: token, position, cell of the new key and value, and the blocks, of each row.

    Missing blocks repeat the row's own last one: what is masked must not be another's NaN. Missing
    rows repeat the last row: they store what it stores, where it does.
    """
    inputs = np.empty((shape.num_rows, 3 + shape.num_blocks), np.int64)
    for row, (token, chunk) in enumerate(zip(tokens_T, chunks, strict=True)):
        block, offset = divmod(chunk.start, BLOCK_TOKENS)
        cell = int(chunk.blocks[block]) * BLOCK_TOKENS + offset
        inputs[row, :3] = token, chunk.start, cell
        inputs[row, 3:] = chunk.blocks[np.minimum(np.arange(shape.num_blocks), block)]
    inputs[len(chunks) :] = inputs[len(chunks) - 1]
    return inputs


class _Resident:
    """Weights at a fixed address, those of one adapter after another."""

    def __init__(self, like: Adapter) -> None:
        self.adapter = Adapter(like.layout, torch.empty_like(like.flat))
        self._source: ref[Adapter] | None = None
        self._version = 0

    def hold(self, adapter: Adapter) -> None:
        held = self._source() if self._source is not None else None
        if held is not adapter or self._version != adapter.version:
            self.adapter.flat.copy_(adapter.flat)
            self._source, self._version = ref(adapter), adapter.version


class _Key(NamedTuple):
    shape: Shape
    adapter: LoraSpec | None


class _Graph(NamedTuple):
    """``inputs`` as of ``packed_inputs``; ``replay`` reads them and returns hidden states [n, H]
    that the next replay of any graph overwrites."""

    inputs: torch.Tensor
    replay: Step


class DecodeGraphs:
    """The graphs of one model and one cache."""

    def __init__(self, model: HiddenStates, cache: TorchKvCache, capture: Capture) -> None:
        self.cache = cache
        self._model = model
        self._capture: Capture | None = capture
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._residents: dict[LoraSpec, _Resident] = {}

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def run(
        self, tokens_T: Int32Array, chunks: Sequence[Chunk], segments: Sequence[Segment]
    ) -> torch.Tensor | None:
        """``decoder.Decoder.sampling_pass``, or None where it is left to the caller."""
        shape = padded_shape(chunks)
        adapter = segments[0].adapter
        if self._capture is None or shape is None:
            return None
        if any(segment.adapter is not adapter for segment in segments):
            return None
        inputs = torch.from_numpy(packed_inputs(tokens_T, chunks, shape))
        key = _Key(shape, None if adapter is None else shape_of(adapter))
        held = None if adapter is None else self._hold(adapter)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._record(key, inputs, held, self._capture)
            if graph is None:
                return None
        self._graphs.move_to_end(key)
        graph.inputs.copy_(inputs)
        return graph.replay()[: len(chunks)].clone()

    def _hold(self, adapter: Adapter) -> Adapter:
        spec = shape_of(adapter)
        resident = self._residents.get(spec)
        if resident is None:
            resident = self._residents[spec] = _Resident(adapter)
        resident.hold(adapter)
        return resident.adapter

    def _record(
        self, key: _Key, inputs: torch.Tensor, held: Adapter | None, capture: Capture
    ) -> _Graph | None:
        # Filled before recording: the step is run then, and stores keys and values.
        inputs_nX = inputs.to(self.cache.k.device)
        segments = [Segment(held, 0, key.shape.num_rows)]

        def step() -> torch.Tensor:
            tokens_n, positions_n, cells_n = inputs_nX[:, :3].T.contiguous()
            attention = decoding_attention(
                self._model.config, self.cache, positions_n, cells_n, inputs_nX[:, 3:]
            )
            return self._model.hidden(tokens_n, positions_n, segments, attention)

        try:
            graph = self._graphs[key] = _Graph(inputs_nX, capture(step))
        except torch.OutOfMemoryError:
            _log.warning("decode steps are no longer recorded: no memory left for another graph")
            self._capture = None
            self._graphs.clear()
            self._residents.clear()
            return None
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
            used = {each.adapter for each in self._graphs}
            self._residents = {spec: r for spec, r in self._residents.items() if spec in used}
        return graph
