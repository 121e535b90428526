"""Tiny random models with a tokenizer, made with transformers, as directories to serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

VOCAB_SIZE = 131
CONTEXT_LENGTH = 512
EOS_TOKEN_ID = 2


def write_tiny_llama(
    directory: Path,
    vocab_size: int = VOCAB_SIZE,
    context_length: int = CONTEXT_LENGTH,
    text_of: Callable[[int], str] = "<{}>".format,
) -> Path:
    """Deterministic. Token i reads as ``text_of(i)``; weights so large that logits differ."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,  # heads of 32, as the native kernels want
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return _write_tokenizer(directory, vocab_size, text_of)


def write_tiny_mixtral(directory: Path) -> Path:
    """A mixture of experts, which runs as modules of transformers; else as above."""
    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(directory)
    return _write_tokenizer(directory, VOCAB_SIZE, "<{}>".format)


def _write_tokenizer(directory: Path, vocab_size: int, text_of: Callable[[int], str]) -> Path:
    vocabulary = {text_of(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=text_of(0)))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": text_of(EOS_TOKEN_ID)}
        )
    )
    return directory
