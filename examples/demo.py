"""Fine-tunes the model of a running server in about a minute and shows what changed.

    python -m examples.demo

Server and key come from TINKER_BASE_URL and TINKER_API_KEY.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import APIFuture, SamplingClient, TrainingClient, types

from examples import common

SHOWN = ("Japan", "Thailand", "Vietnam")
"""Held-out countries whose cards are asked for before and after."""
MAX_TOKENS = 32


class Pending(NamedTuple):
    """A step the server is still busy with."""

    data: list[types.Datum]
    loss: APIFuture[types.ForwardBackwardOutput]
    update: APIFuture[types.OptimStepResponse]


class Result(NamedTuple):
    losses: list[float]
    held_out_before: float
    held_out_after: float
    replies_before: list[str]
    replies_after: list[str]
    seconds: float


def replies(sampler: SamplingClient, tokenizer: Any, cards: Sequence[common.Card]) -> list[str]:
    """One greedy reply per card, all asked for at once."""
    params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    waiting = [
        sampler.sample(types.ModelInput.from_ints(common.chat(tokenizer, card.question)), 1, params)
        for card in cards
    ]
    return [
        common.decode(tokenizer, future.result().sequences[0].tokens).strip() for future in waiting
    ]


def held_out_loss(trainer: TrainingClient, data: list[types.Datum]) -> float:
    return common.mean_loss(trainer.forward(data, "cross_entropy").result(), data)


def train(
    trainer: TrainingClient,
    schedule: Sequence[list[types.Datum]],
    learning_rate: float,
    console: Console,
) -> list[float]:
    """One optimizer step per batch. The next step is sent before the last one is waited for, so
    the server always has work."""
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training  loss   ...", total=len(schedule))

        def finish(pending: Pending) -> None:
            losses.append(common.mean_loss(pending.loss.result(), pending.data))
            pending.update.result()
            progress.update(task, advance=1, description=f"training  loss {losses[-1]:6.3f}")

        waiting: Pending | None = None
        for step, data in enumerate(schedule):
            rate = learning_rate * (1 - step / len(schedule))
            loss = trainer.forward_backward(data, "cross_entropy")
            update = trainer.optim_step(types.AdamParams(learning_rate=rate))
            if waiting is not None:
                finish(waiting)
            waiting = Pending(data, loss, update)
        if waiting is not None:
            finish(waiting)
    return losses


def run(options: Any, console: Console) -> Result:
    train_cards, test_cards = common.countries()
    shown = [card for card in test_cards if card.country in SHOWN]
    started = time.perf_counter()
    with common.connect() as service:
        console.print(f"Creating a LoRA adapter of rank {options.rank} on {options.model}")
        trainer = service.create_lora_training_client(
            options.model, rank=options.rank, seed=options.seed
        ).result()
        tokenizer = trainer.get_tokenizer()
        test = [common.card_datum(tokenizer, card) for card in test_cards]
        schedule = [
            [common.card_datum(tokenizer, card) for card in batch]
            for batch in common.batches(train_cards, options.batch, options.steps, options.seed)
        ]
        base = service.create_sampling_client(base_model=options.model).result()
        replies_before = replies(base, tokenizer, shown)
        before = held_out_loss(trainer, test)
        losses = train(trainer, schedule, options.learning_rate, console)
        after = held_out_loss(trainer, test)
        tuned = trainer.save_weights_and_get_sampling_client().result()
        replies_after = replies(tuned, tokenizer, shown)
    seconds = time.perf_counter() - started
    return Result(losses, before, after, replies_before, replies_after, seconds)


def show(result: Result, console: Console) -> None:
    _, test = common.countries()
    shown = [card for card in test if card.country in SHOWN]
    table = Table(title="Countries it never saw in training", show_lines=True)
    for column in ("asked", "before", "after", "right answer"):
        table.add_column(column, overflow="fold")
    for card, before, after in zip(shown, result.replies_before, result.replies_after, strict=True):
        table.add_row(card.country, before.replace("\n", " "), after, card.answer)
    console.print(table)
    if result.losses:
        console.print(f"training loss  {result.losses[0]:.3f} -> {result.losses[-1]:.3f}")
    console.print(f"held-out loss  {result.held_out_before:.3f} -> {result.held_out_after:.3f}")
    console.print(f"time           {result.seconds:.0f} s")
    console.print(
        "\nThat was the official tinker SDK. The same in 15 lines: examples/quickstart.py"
    )


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=25)
    arguments.add_argument("--batch", type=int, default=12, help="countries per step")
    arguments.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    options = arguments.parse_args(argv)
    console = Console()
    result = run(options, console)
    show(result, console)
    log = common.Log(options.json, quiet=True)
    for step, loss in enumerate(result.losses):
        log(step, loss=loss)
    log(options.steps, held_out_before=result.held_out_before, held_out_after=result.held_out_after)
    return log


if __name__ == "__main__":
    main()
