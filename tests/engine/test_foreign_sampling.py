"""Sampling from architectures that run as modules of transformers: against ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.checkpoints import FOREIGN_CONFIGS, VOCAB_SIZE, make_checkpoint
from tests.engine.peft_cases import load_in_peft
from tests.engine.sampler_cases import (
    ask,
    make_adapter,
    make_model_directory,
    random_prompt,
    sample_all,
)
from tests.engine.training_cases import ALL, CPU, MLP
from training.backends.base import Int32Array, LoraSpec, SampleResult
from training.config import EngineConfig
from training.engine.adapter import Adapter, Segment
from training.engine.adapter_files import load_adapter
from training.engine.decoder import BLOCK_TOKENS, Chunk, KvCache
from training.engine.foreign import ForeignDecoder
from training.engine.foreign_cache import ForeignCache
from training.engine.sampler import Sampler

TOLERANCE = 1e-4


def make_sampler(directory: Path) -> Sampler:
    decoder = ForeignDecoder.from_directory(directory, CPU, torch.float32)
    config = EngineConfig(kv_cache_tokens=1024, prefill_chunk_tokens=16)
    return Sampler(decoder, config, directory / "tokenizer.json")


def assert_greedy(model: Any, prompt: Int32Array, result: SampleResult) -> None:
    (sequence,) = result.sequences
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(sequence.tokens),
            eos_token_id=None,
            pad_token_id=0,
        )
        logprobs = model(generated).logits[0].log_softmax(-1)
    expected = generated[0, len(prompt) :]
    np.testing.assert_array_equal(sequence.tokens, expected.numpy())
    chosen = logprobs[len(prompt) - 1 : -1].gather(1, expected[:, None])[:, 0]
    np.testing.assert_allclose(sequence.logprobs, chosen.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", sorted(FOREIGN_CONFIGS))
def test_greedy_equals_generate(name: str, tmp_path: Path) -> None:
    """Prompts of several chunks; sequences of several blocks; windows shorter than both."""
    make_model_directory(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 40)]
    requests = [
        ask(prompt, f"r{index}", temperature=0.0, max_tokens=24, stop_token_ids=())
        for index, prompt in enumerate(prompts)
    ]
    for prompt, result in zip(prompts, sample_all(make_sampler(tmp_path), requests), strict=True):
        assert_greedy(model, prompt, result)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT's, about GPT-2's linears
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mixtral", "gpt-neox"])
def test_each_request_has_its_own_adapter(name: str, tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "model", name)
    sampler = make_sampler(directory)
    decoder = ForeignDecoder.from_directory(directory, CPU, torch.float32)
    prompt = random_prompt(30)
    for number, spec in enumerate((ALL, MLP)):
        make_adapter(decoder, tmp_path / f"adapter-{number}", spec)
        sampler.publish(f"adapter-{number}", tmp_path / f"adapter-{number}")
    names = (None, "adapter-0", "adapter-1")
    results = sample_all(
        sampler,
        [
            ask(prompt, f"{name}", snapshot_id=name, temperature=0.0, stop_token_ids=())
            for name in names
        ],
    )
    found = {tuple(result.sequences[0].tokens) for result in results}
    assert len(found) == len(names)
    for adapter, result in zip(names[1:], results[1:], strict=True):
        assert adapter is not None
        assert_greedy(load_in_peft(directory, tmp_path / adapter), prompt, result)


# --------------------------------------------------------------------------- the cache itself


class _Run:
    """A sequence through ``sampling_pass``: logits of all of its rows as they come."""

    def __init__(self, decoder: ForeignDecoder, cache: KvCache, blocks: Sequence[int]) -> None:
        self.decoder = decoder
        self.cache = cache
        self.blocks = np.array(blocks, np.int32)

    def rows(
        self, tokens: Int32Array, start: int, stop: int, adapter: Adapter | None = None
    ) -> torch.Tensor:
        chunk = Chunk(self.blocks, start, stop - start)
        segments = [Segment(adapter, 0, stop - start)]
        hidden = self.decoder.sampling_pass(self.cache, tokens[start:stop], [chunk], segments)
        return self.decoder.logits(hidden, segments)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ForeignDecoder:
    path = make_checkpoint("gemma3", tmp_path_factory.mktemp("gemma3"))
    return ForeignDecoder.from_directory(path, CPU, torch.float32)


def whole(decoder: ForeignDecoder, tokens: Int32Array) -> torch.Tensor:
    segments = [Segment(None, 0, len(tokens))]
    hidden = decoder.training_pass([tokens], segments, False, False).hidden_TH
    return decoder.logits(hidden, segments)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_sequences_that_share_and_copy_blocks(decoder: ForeignDecoder) -> None:
    """Two go on from one prefix, in a shared block and in a copied one; a third takes their block
    after them."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, VOCAB_SIZE, BLOCK_TOKENS + 9, dtype=np.int32)
    ends = [rng.integers(0, VOCAB_SIZE, 5, dtype=np.int32) for _ in range(2)]
    tokens = [np.concatenate([prefix, end]) for end in ends]
    cache = decoder.new_cache(4)
    first, second = _Run(decoder, cache, [2, 0]), _Run(decoder, cache, [2, 3])
    expected = [whole(decoder, each) for each in tokens]
    stop = len(prefix)

    assert_close(first.rows(tokens[0], 0, 20), expected[0][:20])
    assert_close(first.rows(tokens[0], 20, stop), expected[0][20:stop])
    cache.copy_block(0, 3)
    for position in range(stop, len(tokens[0])):
        for run, mine, wanted in zip((first, second), tokens, expected, strict=True):
            assert_close(run.rows(mine, position, position + 1), wanted[position : position + 1])

    cache.clear(0)
    other = rng.integers(0, VOCAB_SIZE, 7, dtype=np.int32)
    third = _Run(decoder, cache, [0])
    assert_close(third.rows(other, 0, 6), whole(decoder, other)[:6])
    assert_close(third.rows(other, 6, 7), whole(decoder, other)[6:])


