"""How far the sampler's logprobs are from the trainer's, for the same tokens and weights.

    python -m benchmarks.numerics [--samples 16] [--dtype bfloat16 float32]

Starts a server on the embedded model for each dtype, trains an adapter for a few steps so that
LoRA products are part of it, samples with temperature 1, scores the same tokens with ``forward``,
and prints the differences. The rest of the differences is what DPO or importance sampling starts
with instead of zero.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from rich.console import Console
from rich.table import Table
from tinker import types
from transformers import AutoTokenizer

from examples.common import BASE_MODEL, card_datum, chat, countries
from tests.servers import running_server
from training.config import TrainingConfig
from training.models.registry import ensure_embedded_model

NUM_STEPS = 4
MAX_TOKENS = 64


def differences(
    base_url: str, api_key: str, tokenizer: Any, num_samples: int
) -> np.ndarray[Any, Any]:
    """|sampler - trainer| of every sampled token, in nats."""
    with tinker.ServiceClient(base_url=base_url, api_key=api_key) as service:
        trainer = service.create_lora_training_client(BASE_MODEL, rank=32, seed=1).result()
        cards = countries().train
        for step in range(NUM_STEPS):
            batch = [card_datum(tokenizer, card) for card in cards[step * 8 : step * 8 + 8]]
            trainer.forward_backward(batch, "cross_entropy")
            trainer.optim_step(types.AdamParams(learning_rate=1e-3))
        sampler = trainer.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=MAX_TOKENS, seed=7)
        prompts = [chat(tokenizer, card.question) for card in cards[:num_samples]]
        futures = [sampler.sample(types.ModelInput.from_ints(p), 1, params) for p in prompts]
        sequences = [future.result().sequences[0] for future in futures]
        data = [scoring_datum(p, list(s.tokens)) for p, s in zip(prompts, sequences, strict=True)]
        scored = trainer.forward(data, "cross_entropy").result().loss_fn_outputs
        found = []
        for prompt, sequence, output in zip(prompts, sequences, scored, strict=True):
            trained = np.asarray(output["logprobs"].data)[len(prompt) - 1 :]
            found.append(np.abs(np.asarray(sequence.logprobs) - trained))
        return np.concatenate(found)


def scoring_datum(prompt: list[int], answer: list[int]) -> types.Datum:
    inputs: dict[str, Any] = {
        "target_tokens": [*prompt[1:], *answer],
        "weights": [1.0] * (len(prompt) + len(answer) - 1),
    }
    tokens = types.ModelInput.from_ints([*prompt, *answer[:-1]])
    return types.Datum(model_input=tokens, loss_fn_inputs=inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    path = ensure_embedded_model(TrainingConfig())
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    table = Table(title="|sampler logprob - trainer logprob|, nats")
    for column in ("dtype", "tokens", "equal bits", "median", "mean", "largest"):
        table.add_column(column, justify="right")
    for dtype in arguments.dtype:
        settings = {
            "supported_models": [{"name": BASE_MODEL, "path": str(path.absolute())}],
            "engine": {"dtype": dtype},
        }
        with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), settings) as it:
            found = differences(it.base_url, it.api_key, tokenizer, arguments.samples)
        table.add_row(
            dtype,
            str(len(found)),
            f"{np.mean(found == 0):.0%}",
            f"{np.median(found):.2e}",
            f"{found.mean():.2e}",
            f"{found.max():.2e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
