"""A reinforcement learning through the SDK that writes down every number it hears.

    TINKER_BASE_URL=... python -m benchmarks.chaos_rl results.jsonl --model NAME

Each step samples groups from the newest weights (all requests in flight together, with seeds),
rewards them by a pure function, asks the trainer for the same logprobs, and improves. Two runs on
one machine must write the same lines.
"""

from __future__ import annotations

import argparse
import random
from typing import Any, NamedTuple

import numpy as np
import tinker
from tinker import types

from benchmarks.chaos_record import Record, digest, next_token_datum, parser_of

GROUP = 3
LOSSES: tuple[types.LossFnType, ...] = ("importance_sampling", "ppo")
NUM_TOKENS = 500
CLOSE_NATS = 0.5
"""Sampler and trainer: equal to the bit with our kernels, within rounding otherwise. Weights of
another step are further apart."""


class Sample(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def rollouts(
    sampler: tinker.SamplingClient, step: int, options: argparse.Namespace
) -> list[list[Sample]]:
    """A group of samples for each question of this step."""
    draw = random.Random(step)
    prompts = [
        [draw.randrange(NUM_TOKENS) for _ in range(draw.randint(3, options.length))]
        for _ in range(options.batch)
    ]
    waiting = []
    for number, prompt in enumerate(prompts):
        params = types.SamplingParams(
            max_tokens=max(4, options.length // 2),
            temperature=1.0,
            seed=1000 * step + number,
            stop=[],
        )
        waiting.append(sampler.sample(types.ModelInput.from_ints(prompt), GROUP, params))
    return [
        [
            Sample(prompt, each.tokens, list(each.logprobs or []))
            for each in future.result().sequences
        ]
        for prompt, future in zip(prompts, waiting, strict=True)
    ]


def advantages(group: list[Sample]) -> np.ndarray[Any, Any]:
    """Of the share of even tokens, against the group's mean."""
    rewards = np.array([np.mean([token % 2 == 0 for token in each.tokens]) for each in group])
    centred: np.ndarray[Any, Any] = rewards - rewards.mean()
    return centred


def policy_datum(sample: Sample, advantage: float) -> types.Datum:
    """Only what was sampled counts; the prompt has logprobs and advantages of zero."""
    tokens = [*sample.prompt, *sample.tokens]
    before = len(sample.prompt) - 1
    inputs: dict[str, Any] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "logprobs": np.array([0.0] * before + sample.logprobs, np.float32),
        "advantages": np.array([0.0] * before + [advantage] * len(sample.tokens), np.float32),
    }
    prompt = types.ModelInput.from_ints(tokens[:-1])
    return types.Datum(model_input=prompt, loss_fn_inputs=inputs)


def check(samples: list[Sample], known: types.ForwardBackwardOutput) -> float:
    """The largest difference of sampler and trainer, in nats."""
    worst = 0.0
    for sample, output in zip(samples, known.loss_fn_outputs, strict=True):
        trained = output["logprobs"].to_numpy()[-len(sample.tokens) :]
        worst = max(worst, float(np.abs(trained - np.array(sample.logprobs, np.float32)).max()))
    if worst > CLOSE_NATS:
        raise SystemExit(f"sampler and trainer are {worst} nats apart")
    return worst


def improve(
    trainer: tinker.TrainingClient, record: Record, step: int, options: argparse.Namespace
) -> None:
    sampler = trainer.save_weights_and_get_sampling_client().result()
    groups = rollouts(sampler, step, options)
    samples = [sample for group in groups for sample in group]
    for number, sample in enumerate(samples):
        record(f"step {step} sample {number}", tokens=sample.tokens, logprobs=sample.logprobs)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(samples[0].prompt)).result()
    record(f"step {step} scored", logprobs=digest(np.array(scored, np.float64)))
    known = trainer.forward(
        [next_token_datum([*each.prompt, *each.tokens]) for each in samples], "cross_entropy"
    )
    data = [
        policy_datum(sample, float(advantage))
        for group in groups
        for sample, advantage in zip(group, advantages(group), strict=True)
    ]
    learned = trainer.forward_backward(data, LOSSES[step % 2])
    optimized = trainer.optim_step(types.AdamParams(learning_rate=2e-3 * (1 + step % 3)))
    record.training(f"step {step} known", known.result())
    record(f"step {step} apart", nats=check(samples, known.result()))
    record.training(f"step {step} learned", learned.result())
    record.step(f"step {step} optim", optimized.result())
    if step % 4 == 3:
        record.path(f"step {step} saved", trainer.save_state(f"step-{step}").result().path)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    record = Record(options.results)
    with tinker.ServiceClient(user_metadata={"workload": "rl"}) as service:
        trainer = service.create_lora_training_client(
            options.model, rank=options.rank, seed=12
        ).result()
        for step in range(options.steps):
            improve(trainer, record, step, options)
        record.path("final state", trainer.save_state("final").result().path)
        record.path("final weights", trainer.save_weights_for_sampler("final").result().path)
        service.close("success").result()
    record("end")


if __name__ == "__main__":
    main()
