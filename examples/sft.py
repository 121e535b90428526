"""Supervised fine-tuning: learn facts and a fixed answer form, watch the held-out loss.

    python -m examples.sft --steps 30

The loss of 24 countries that are never trained on falls too: the form carries over, and what the
model knows of them finds its place in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinker import types

from examples import common


def main(argv: Sequence[str] | None = None) -> common.Log:
    arguments = common.parser(__doc__, steps=30)
    arguments.add_argument("--batch", type=int, default=12, help="countries per step")
    arguments.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    arguments.add_argument("--eval-every", type=int, default=10, help="steps between evaluations")
    options = arguments.parse_args(argv)

    log = common.Log(options.json)
    train, test = common.countries()
    with common.connect() as service:
        trainer = service.create_lora_training_client(
            options.model, rank=options.rank, seed=options.seed
        ).result()
        tokenizer = trainer.get_tokenizer()
        held_out = [common.card_datum(tokenizer, card) for card in test]

        for step, batch in enumerate(
            common.batches(train, options.batch, options.steps, options.seed)
        ):
            if step % options.eval_every == 0:
                output = trainer.forward(held_out, "cross_entropy").result()
                log(step, held_out_loss=common.mean_loss(output, held_out))

            # Ask for both before waiting for either: the server never idles between them.
            data = [common.card_datum(tokenizer, card) for card in batch]
            loss = trainer.forward_backward(data, "cross_entropy")
            rate = options.learning_rate * (1 - step / options.steps)
            update = trainer.optim_step(types.AdamParams(learning_rate=rate))
            update.result()
            log(step, loss=common.mean_loss(loss.result(), data), learning_rate=rate)

        output = trainer.forward(held_out, "cross_entropy").result()
        log(options.steps, held_out_loss=common.mean_loss(output, held_out))

        # A sampler checkpoint holds the adapter alone; its path works in any later session.
        saved = trainer.save_weights_for_sampler("countries").result()
        sampler = service.create_sampling_client(model_path=saved.path).result()
        greedy = types.SamplingParams(max_tokens=32, temperature=0.0)
        for card in test[:3]:
            prompt = types.ModelInput.from_ints(common.chat(tokenizer, card.question))
            reply = sampler.sample(prompt, num_samples=1, sampling_params=greedy).result()
            print(f"{card.country}: {common.decode(tokenizer, reply.sequences[0].tokens)}")
        print(f"saved as {saved.path}")
    return log


if __name__ == "__main__":
    main()
