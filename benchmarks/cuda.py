"""Our engine on a GPU against transformers + PEFT and the card itself, with random weights.

    python -m benchmarks.cuda [--shape 1b] [--batches 8x512 4x2048] [--requests 1 16 64]

Nobody has run it on a GPU yet: there are no figures of it in the documents. ``--device cpu --shape
tiny`` only shows that it works.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import engine as ours
from benchmarks import workload
from benchmarks.machine import best_s
from benchmarks.peft_child import LEARNING_RATE, LINEARS
from benchmarks.roofline import Costs
from benchmarks.workload import NEW_TOKENS, OURS, PROMPT_TOKENS, RANK, Case, Shape, Work
from training.backends.base import LoraSpec
from training.config import EngineConfig
from training.engine.load import load_decoder
from training.engine.model import Transformer
from training.engine.process import Engine
from training.engine.sampler import Sampler
from training.engine.trainer import Trainer

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": dict(zip(SIZES, (2048, 8192, 16, 32, 8, 128256), strict=True)),
    "tiny": dict(zip(SIZES, (64, 96, 2, 2, 1, workload.VOCAB_SIZE), strict=True)),
}
PLAIN = "without fast paths"
PEFT = "transformers + PEFT"
"""Adapters in bfloat16 and a fused AdamW: its faster way."""


def write_model(directory: Path, shape: str, device: torch.device) -> None:
    """Random weights, an untied head, and a tokenizer that nobody reads."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, eos_token_id=None)
    with device:
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    words = {f"<{token}>": token for token in range(config.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="<0>")).save(str(directory / "tokenizer.json"))


def engine_on(decoder: Transformer, directory: Path, config: EngineConfig) -> Engine:
    trainer = Trainer(decoder, config, "benchmarks/random")
    trainer.load_slot(0, LoraSpec(RANK, seed=0), None, True)
    return Engine(trainer, Sampler(decoder, config, directory / "tokenizer.json"))


def peft_step(model: Any, shape: Shape, device: torch.device) -> Callable[[], object]:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    rows = torch.from_numpy(workload.training_rows(shape)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(rows[:, :-1]).logits.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def to_the_end(function: Callable[[], object], device: torch.device) -> Work:
    """A GPU is asked, not called: what was asked has to be waited for."""

    def work() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return workload.clocked(work)


def gemm_flops(device: torch.device, size: int) -> float:
    """bfloat16, 2 per multiply and add, of a square product."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / best_s(to_the_end(lambda: left @ right, device))


def copied_bytes_s(device: torch.device, num_bytes: int) -> float:
    """Read and written, each counted."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_s(to_the_end(lambda: target.copy_(source), device))


def measure(options: argparse.Namespace, directory: Path) -> list[str]:
    """Lines to print."""
    device, rounds = torch.device(options.device), options.rounds
    is_small = options.shape == "tiny"
    flops = gemm_flops(device, 256 if is_small else 8192)
    bytes_s = copied_bytes_s(device, 2**20 if is_small else 2**31)
    write_model(directory, options.shape, device)
    costs, shapes = Costs.of(directory), [Shape.parse(text) for text in options.batches]
    # Whole batches at once, as PEFT has them.
    budget = max(shape.num_tokens for shape in shapes)
    config = EngineConfig(kernels="torch", micro_batch_tokens=budget)
    fast = load_decoder(directory, config, device, torch.bfloat16)
    assert isinstance(fast, Transformer)
    plain = Transformer(fast.config, fast.weights)
    engines = {
        way: engine_on(each, directory, config) for way, each in ((OURS, fast), (PLAIN, plain))
    }
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(LINEARS))
    theirs = get_peft_model(base.to(device), lora, autocast_adapter_dtype=False)
    lines = [
        f"products: {flops / 1e12:.1f} TFLOP/s; memory: {bytes_s / 1e9:.0f} GB/s",
        f"fast paths: {fast.paths}",
    ]
    for shape in shapes:
        steps = {way: ours.training_step(engine, shape) for way, engine in engines.items()}
        steps[PEFT] = peft_step(theirs, shape, device)
        ways = {way: to_the_end(step, device) for way, step in steps.items()}
        case = Case(f"training {shape}", workload.take_turns(ways, rounds), shape.num_tokens)
        lines.append(told(case, costs.train_tokens_per_s(flops, shape.length, RANK)))
    for num in options.requests:
        samples = {way: ours.sampling(engine, num, []) for way, engine in engines.items()}
        ways = {way: to_the_end(sample, device) for way, sample in samples.items()}
        case = Case(f"{num} requests", workload.take_turns(ways, rounds), num * NEW_TOKENS)
        limit = costs.sample_tokens_per_s(flops, bytes_s, num, PROMPT_TOKENS, NEW_TOKENS)
        lines.append(told(case, limit))
    return lines


def told(case: Case, limit: float) -> str:
    shown = [f"{way} {case.shown(way)}" for way in case.seconds]
    share = 100 * case.figure(OURS) / limit
    return f"{case.name}: {'; '.join(shown)}; the limit {limit:,.0f}, ours {share:.0f} % of it"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="1b", choices=list(SHAPES))
    parser.add_argument("--batches", nargs="*", default=["8x512", "4x2048"])
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --shape tiny tries the program")
    return options


def main() -> None:
    options = options_of()
    with tempfile.TemporaryDirectory() as directory:
        print("\n".join(measure(options, Path(directory))))


if __name__ == "__main__":
    main()
