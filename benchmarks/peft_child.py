"""transformers + PEFT in a process of its own: ``python -m benchmarks.peft_child MODEL [options]``.

Answers the requests of ``children.serve``; times only the work itself. Trains the layers that this
server trains by default: all linears and the head (untied from the embedding, as PEFT demands).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.children import Answer, serve
from benchmarks.workload import PROMPT_TOKENS, RANK, Shape, token_rows, training_rows

LEARNING_RATE = 1e-4
MOST_TOKENS = 4096
"""A larger batch is accumulated: 8192 tokens at once took over 20 GB."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class Peft:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._model: Any = None
        self._steps: dict[str, Callable[[], float]] = {}

    def functions(self) -> Mapping[str, Callable[..., Answer]]:
        """Loads the base model; the first request that trains adds an adapter to it."""
        self._base: Any = AutoModelForCausalLM.from_pretrained(
            self.options.model,
            dtype=getattr(torch, self.options.dtype),
            attn_implementation=self.options.attention,
        )
        return {"train": self.train, "tenants": self.tenants, "generate": self.generate}

    # ----------------------------------------------------------------- training

    def train(self, shape: str, rank: int = RANK) -> Answer:
        """One forward, backward and AdamW step."""
        key = f"{shape} {rank}"
        if key not in self._steps:
            self._steps[key] = self._step_of(f"rank {rank}", Shape.parse(shape), rank, seed=0)
        return self._timed([self._steps[key]])

    def tenants(self, ranks: Sequence[int], length: int) -> Answer:
        """One sequence for each adapter, one after another: a PEFT model has one active adapter
        that trains."""
        names = [f"tenant {number}" for number in range(len(ranks))]
        for number, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            if name not in self._steps:
                self._steps[name] = self._step_of(name, Shape(1, length), rank, seed=number)
        return self._timed([self._steps[name] for name in names])

    def _timed(self, steps: Sequence[Callable[[], float]]) -> Answer:
        start = time.perf_counter()
        losses = [step() for step in steps]
        return {"seconds": time.perf_counter() - start, "losses": losses}

    def _step_of(self, adapter: str, shape: Shape, rank: int, seed: int) -> Callable[[], float]:
        model = self._with_adapter(adapter, rank)
        trained = [each for name, each in model.named_parameters() if f".{adapter}." in name]
        optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, fused=True if self.options.fused else None
        )
        rows = torch.from_numpy(training_rows(shape, seed))
        num_rows = max(1, MOST_TOKENS // shape.length)

        def step() -> float:
            model.set_adapter(adapter)
            optimizer.zero_grad()
            total = 0.0
            for start in range(0, len(rows), num_rows):
                part = rows[start : start + num_rows]
                loss = self._loss(part[:, :-1], part[:, 1:])
                torch.autograd.backward(loss)
                total += loss.item()
            optimizer.step()
            return total

        return step

    def _loss(self, tokens_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.autocast):
            logits_BLV = self._called(tokens_BL).logits.float()
            return torch.nn.functional.cross_entropy(
                logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum"
            )

    def _with_adapter(self, name: str, rank: int) -> PeftModel:
        config = LoraConfig(r=rank, lora_alpha=32, target_modules=list(LINEARS))
        wide = not self.options.narrow
        if self._model is None:
            self._untie()
            self._model = get_peft_model(self._base, config, name, autocast_adapter_dtype=wide)
            self._called = torch.compile(self._model) if self.options.compile else self._model
        elif name not in self._model.peft_config:
            self._model.add_adapter(name, config, autocast_adapter_dtype=wide)
        model: PeftModel = self._model
        return model

    def _untie(self) -> None:
        if self._base.config.tie_word_embeddings:
            head = self._base.lm_head
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            self._base.config.tie_word_embeddings = False

    # ----------------------------------------------------------------- sampling

    def generate(
        self, requests: int, new_tokens: int, seed: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> Answer:
        ids = torch.from_numpy(token_rows(requests, prompt_tokens, seed))
        start = time.perf_counter()
        result = self._base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "num_tokens": result.numel() - ids.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--narrow", action="store_true", help="bfloat16 adapter weights too")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve(Peft(options).functions)


if __name__ == "__main__":
    main()
