"""A loss of your own: focal loss, written in torch on this side, trained on that side.

    python -m examples.custom_loss --steps 12

``forward_backward_custom`` asks the server for logprobs, differentiates your function here and
sends the derivative back, so any function of the logprobs can be trained. The first line proves it:
with gamma = 0 the focal loss is cross entropy, and the server's own cross entropy agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tinker import types

from examples import common

CustomLoss = Callable[
    [list[types.Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]
]


def focal_loss(gamma: float) -> CustomLoss:
    """``-(1 - p)^gamma * log p``: tokens that are already likely count less (Lin et al. 2017)."""

    def loss(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        total = torch.zeros(())
        probability = 0.0
        for item, values in zip(data, logprobs, strict=True):
            weights = item.loss_fn_inputs["weights"].to_torch()
            likely = values.exp()
            total = total - (weights * (1 - likely) ** gamma * values).sum()
            probability += float((weights * likely).sum().detach())
        return total, {"probability:mean": probability / common.num_weighted(data)}

    return loss


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=12)
    arguments.add_argument("--gamma", type=float, default=2.0, help="0 is cross entropy")
    arguments.add_argument("--batch", type=int, default=8, help="countries per step")
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, _ = common.countries()
    with common.connect() as service:
        trainer = service.create_lora_training_client(
            options.model, rank=16, seed=options.seed
        ).result()
        tokenizer = trainer.get_tokenizer()
        schedule = common.batches(train, options.batch, options.steps + 1, options.seed)

        data = [common.card_datum(tokenizer, card) for card in schedule[0]]
        built_in = trainer.forward(data, "cross_entropy").result()
        custom = trainer.forward_backward_custom(data, focal_loss(gamma=0.0)).result()
        log(
            0,
            cross_entropy=built_in.metrics["loss:sum"],
            focal_with_gamma_0=custom.metrics["loss:sum"],
        )
        # Gradients add up until a step uses them; a rate of zero throws these away.
        trainer.optim_step(types.AdamParams(learning_rate=0.0)).result()

        for step, batch in enumerate(schedule[1:], start=1):
            data = [common.card_datum(tokenizer, card) for card in batch]
            output = trainer.forward_backward_custom(data, focal_loss(options.gamma))
            trainer.optim_step(types.AdamParams(learning_rate=options.learning_rate)).result()
            metrics = output.result().metrics
            log(
                step,
                focal_loss=metrics["loss:sum"] / common.num_weighted(data),
                probability=metrics["probability:mean"],
            )
    return log


if __name__ == "__main__":
    main()
