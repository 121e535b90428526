"""What work costs at least, by counting: multiplications and bytes of a Llama with LoRA.

Only what the mathematics asks for: nothing computed twice, no padding, norms and softmax free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

BYTES = 2
"""Of a bfloat16 number."""


@dataclass(frozen=True)
class Costs:
    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @classmethod
    def of(cls, model: Path) -> Costs:
        config = json.loads((model / "config.json").read_text())
        return cls(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["vocab_size"],
        )

    @property
    def kv_size(self) -> int:
        return self.hidden // self.num_heads * self.num_kv_heads

    def layer_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linears of a layer."""
        hidden, inner = self.hidden, self.inner
        return [
            (hidden, hidden),
            *[(hidden, self.kv_size)] * 2,
            (hidden, hidden),
            *[(hidden, inner)] * 2,
            (inner, hidden),
        ]

    @property
    def num_weights(self) -> int:
        """Of all linears and the head: each is multiplied with once for a token."""
        layer = sum(num_in * num_out for num_in, num_out in self.layer_linears())
        return self.num_layers * layer + self.hidden * self.vocab_size

    def num_lora_weights(self, rank: int, with_head: bool = True) -> int:
        layer = sum(num_in + num_out for num_in, num_out in self.layer_linears())
        head = self.hidden + self.vocab_size if with_head else 0
        return rank * (self.num_layers * layer + head)

    def attention_flops(self, length: int) -> float:
        """Of all tokens of a causal sequence, forward: half of the square, scores and values."""
        return self.num_layers * 2 * 2 * self.hidden * length * (length + 1) / 2

    def train_flops_per_token(self, length: int, rank: int) -> float:
        """Forward and backward. A frozen weight has no gradient of its own: 2 products, a trained
        one 3; attention 3 (two for the derivative of each product)."""
        products = 2 * 2 * self.num_weights + 2 * 3 * self.num_lora_weights(rank)
        return products + 3 * self.attention_flops(length) / length

    def train_tokens_per_s(self, flops: float, length: int, rank: int) -> float:
        return flops / self.train_flops_per_token(length, rank)

    def prefill_s(self, flops: float, length: int) -> float:
        """The head is needed for one token only."""
        body = 2 * (self.num_weights - self.hidden * self.vocab_size) * length
        head = 2 * self.hidden * self.vocab_size
        return (body + head + self.attention_flops(length)) / flops

    def decode_step_s(
        self, flops: float, bytes_s: float, requests: int, position: float, num_adapters: int = 0
    ) -> float:
        """One token for each request: the longer of computing and of reading weights, adapters
        (rank 32) and keys and values of ``position`` earlier tokens of each request."""
        adapter = self.num_lora_weights(32) if num_adapters else 0
        read = BYTES * (
            self.num_weights
            + num_adapters * adapter
            + requests * position * 2 * self.num_layers * self.kv_size
        )
        attention = self.num_layers * 2 * 2 * self.hidden * position
        computed = requests * (2 * self.num_weights + 2 * adapter + attention)
        return max(read / bytes_s, computed / flops)

    def sample_tokens_per_s(
        self,
        flops: float,
        bytes_s: float,
        requests: int,
        prompt_tokens: int,
        new_tokens: int,
        num_adapters: int = 0,
    ) -> float:
        """New tokens of requests that start together, prompts included in the time."""
        prompts_s = requests * self.prefill_s(flops, prompt_tokens)
        position = prompt_tokens + new_tokens / 2
        steps_s = (new_tokens - 1) * self.decode_step_s(
            flops, bytes_s, requests, position, num_adapters
        )
        return requests * new_tokens / (prompts_s + steps_s)
