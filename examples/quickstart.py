import tinker

service = tinker.ServiceClient()  # TINKER_BASE_URL and TINKER_API_KEY say where
trainer = service.create_lora_training_client("HuggingFaceTB/SmolLM2-135M-Instruct").result()
tokenizer = trainer.get_tokenizer()
tokens = tokenizer.encode("The owl of Minerva spreads its wings only at dusk.")
target = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=target)
for step in range(8):
    loss = trainer.forward_backward([datum], "cross_entropy")
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-3))
    print(step, loss.result().metrics["loss:sum"])
sampler = trainer.save_weights_and_get_sampling_client().result()
params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
reply = sampler.sample(tinker.ModelInput.from_ints(tokens[:3]), 1, params).result()
print(tokenizer.decode(tokens[:3] + reply.sequences[0].tokens))
