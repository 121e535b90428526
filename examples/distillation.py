"""On-policy distillation: a student learns from a teacher's opinion of the student's own words.

    python -m examples.distillation --steps 15

First a teacher is fine-tuned and saved. Then the student answers, the teacher scores each token of
the answer, and the difference of their logprobs becomes the token's advantage: this minimises the
reverse KL divergence, measured on what the student really says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tinker import SamplingClient, ServiceClient, types

from examples import common


def train_teacher(
    service: ServiceClient, model: str, cards: Sequence[common.Card], steps: int
) -> str:
    """Fine-tunes on the cards; returns the path of the saved sampler weights."""
    teacher = service.create_lora_training_client(model, rank=16, seed=1).result()
    tokenizer = teacher.get_tokenizer()
    for batch in common.batches(cards, 16, steps, seed=1):
        data = [common.card_datum(tokenizer, card) for card in batch]
        teacher.forward_backward(data, "cross_entropy")
        teacher.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return teacher.save_weights_for_sampler("teacher").result().path


def student_answers(
    student: SamplingClient, prompts: Sequence[list[int]], seed: int
) -> list[tuple[list[int], types.SampledSequence]]:
    params = types.SamplingParams(max_tokens=16, temperature=1.0, seed=seed)
    waiting = [student.sample(types.ModelInput.from_ints(p), 2, params) for p in prompts]
    return [
        (prompt, sequence)
        for prompt, future in zip(prompts, waiting, strict=True)
        for sequence in future.result().sequences
    ]


def distillation_data(
    teacher: SamplingClient, answers: Sequence[tuple[list[int], types.SampledSequence]]
) -> tuple[list[types.Datum], float]:
    """Datums with the advantage log(teacher / student) per token, and the mean reverse KL."""
    waiting = [
        teacher.compute_logprobs(types.ModelInput.from_ints([*prompt, *answer.tokens]))
        for prompt, answer in answers
    ]
    data, divergences = [], []
    for (prompt, answer), future in zip(answers, waiting, strict=True):
        assert answer.logprobs is not None
        scored = future.result()[len(prompt) :]
        gaps = np.array(scored, dtype=np.float32) - np.array(answer.logprobs)
        divergences.extend(-gaps)
        data.append(common.policy_datum(prompt, answer.tokens, answer.logprobs, gaps.tolist()))
    return data, float(np.mean(divergences))


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=15)
    arguments.add_argument("--teacher-steps", type=int, default=12)
    arguments.add_argument("--teacher-path", help="tinker:// path of a teacher already trained")
    arguments.add_argument("--prompts", type=int, default=16, help="per step")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, _ = common.countries()
    with common.connect() as service:
        path = options.teacher_path or train_teacher(
            service, options.model, train, options.teacher_steps
        )
        teacher = service.create_sampling_client(model_path=path).result()
        trainer = service.create_lora_training_client(
            options.model, rank=16, seed=options.seed
        ).result()
        tokenizer: Any = trainer.get_tokenizer()
        for step, batch in enumerate(
            common.batches(train, options.prompts, options.steps, options.seed)
        ):
            student = trainer.save_weights_and_get_sampling_client().result()
            prompts = [common.chat(tokenizer, card.question) for card in batch]
            answers = student_answers(student, prompts, seed=step)
            data, divergence = distillation_data(teacher, answers)
            log(step, reverse_kl=divergence)
            trainer.forward_backward(data, "importance_sampling")
            trainer.optim_step(types.AdamParams(learning_rate=options.learning_rate)).result()
        print("student:", common.decode(tokenizer, answers[0][1].tokens))
    return log


if __name__ == "__main__":
    main()
