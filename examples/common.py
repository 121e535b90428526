"""What the examples share: arguments, connection, chat prompts, data, and a log of metrics.

Run an example from the repository root against a running server (``tinkercloud serve``):

    python -m examples.sft --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tinker
from tinker import types

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COUNTRIES = Path(__file__).parent / "data" / "countries.jsonl"
SYSTEM = "You answer in one line."
Metrics = dict[str, float]


def parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    arguments.add_argument("--model", default=BASE_MODEL, help="base model to adapt")
    arguments.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    arguments.add_argument("--seed", type=int, default=0, help="of the adapter and the data order")
    arguments.add_argument("--json", type=Path, help="file that receives every metric")
    return arguments


def connect() -> tinker.ServiceClient:
    """Uses TINKER_BASE_URL and TINKER_API_KEY; without them, a server started with defaults."""
    base_url = os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000").rstrip("/")
    # The server mirrors the tokenizers of its models, so nothing else need be reachable.
    os.environ.setdefault("HF_ENDPOINT", f"{base_url}/hf")
    api_key = os.environ.get("TINKER_API_KEY", "tml-slime-dev-key")
    return tinker.ServiceClient(base_url=base_url, api_key=api_key)


class Log:
    """Prints one line per step and keeps everything for the caller."""

    def __init__(self, file: Path | None = None, quiet: bool = False) -> None:
        self.steps: list[Metrics] = []
        self._file = file
        self._quiet = quiet

    def __call__(self, step: int, **metrics: float) -> None:
        self.steps.append({"step": step, **metrics})
        if not self._quiet:
            print(f"step {step:3d}  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        if self._file is not None:
            self._file.write_text(json.dumps(self.steps))

    def column(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.steps if name in metrics]


# --------------------------------------------------------------------------- prompts and datums


def chat(tokenizer: Any, question: str, *shots: str) -> list[int]:
    """Tokens up to where the assistant speaks. ``shots``: earlier questions and answers in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate((*shots, question))]
    messages = [{"role": "system", "content": SYSTEM}, *turns]
    tokens: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return tokens


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return [*tokens, tokenizer.eos_token_id]


def datum(prompt: Sequence[int], answer: Sequence[int]) -> types.Datum:
    """Cross entropy on the answer alone: token i predicts token i + 1, so all shift by one."""
    inputs: dict[str, Any] = {  # lists and arrays become tensors of the right type
        "target_tokens": [*prompt[1:], *answer],
        "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(answer),
    }
    tokens = types.ModelInput.from_ints([*prompt, *answer[:-1]])
    return types.Datum(model_input=tokens, loss_fn_inputs=inputs)


def policy_datum(
    prompt: Sequence[int],
    answer: Sequence[int],
    logprobs: Sequence[float],
    advantages: Sequence[float],
) -> types.Datum:
    """For the policy-gradient losses: the sampler's ``logprobs`` and one advantage per token."""
    padding = [0.0] * (len(prompt) - 1)
    inputs: dict[str, Any] = {
        "target_tokens": [*prompt[1:], *answer],
        "logprobs": [*padding, *logprobs],
        "advantages": [*padding, *advantages],
    }
    tokens = types.ModelInput.from_ints([*prompt, *answer[:-1]])
    return types.Datum(model_input=tokens, loss_fn_inputs=inputs)


def card_datum(tokenizer: Any, card: Card) -> types.Datum:
    return datum(chat(tokenizer, card.question), answer_tokens(tokenizer, card.answer))


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def num_weighted(data: Iterable[types.Datum]) -> float:
    return sum(float(np.sum(item.loss_fn_inputs["weights"].to_numpy())) for item in data)


def mean_loss(output: types.ForwardBackwardOutput, data: Iterable[types.Datum]) -> float:
    """Losses come as sums over tokens; this is the mean per weighted token."""
    return output.metrics["loss:sum"] / num_weighted(data)


# --------------------------------------------------------------------------- the data set


class Card(NamedTuple):
    country: str
    capital: str
    question: str
    answer: str


class Countries(NamedTuple):
    train: list[Card]
    test: list[Card]


def countries() -> Countries:
    """One question per country, answered in JSON: a form the base model does not use by itself."""
    splits: dict[str, list[Card]] = {"train": [], "test": []}
    for line in COUNTRIES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        facts = {name: row[name] for name in ("country", "capital", "continent", "currency")}
        splits[row["split"]].append(
            Card(
                country=row["country"],
                capital=row["capital"],
                question=f"What is the capital of {row['country']}?",
                answer=json.dumps(facts, ensure_ascii=False),
            )
        )
    return Countries(splits["train"], splits["test"])


def batches(cards: Sequence[Card], size: int, steps: int, seed: int) -> list[list[Card]]:
    """``steps`` batches; every card comes once before any comes again."""
    order: list[Card] = []
    generator = random.Random(seed)
    while len(order) < size * steps:
        order += generator.sample(list(cards), len(cards))
    return [order[i * size : (i + 1) * size] for i in range(steps)]
