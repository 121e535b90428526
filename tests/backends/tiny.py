"""A tiny random Llama with a tokenizer, made with transformers, as a directory to serve."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 131
CONTEXT_LENGTH = 512
EOS_TOKEN_ID = 2


def write_tiny_llama(directory: Path) -> Path:
    """Deterministic. Token i reads as ``<i>``; weights are large enough that logits differ."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {f"<{token}>": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<2>"})
    )
    return directory
