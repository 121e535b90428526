"""What a client of the kill test writes down: one JSON line a result, comparable to the last bit.

Floats are kept in hexadecimal, arrays as digests of their bytes; names of sessions, which differ
from run to run, are left out of paths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tinker import types

IN_FLIGHT = 3
"""Steps submitted before the first of them is waited for."""


class Record:
    """Lines are flushed one by one: what was heard stays heard, whatever happens next."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def __call__(self, what: str, **values: Any) -> None:
        line = {"what": what, **{name: _exact(value) for name, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def training(self, what: str, output: types.ForwardBackwardOutput) -> None:
        """Every metric and, per datum, every array of a forward or forward_backward."""
        arrays = [
            {name: digest(tensor.to_numpy()) for name, tensor in sorted(each.items())}
            for each in output.loss_fn_outputs
        ]
        self(what, metrics=dict(sorted(output.metrics.items())), outputs=arrays)

    def step(self, what: str, output: types.OptimStepResponse) -> None:
        self(what, metrics=dict(sorted((output.metrics or {}).items())))

    def path(self, what: str, path: str) -> None:
        self(what, path=checkpoint_name(path))


def _exact(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return value


def digest(array: np.ndarray[Any, Any]) -> str:
    """Of type, shape and bytes; short, for it is compared and never searched for."""
    head = f"{array.dtype.str}{list(array.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def checkpoint_name(path: str) -> str:
    """``weights/step-3`` of ``tinker://<training run>/weights/step-3``."""
    return path.removeprefix("tinker://").split("/", 1)[1]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="file of JSON lines to write")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=6, help="sequences, or questions, of a step")
    parser.add_argument("--length", type=int, default=24, help="tokens of a sequence, at most")
    parser.add_argument("--rank", type=int, default=4)
    return parser


def next_token_datum(tokens: Sequence[int]) -> types.Datum:
    """Cross entropy of each next token of ``tokens``."""
    inputs: dict[str, Any] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "weights": np.ones(len(tokens) - 1, np.float32),
    }
    prompt = types.ModelInput.from_ints(list(tokens[:-1]))
    return types.Datum(model_input=prompt, loss_fn_inputs=inputs)
