"""Batches as the kernels read them: rows of sequences, and which adapter each row has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np

from training.backends.base import Int32Array
from training.engine.adapter import GradientSink, Segment
from training.engine.decoder import Chunk
from training.engine.native import library
from training.engine.native.adapters import NativeAdapter
from training.engine.projections import UNEMBED_LAYER

ROW_MULTIPLE = 32
"""Gradients are summed in steps of so many rows from the segment's first one: in training every
segment begins at a multiple, so that its sums are the same wherever it lies."""


class Batch:
    """Owns the arrays that ``struct`` points to."""

    def __init__(
        self,
        tokens_T: Int32Array,
        positions_T: Int32Array,
        sequences: ctypes.Array[library.SequenceRows],
        segments: ctypes.Array[library.Segment],
        owned: object,
    ) -> None:
        self._owned = (tokens_T, positions_T, sequences, segments, owned)
        self.num_rows = len(tokens_T)
        self.struct = library.Batch(
            num_rows=len(tokens_T),
            tokens=tokens_T.ctypes.data,
            positions=positions_T.ctypes.data,
            sequences=ctypes.addressof(sequences),
            num_sequences=len(sequences),
            segments=ctypes.addressof(segments),
            num_segments=len(segments),
        )


def sampling_batch(
    tokens_T: Int32Array, chunks: Sequence[Chunk], segments: Sequence[Segment]
) -> Batch:
    rows = (library.SequenceRows * len(chunks))()
    positions_T = np.empty(len(tokens_T), np.int32)
    row = 0
    for place, (blocks, start, num_rows) in zip(rows, chunks, strict=True):
        place.row, place.num_rows, place.position = row, num_rows, start
        place.blocks = blocks.ctypes.data
        positions_T[row : row + num_rows] = np.arange(start, start + num_rows, dtype=np.int32)
        row += num_rows
    structs = segment_structs((each, each.start, each.stop) for each in segments)
    tokens_T = np.ascontiguousarray(tokens_T, np.int32)
    return Batch(tokens_T, positions_T, rows, structs, chunks)


class TrainingBatch(Batch):
    """Whole sequences. ``places`` are the rows of the batch that the packed rows [T] got."""

    def __init__(self, sequences: Sequence[Int32Array], segments: Sequence[Segment]) -> None:
        starts, num_rows = _padded_starts(segments)
        stops = [segment.stop for segment in segments]
        num_packed = stops[-1] if stops else 0
        tokens = np.zeros(num_rows, np.int32)
        positions = np.zeros(num_rows, np.int32)
        self.places = np.empty(num_packed, np.int64)
        rows = (library.SequenceRows * len(sequences))()
        packed = 0
        for place, sequence in zip(rows, sequences, strict=True):
            index = int(np.searchsorted(stops, packed, side="right"))
            row, length = packed - segments[index].start + starts[index], len(sequence)
            tokens[row : row + length] = sequence
            positions[row : row + length] = np.arange(length, dtype=np.int32)
            self.places[packed : packed + length] = np.arange(row, row + length)
            place.row, place.num_rows = row, length
            packed += length
        structs = segment_structs(
            (segment, start, start + segment.stop - segment.start)
            for segment, start in zip(segments, starts, strict=True)
        )
        super().__init__(tokens, positions, rows, structs, None)
        self._segments = segments
        self._structs = structs

    def claim_gradients(self) -> None:
        """Points the segments at their sinks, for one backward pass through the layers."""
        sinks = [id(segment.sink) for segment in self._segments if segment.sink is not None]
        if len(set(sinks)) != len(sinks):
            raise RuntimeError("two segments of a pass share a sink: their sum has no order")
        for segment, struct in zip(self._segments, self._structs, strict=True):
            if segment.sink is not None and segment.adapter is not None:
                keys = [key for key in segment.adapter.layout.places if key[0] != UNEMBED_LAYER]
                point_at(struct, segment.sink, keys)


def point_at(struct: library.Segment, sink: GradientSink, keys: Sequence[tuple[int, str]]) -> None:
    flat, holds = sink.claim(keys)
    struct.gradient = flat.data_ptr() if keys else None
    struct.accumulate = holds


def segment_structs(
    segments: Iterable[tuple[Segment, int, int]],
) -> ctypes.Array[library.Segment]:
    """Of (segment, first row, row after the last), without gradients."""
    listed = list(segments)
    structs = (library.Segment * len(listed))()
    for struct, (segment, begin, end) in zip(structs, listed, strict=True):
        if segment.adapter is not None:
            assert isinstance(segment.adapter, NativeAdapter)
            struct.adapter = ctypes.pointer(segment.adapter.struct)
        struct.begin, struct.end = begin, end
    return structs


def _padded_starts(segments: Sequence[Segment]) -> tuple[list[int], int]:
    starts, row = [], 0
    for segment in segments:
        starts.append(row)
        row += -(-(segment.stop - segment.start) // ROW_MULTIPLE) * ROW_MULTIPLE
    return starts, row
