"""vLLM in a process of its own, under its own interpreter: see ``setup_vllm``.

    PYTHON -m benchmarks.vllm_child MODEL --threads 2 [--adapters 32]

Offline ``LLM.generate``: no HTTP on its side. Adapters are rank 32 on all linears of the layers
(not the head, which ours have too), a different one for each request.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks.children import Answer, serve
from benchmarks.workload import PROMPT_TOKENS, RANK, token_rows


class Vllm:
    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch

    def functions(self) -> Mapping[str, Callable[..., Answer]]:
        from vllm import LLM  # type: ignore[import-not-found]

        more: dict[str, Any] = {}
        if num := self.options.adapters:
            for number in range(num):
                write_adapter(self.options.model, self.scratch / str(number), number)
            more = {"enable_lora": True, "max_loras": num, "max_lora_rank": RANK}
        self.llm = LLM(
            model=str(self.options.model),
            dtype="bfloat16",
            max_model_len=self.options.context,
            max_num_seqs=64,
            **more,
        )
        return {"generate": self.generate}

    def generate(
        self, requests: int, new_tokens: int, seed: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> Answer:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        rows = token_rows(requests, prompt_tokens, seed).tolist()
        params = SamplingParams(
            max_tokens=new_tokens, ignore_eos=True, temperature=1.0, detokenize=False
        )
        adapters = None
        if self.options.adapters:
            adapters = [
                LoRARequest(str(number), number + 1, str(self.scratch / str(number)))
                for number in range(requests)
            ]
        start = time.perf_counter()
        results = self.llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            params,
            use_tqdm=False,
            lora_request=adapters,
        )
        seconds = time.perf_counter() - start
        num_tokens = sum(len(result.outputs[0].token_ids) for result in results)
        return {"seconds": seconds, "num_tokens": num_tokens}


def write_adapter(model: Path, directory: Path, seed: int) -> None:
    """A PEFT adapter of small random numbers for a Llama of this configuration."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (num_out, num_in) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (RANK, num_in)), ("B", (num_out, RANK))):
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.01)
                tensors[f"{prefix}.lora_{part}.weight"] = values
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 32,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in shapes],
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=0, help="0: the base model alone")
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        serve(Vllm(options, Path(scratch)).functions)


if __name__ == "__main__":
    main()
