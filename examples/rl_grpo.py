"""Reinforcement learning in the style of GRPO: the model teaches itself to add.

    python -m examples.rl_grpo --steps 20

The reward is checked, not learned: 1 for a reply that is exactly the sum, else 0. Each step samples
a group of replies per question, compares every reply with its group, and moves the model towards
those above average. About one reply in eight is right at first, most are after 20 steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tinker import SamplingClient, types

from examples import common

SHOT = ("What is 2 + 2?", "4")
"""One solved question in the prompt: without any right answer there is nothing to reinforce."""


class Question(NamedTuple):
    text: str
    answer: str


class Rollout(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    reward: float


def questions(seed: int) -> tuple[list[Question], list[Question]]:
    """Sums of two digits, for training and held out."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(seed).shuffle(pairs)
    cards = [Question(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    return cards[16:], cards[:16]


def rollouts(
    sampler: SamplingClient, tokenizer: Any, batch: Sequence[Question], group: int, seed: int
) -> list[list[Rollout]]:
    """``group`` replies to each question; all requests are in flight together."""
    prompts = [common.chat(tokenizer, question.text, *SHOT) for question in batch]
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=seed)
    waiting = [
        sampler.sample(types.ModelInput.from_ints(prompt), group, params) for prompt in prompts
    ]
    groups = []
    for question, prompt, future in zip(batch, prompts, waiting, strict=True):
        replies = []
        for sequence in future.result().sequences:
            text = common.decode(tokenizer, sequence.tokens)
            reward = float(text.strip() == question.answer)
            assert sequence.logprobs is not None
            replies.append(Rollout(prompt, sequence.tokens, sequence.logprobs, reward))
        groups.append(replies)
    return groups


def policy_data(groups: Sequence[Sequence[Rollout]]) -> list[types.Datum]:
    """Advantage = (reward - group mean) / group deviation, the same for every token of a reply.

    A group whose replies are all right, or all wrong, says nothing and is left out.
    """
    data = []
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group])
        if rewards.std() == 0:
            continue
        advantages = (rewards - rewards.mean()) / rewards.std()
        for rollout, advantage in zip(group, advantages, strict=True):
            per_token = [float(advantage)] * len(rollout.tokens)
            data.append(
                common.policy_datum(rollout.prompt, rollout.tokens, rollout.logprobs, per_token)
            )
    return data


def mean_reward(groups: Sequence[Sequence[Rollout]]) -> float:
    return float(np.mean([rollout.reward for group in groups for rollout in group]))


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=20)
    arguments.add_argument("--questions", type=int, default=8, help="per step")
    arguments.add_argument("--group", type=int, default=8, help="replies per question")
    arguments.add_argument("--loss", choices=("importance_sampling", "ppo"), default="ppo")
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, test = questions(options.seed)
    generator = random.Random(options.seed)
    with common.connect() as service:
        trainer = service.create_lora_training_client(
            options.model, rank=16, seed=options.seed
        ).result()
        tokenizer = trainer.get_tokenizer()
        for step in range(options.steps + 1):
            # On policy: every step samples from the weights it is about to improve.
            sampler = trainer.save_weights_and_get_sampling_client().result()
            if step in (0, options.steps):
                exam = rollouts(sampler, tokenizer, test, 4, seed=options.seed)
                log(step, held_out_reward=mean_reward(exam))
            if step == options.steps:
                break
            batch = generator.sample(train, options.questions)
            groups = rollouts(sampler, tokenizer, batch, options.group, seed=step)
            log(step, reward=mean_reward(groups))
            if data := policy_data(groups):
                trainer.forward_backward(data, options.loss)
                trainer.optim_step(types.AdamParams(learning_rate=options.learning_rate)).result()
    return log


if __name__ == "__main__":
    main()
