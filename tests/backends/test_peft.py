"""An exported adapter means the same to transformers + PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.backends.conftest import local_config
from tests.backends.harness import datum, op, request, unit
from tests.backends.steps import written
from tests.backends.tiny import VOCAB_SIZE, write_tiny_mixtral
from training.backends.base import AdamParams, Datum, Float32Array, LoraSpec
from training.backends.local import LocalBackend
from training.config import ModelConfig

GROUPS = {
    "all": {},
    "attn": {"train_mlp": False, "train_unembed": False},
    "mlp": {"train_attn": False, "train_unembed": False},
    "unembed": {"train_attn": False, "train_mlp": False},
}


def peft_logprobs(model: Path, adapter: Path, data: list[Datum]) -> list[Float32Array]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    found = []
    for each in data:
        with torch.no_grad():
            logits = adapted(torch.from_numpy(each.tokens).long()[None]).logits[0]
        logprobs = torch.log_softmax(logits.double(), -1)
        found.append(logprobs[torch.arange(len(each.targets)), each.targets].float().numpy())
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("groups", GROUPS)
async def test_exports_give_the_same_logprobs_in_peft(
    tiny_llama: Path, tmp_path: Path, groups: str
) -> None:
    await assert_exports_equal_peft(tiny_llama, tmp_path, LoraSpec(4, 1, **GROUPS[groups]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
async def test_a_model_that_runs_as_modules_of_transformers(tmp_path: Path) -> None:
    model = write_tiny_mixtral(tmp_path / "model")
    await assert_exports_equal_peft(model, tmp_path, LoraSpec(4, 1))


async def assert_exports_equal_peft(model: Path, tmp_path: Path, spec: LoraSpec) -> None:
    """float32: the trainer and the sampler within 1e-4 of PEFT, after training visibly."""
    backend = LocalBackend(ModelConfig(name="tests/tiny", path=model), local_config())
    await backend.start()
    try:
        data = [datum(VOCAB_SIZE, length, length) for length in (40, 3, 90)]
        await backend.load_slot(0, spec)
        before = await backend.forward(unit(op(0, *data)))
        for _ in range(3):
            await backend.forward_backward(unit(op(0, *data)))
            await backend.optim_step({0: AdamParams(learning_rate=2e-2)})
        after = await backend.forward(unit(op(0, *data)))
        await written(backend.export_adapter(0, tmp_path / "adapter"))
        await backend.publish("exported", tmp_path / "adapter")
        prompt = [int(token) for token in [*data[0].tokens, data[0].targets[-1]]]
        scored = await backend.sample(
            request(prompt, snapshot_id="exported", max_tokens=0, prompt_logprobs=True)
        )
    finally:
        await backend.close()
    expected = peft_logprobs(model, tmp_path / "adapter", data)
    for found, reference in zip(after[0].logprobs, expected, strict=True):
        np.testing.assert_allclose(found, reference, atol=1e-4)
    assert scored.prompt_logprobs is not None
    np.testing.assert_allclose(scored.prompt_logprobs[1:], expected[0], atol=1e-4)
    assert np.abs(before[0].logprobs[0] - after[0].logprobs[0]).max() > 0.1
