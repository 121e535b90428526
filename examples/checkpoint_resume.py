"""Save in the middle, go on, then resume from the save: the losses are the same, bit for bit.

    python -m examples.checkpoint_resume --steps 4

A training checkpoint holds the adapter and the optimizer's moments. The resumed run is another
model of the same server; it could as well be another process, next week.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinker import TrainingClient, types

from examples import common


def train(
    trainer: TrainingClient, tokenizer: Any, schedule: Sequence[Sequence[common.Card]]
) -> list[float]:
    losses = []
    for batch in schedule:
        data = [common.card_datum(tokenizer, card) for card in batch]
        loss = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=5e-4)).result()
        losses.append(common.mean_loss(loss.result(), data))
    return losses


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=4)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    cards, _ = common.countries()
    schedule = common.batches(cards, 8, 2 * options.steps, options.seed)
    first, second = schedule[: options.steps], schedule[options.steps :]
    with common.connect() as service:
        trainer = service.create_lora_training_client(
            options.model, rank=8, seed=options.seed
        ).result()
        tokenizer = trainer.get_tokenizer()
        train(trainer, tokenizer, first)
        saved = trainer.save_state("halfway", overwrite=True).result()
        print(f"saved {saved.path}")
        uninterrupted = train(trainer, tokenizer, second)

        resumed_trainer = service.create_training_client_from_state_with_optimizer(
            saved.path
        ).result()
        resumed = train(resumed_trainer, tokenizer, second)

    for step, (one, other) in enumerate(zip(uninterrupted, resumed, strict=True)):
        log(options.steps + step, uninterrupted=one, resumed=other)
    print("identical" if uninterrupted == resumed else "DIFFERENT")
    return log


if __name__ == "__main__":
    main()
