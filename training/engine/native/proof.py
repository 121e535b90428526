"""Proves a loaded model before anybody trains on it: it has the bits that it had before.

What was trained since the last snapshot is computed again after a crash and must come out the same,
so an engine must not begin with one wrong bit in its weights or its arithmetic. That was seen: one
came up with other values in one table, another computed its first pass otherwise, on a machine that
reported no error (ARCHITECTURE.md, *Durability*). So the weights as they lie in memory and a small
pass over them have a digest, which is kept beside the kernels. A model that is new here is loaded
until two loads have the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from training.backends.base import LoraSpec
from training.core.errors import ConfigError
from training.engine.adapter import AdapterLayout, GradientSink, Segment, fresh_weights
from training.engine.machine import return_free_memory
from training.engine.native.build import cache_directory, library_path
from training.engine.native.decoder import NativeDecoder

MAX_LOADS = 5
VERSION = 1
"""Of this file: what a digest covers."""
MAX_RECORDS = 100
"""Kept in the user's cache."""
_ROWS = (50, 13)
"""Of the pass: every kernel works, on whole tiles and on parts of them."""
_SPEC = LoraSpec(rank=8, seed=1)

_log = logging.getLogger(__name__)


def load_proved(path: Path, num_threads: int | None = None) -> NativeDecoder:
    """Raises as ``NativeDecoder.from_directory``; ``ConfigError`` too where no two loads of several
    are alike."""
    record = _Record(path)
    known = record.read()
    found: list[str] = []
    while len(found) < MAX_LOADS:
        decoder = NativeDecoder.from_directory(path)
        if num_threads is not None:
            decoder.set_num_threads(num_threads)
        digest = digest_of(decoder)
        if digest == known:
            return decoder
        if digest in found:
            if known is not None:
                _log.warning("%s has other bits than before, twice the same: they are taken", path)
            record.write(digest)
            return decoder
        if known is not None or found:
            _log.warning("%s has other bits than before and is loaded again", path)
        found.append(digest)
        del decoder
        return_free_memory()
    raise ConfigError(
        f"{path}: no two of {MAX_LOADS} loads have the same bits; the memory, the disk or the "
        "processor of this machine is not sound"
    )


def digest_of(decoder: NativeDecoder) -> str:
    """Of the weights in memory, and of what a pass forward and back makes of them."""
    digest = hashlib.sha256(decoder.weights.sums().data)
    for values in _pass_over(decoder):
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    decoder.release_memory()
    return digest.hexdigest()


def _pass_over(decoder: NativeDecoder) -> list[torch.Tensor]:
    """Hidden states, log-probabilities and gradients of two sequences with an adapter."""
    vocab = decoder.config.vocab_size
    lengths = [min(rows, decoder.config.context_length) for rows in _ROWS]
    tokens = [np.arange(length, dtype=np.int32) * 97 % vocab for length in lengths]
    layout = AdapterLayout.of(decoder.config, _SPEC)
    weights = fresh_weights(layout)
    for _, b, _ in layout.views(weights).values():
        b.fill_(2**-6)
    adapter = decoder.new_adapter(layout, weights, trainable=True)
    sink = GradientSink(layout, torch.zeros(layout.num_params))
    segment = Segment(adapter, 0, sum(lengths), sink)
    passed = decoder.training_pass(tokens, [segment], with_gradient=True, checkpointing=False)
    targets = np.concatenate(tokens)[::-1, None]
    head = decoder.head_pass(passed.hidden_TH, targets, segment, keep=True)
    d_hidden = torch.zeros_like(passed.hidden_TH)
    head.backward(np.full(targets.shape, -1.0, np.float32), d_hidden)
    passed.backward(d_hidden)
    return [passed.hidden_TH, torch.from_numpy(head.logprobs_RK), d_hidden, sink.finish()]


class _Record:
    """The digest that a model had before, by its files and the version of the kernels."""

    def __init__(self, path: Path) -> None:
        name = hashlib.sha256(f"{VERSION} {library_path().name} {path.resolve()}".encode())
        for file in sorted(path.glob("*")):
            if file.suffix in (".json", ".safetensors"):
                status = file.stat()
                name.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        self._file = cache_directory() / f"loaded-{name.hexdigest()[:16]}"

    def read(self) -> str | None:
        try:
            return self._file.read_text()
        except OSError:
            return None

    def write(self, digest: str) -> None:
        aside = None
        try:
            descriptor, aside = tempfile.mkstemp(dir=self._file.parent)
            with os.fdopen(descriptor, "w") as file:
                file.write(digest)
            os.replace(aside, self._file)
        except OSError as error:
            _log.warning("cannot keep %s, the next start loads twice again: %s", self._file, error)
            if aside is not None:
                with suppress(OSError):
                    os.unlink(aside)
        with suppress(OSError):  # others may be doing the same
            self._forget_others()

    def _forget_others(self) -> None:
        """Of models that were not new here for longest."""
        records = list(self._file.parent.glob("loaded-*"))
        for old in sorted(records, key=lambda record: record.stat().st_mtime)[:-MAX_RECORDS]:
            old.unlink()
