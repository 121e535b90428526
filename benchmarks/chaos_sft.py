"""A supervised training through the SDK that writes down every number it hears.

    TINKER_BASE_URL=... python -m benchmarks.chaos_sft results.jsonl --model NAME

Nothing in it is random but by a fixed seed, so two runs on one machine must write the same lines.
Steps are submitted ahead of their results; some accumulate gradients, some are followed by an
evaluation or a checkpoint, and in the middle the training goes back to one.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Callable

import tinker
from tinker import types

from benchmarks.chaos_record import IN_FLIGHT, Record, next_token_datum, parser_of

NUM_TOKENS = 500
"""Below the vocabulary of every model that this is run on."""

Settle = Callable[[], None]
"""Waits for a result and writes it down."""


class Training:
    def __init__(
        self, trainer: tinker.TrainingClient, record: Record, options: argparse.Namespace
    ) -> None:
        self._trainer = trainer
        self._record = record
        self._options = options
        self._random = random.Random(1)
        self._waiting: deque[list[Settle]] = deque()

    def run(self) -> str:
        """Returns the path of the final state."""
        steps = self._options.steps
        for step in range(steps):
            submitted = self._submit(step)
            self._waiting.append(submitted)
            if len(self._waiting) >= IN_FLIGHT:
                self._settle_oldest()
            if step == steps // 2:
                self._go_back(step)
        self._settle_all()
        final = self._trainer.save_state("final").result().path
        self._record.path("final state", final)
        weights = self._trainer.save_weights_for_sampler("final").result().path
        self._record.path("final weights", weights)
        return final

    def go_on(self, num_steps: int) -> None:
        for step in range(num_steps):
            self._waiting.append(self._submit(2000 + step))
        self._settle_all()

    def _submit(self, step: int) -> list[Settle]:
        """One or two passes and a step; every fourth time a checkpoint, every fifth a look."""
        num_passes = 2 if step % 3 == 2 else 1
        settles = [self._pass(f"step {step}.{part}") for part in range(num_passes)]
        # No two steps share a learning rate: one left out or taken twice changes the weights.
        rate = types.AdamParams(learning_rate=1e-3 * (1 + step % 7), weight_decay=0.01)
        optimized = self._trainer.optim_step(rate)
        settles.append(lambda: self._record.step(f"step {step} optim", optimized.result()))
        if step % 5 == 4:
            looked = self._trainer.forward(self._batch(), "cross_entropy")
            settles.append(lambda: self._record.training(f"step {step} look", looked.result()))
        if step % 4 == 3:
            saved = self._trainer.save_state(f"step-{step}")
            settles.append(lambda: self._record.path(f"step {step} saved", saved.result().path))
        return settles

    def _pass(self, name: str) -> Settle:
        output = self._trainer.forward_backward(self._batch(), "cross_entropy")
        return lambda: self._record.training(name, output.result())

    def _batch(self) -> list[types.Datum]:
        draw = self._random
        lengths = [draw.randint(3, self._options.length) for _ in range(self._options.batch)]
        return [
            next_token_datum([draw.randrange(NUM_TOKENS) for _ in range(length)])
            for length in lengths
        ]

    def _go_back(self, step: int) -> None:
        """To a checkpoint of this moment, two steps later; without its moments: a new start."""
        path = self._trainer.save_state(f"middle-{step}").result().path
        for more in range(2):
            self._waiting.append(self._submit(1000 + more))
        loaded = self._trainer.load_state(path)
        self._waiting.append([lambda: self._record.path("back", loaded.result().path or "")])

    def _settle_oldest(self) -> None:
        for settle in self._waiting.popleft():
            settle()

    def _settle_all(self) -> None:
        while self._waiting:
            self._settle_oldest()


def main() -> None:
    options = parser_of(__doc__).parse_args()
    record = Record(options.results)
    with tinker.ServiceClient(user_metadata={"workload": "sft"}) as service:
        trainer = service.create_lora_training_client(
            options.model, rank=options.rank, seed=11
        ).result()
        final = Training(trainer, record, options).run()
        second = service.create_training_client_from_state_with_optimizer(final).result()
        Training(second, record, options).go_on(2)
        service.close("success").result()
    record("end")


if __name__ == "__main__":
    main()
