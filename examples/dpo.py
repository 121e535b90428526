"""Direct preference optimisation: prefer the short answer to the chatty one, no reward model.

    python -m examples.dpo --steps 12

The loss is computed here, on logprobs the server returns, and its gradient is sent back
(``forward_backward_custom``). A second adapter is never trained: it is the reference, and since a
fresh adapter changes nothing, it equals the policy at first, so the first loss is ln 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tinker import types
from torch.nn.functional import logsigmoid

from examples import common


def pairs(tokenizer: Any, cards: Sequence[common.Card]) -> list[types.Datum]:
    """Chosen and rejected answer of each card, in turn; weights mark the tokens of the answer."""
    data = []
    for card in cards:
        prompt = common.chat(tokenizer, card.question)
        rejected = f"That is a great question! The capital of {card.country} is {card.capital}."
        data += [
            common.datum(prompt, common.answer_tokens(tokenizer, answer))
            for answer in (card.capital, rejected)
        ]
    return data


def answer_logprobs(data: Sequence[types.Datum], logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logprob of each whole answer, as pairs [P, 2]: chosen, rejected."""
    sums = [
        (item.loss_fn_inputs["weights"].to_torch() * values).sum()
        for item, values in zip(data, logprobs, strict=True)
    ]
    return torch.stack(sums).reshape(-1, 2)


def margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much more than the reference the policy prefers the chosen answer; [P]."""
    gain = policy - reference
    return gain[:, 0] - gain[:, 1]


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=12)
    arguments.add_argument("--pairs", type=int, default=8, help="per step")
    arguments.add_argument("--beta", type=float, default=0.1, help="strength of the reference")
    arguments.add_argument("--learning-rate", type=float, default=1e-4)
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, test = common.countries()
    with common.connect() as service:
        creating = [
            service.create_lora_training_client(options.model, rank=rank, seed=options.seed)
            for rank in (16, 1)
        ]
        policy, reference = (future.result() for future in creating)
        tokenizer = policy.get_tokenizer()

        def logprobs_of(client: Any, data: list[types.Datum]) -> torch.Tensor:
            output = client.forward(data, "cross_entropy").result()
            return answer_logprobs(
                data, [item["logprobs"].to_torch() for item in output.loss_fn_outputs]
            )

        for step, batch in enumerate(
            common.batches(train, options.pairs, options.steps, options.seed)
        ):
            data = pairs(tokenizer, batch)
            frozen = logprobs_of(reference, data)

            def dpo(
                data: list[types.Datum],
                logprobs: list[torch.Tensor],
                frozen: torch.Tensor = frozen,
            ) -> tuple[torch.Tensor, dict[str, float]]:
                margin = margins(answer_logprobs(data, logprobs), frozen)
                loss = -logsigmoid(options.beta * margin).mean()
                return loss, {"accuracy:mean": (margin > 0).float().mean().item()}

            output = policy.forward_backward_custom(data, dpo)
            policy.optim_step(types.AdamParams(learning_rate=options.learning_rate)).result()
            metrics = output.result().metrics
            log(step, loss=metrics["loss:sum"], accuracy=metrics["accuracy:mean"])

        held_out = pairs(tokenizer, test)
        margin = margins(logprobs_of(policy, held_out), logprobs_of(reference, held_out))
        log(
            options.steps,
            held_out_accuracy=(margin > 0).float().mean().item(),
            held_out_margin=margin.mean().item(),
        )
    return log


if __name__ == "__main__":
    main()
