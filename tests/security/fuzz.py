"""atheris over the decoders, guided by coverage; not part of the test suite, since it is no use in
seconds. It needs ``pip install atheris`` (not for every version of Python) and ends by itself:

    python -m tests.security.fuzz protobuf --seconds 300
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zstandard

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    sys.exit("this needs atheris: pip install atheris")

with atheris.instrument_imports(include=["training"]):
    from tests.security import decoders

from tests.e2e.raw import request

BODY = request("s:train:0", 1).SerializeToString()
JSON_SEEDS = (
    b'{"model_id": "m", "seq_id": 1, "adam_params": {"learning_rate": 0.1}}',
    b'{"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "num_samples": 1}',
    b'{"model_id": "m", "forward_input": {"loss_fn": "ppo", "data": [{"model_input": {"chunks": '
    b'[]}, "loss_fn_inputs": {"a": {"data": [1], "dtype": "int64", "shape": [1]}}}]}}',
)
TARGETS: Mapping[str, tuple[Callable[[bytes], object], tuple[bytes, ...]]] = {
    "protobuf": (decoders.train_data, (BODY,)),
    "zstd": (decoders.zstd, (zstandard.compress(BODY), zstandard.compress(bytes(100_000)))),
    "json": (decoders.json, JSON_SEEDS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    chosen = parser.parse_args()
    target, seeds = TARGETS[chosen.target]
    with tempfile.TemporaryDirectory(prefix="tinkercloud-fuzz-") as corpus:
        for index, seed in enumerate(seeds):
            (Path(corpus) / str(index)).write_bytes(seed)
        limits = [f"-max_total_time={chosen.seconds}", "-rss_limit_mb=1024", "-timeout=10"]
        atheris.Setup([sys.argv[0], corpus, "-max_len=16384", *limits], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