def test_a_block_that_came_to_others_is_not_mistaken(decoder: ForeignDecoder) -> None:
    """Without ``clear``: other tokens, or another adapter, in a block that something remembers."""
    rng = np.random.default_rng(1)
    old, new = (rng.integers(0, VOCAB_SIZE, 12, dtype=np.int32) for _ in range(2))
    cache = decoder.new_cache(2)
    run = _Run(decoder, cache, [1])
    run.rows(old, 0, 10)
    # The same positions with other tokens, brought in by a copy: only the ids tell.
    copied = _Run(decoder, cache, [0])
    copied.rows(new, 0, 10)
    cache.copy_block(0, 1)
    assert_close(run.rows(new, 10, 12), whole(decoder, new)[10:])


def test_a_memory_belongs_to_an_adapter(decoder: ForeignDecoder, tmp_path: Path) -> None:
    make_adapter(decoder, tmp_path, LoraSpec(4, 9))
    adapter = load_adapter(tmp_path, decoder.config, CPU, torch.float32)
    tokens = random_prompt(12)
    used, fresh = (_Run(decoder, decoder.new_cache(1), [0]) for _ in range(2))
    used.rows(tokens, 0, 10)
    fresh.rows(tokens, 0, 10, adapter)
    assert_close(used.rows(tokens, 10, 12, adapter), fresh.rows(tokens, 10, 12, adapter))


def test_memories_are_no_longer_than_the_cache(decoder: ForeignDecoder) -> None:
    """Two sequences of 67 tokens share all but their last block: together 134, in 128 cells."""
    length = 2 * BLOCK_TOKENS + 3
    shared = random_prompt(2 * BLOCK_TOKENS)
    tokens = [np.concatenate([shared, random_prompt(4, seed)]) for seed in (1, 2)]
    cache = ForeignCache(4)
    runs = [_Run(decoder, cache, [0, 1, 2]), _Run(decoder, cache, [0, 1, 3])]
    for run, mine in zip(runs, tokens, strict=True):
        run.rows(mine, 0, length)
    assert cache.recall(Chunk(runs[0].blocks, length, 1), None) is None
    for run, mine in zip(runs, tokens, strict=True):
        last = run.rows(mine, length, length + 1)
        assert_close(last, whole(decoder, mine)[-1:])
