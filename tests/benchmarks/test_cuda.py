"""The GPU's benchmark where there is none: it refuses, or runs a tiny model on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import cuda
from training.engine.torch_paths import FastPaths


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing to refuse with a GPU")
def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cuda.options_of([])
    assert refusal.value.code == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calling transformers
def test_every_part_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = "--device cpu --shape tiny --batches 2x8 --requests 2 --rounds 1"
    options = cuda.options_of(arguments.split())
    limits, paths, training, requests = cuda.measure(options, tmp_path)
    assert re.fullmatch(r"products: [\d.]+ TFLOP/s; memory: \d+ GB/s", limits)
    assert paths == f"fast paths: {FastPaths()}"
    assert training.startswith("training 2x8: tinkercloud ")
    assert re.search(r"without fast paths [\d,]+ tokens/s; transformers \+ PEFT [\d,]+", training)
    assert requests.startswith("2 requests: tinkercloud ")
