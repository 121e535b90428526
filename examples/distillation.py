"""On-policy distillation: a student learns from a teacher's opinion of the student's own words.

    python -m examples.distillation --steps 15

The teacher is the base model with solved questions in its prompt, so it knows the form of answer
that is wanted; the student has to do without them. The student answers, the teacher scores each
token of that answer, and the difference of their logprobs becomes the token's advantage: this
minimises the reverse KL divergence, measured on what the student really says. The teacher could as
well be any checkpoint: give its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tinker import SamplingClient, types

from examples import common

Answer = tuple[common.Card, types.SampledSequence]


def student_answers(
    student: SamplingClient, tokenizer: Any, cards: Sequence[common.Card], seed: int
) -> list[Answer]:
    """Two answers to every question, sampled from the student's own distribution."""
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=seed)
    waiting = [
        student.sample(types.ModelInput.from_ints(common.chat(tokenizer, card.question)), 2, params)
        for card in cards
    ]
    return [
        (card, sequence)
        for card, future in zip(cards, waiting, strict=True)
        for sequence in future.result().sequences
    ]


def distillation_data(
    teacher: SamplingClient, tokenizer: Any, answers: Sequence[Answer], shots: Sequence[str]
) -> tuple[list[types.Datum], float]:
    """Datums with the advantage log(teacher / student) per token, and the mean reverse KL."""
    waiting = [
        teacher.compute_logprobs(
            types.ModelInput.from_ints(
                [*common.chat(tokenizer, card.question, *shots), *answer.tokens]
            )
        )
        for card, answer in answers
    ]
    data, divergences = [], []
    for (card, answer), future in zip(answers, waiting, strict=True):
        assert answer.logprobs is not None
        scored = future.result()[-len(answer.tokens) :]
        gaps = np.array(scored, dtype=np.float32) - np.array(answer.logprobs)
        divergences.extend(-gaps)
        prompt = common.chat(tokenizer, card.question)
        data.append(common.policy_datum(prompt, answer.tokens, answer.logprobs, gaps.tolist()))
    return data, float(np.mean(divergences))


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=15)
    arguments.add_argument("--teacher-path", help="tinker:// path; default: the base model")
    arguments.add_argument("--prompts", type=int, default=16, help="per step")
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, test = common.countries()
    shots = [text for card in train[:3] for text in (card.question, card.capital)]
    with common.connect() as service:
        teacher = service.create_sampling_client(
            model_path=options.teacher_path, base_model=options.model
        ).result()
        trainer = service.create_lora_training_client(
            options.model, rank=16, seed=options.seed
        ).result()
        tokenizer: Any = trainer.get_tokenizer()
        schedule = common.batches(train[3:], options.prompts, options.steps, options.seed)
        for step, batch in enumerate([*schedule, test]):
            student = trainer.save_weights_and_get_sampling_client().result()
            answers = student_answers(student, tokenizer, batch, seed=step)
            data, divergence = distillation_data(teacher, tokenizer, answers, shots)
            if step == options.steps:
                log(step, held_out_reverse_kl=divergence)
                break
            log(step, reverse_kl=divergence)
            trainer.forward_backward(data, "importance_sampling")
            trainer.optim_step(types.AdamParams(learning_rate=options.learning_rate)).result()
        for card, answer in answers[:4]:
            print(f"{card.question} {common.decode(tokenizer, answer.tokens)}")
    return log


if __name__ == "__main__":
    main()
