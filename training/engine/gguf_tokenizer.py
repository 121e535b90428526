"""Rebuilds a byte-level BPE tokenizer from the tokens and merges that a GGUF file carries.

transformers' own GGUF tokenizer conversion takes SmolLM2 for another kind of tokenizer (spaces
become ``<|endoftext|>``), so nothing of it is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from training.core.errors import ConfigError
from training.engine.gguf_file import GgufFile

CONTROL_TOKEN_TYPE = 3
"""``llama_token_type.CONTROL`` of the GGUF format: never the product of a merge."""


@dataclass(frozen=True)
class GgufTokenizer:
    """``special_tokens`` in id order; the named ones are members of it."""

    tokenizer: Tokenizer
    special_tokens: tuple[str, ...]
    unk_token: str
    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: str
    context_length: int

    def tokenizer_config(self) -> dict[str, Any]:
        """``PreTrainedTokenizerFast`` takes tokenizer.json as it is, in transformers 4 and 5;
        the model's own class (GPT2Tokenizer) would rebuild it and lose the digit rule."""
        added = {
            str(self.tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in self.special_tokens
        }
        return {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            **self.special_tokens_map(),
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.context_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def special_tokens_map(self) -> dict[str, Any]:
        return {
            "additional_special_tokens": [self.bos_token, self.eos_token],
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
        }


def read_tokenizer(file: GgufFile) -> GgufTokenizer:
    """Raises ``ConfigError`` for a file whose tokenizer is not SmolLM's byte-level BPE."""
    kind = (file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"{file.name} has a tokenizer of an unknown kind: {kind}")
    tokens: list[str] = file.value("tokenizer.ggml.tokens")
    types: list[int] = file.value("tokenizer.ggml.token_type")
    special = tuple(
        token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE
    )
    return GgufTokenizer(
        tokenizer=build_tokenizer(tokens, file.value("tokenizer.ggml.merges"), special),
        special_tokens=special,
        unk_token=tokens[file.value("tokenizer.ggml.unknown_token_id")],
        bos_token=tokens[file.value("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[file.value("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[file.value("tokenizer.ggml.padding_token_id")],
        chat_template=file.value("tokenizer.chat_template"),
        context_length=int(file.model_value("context_length")),
    )


def build_tokenizer(tokens: list[str], merges: list[str], special: tuple[str, ...]) -> Tokenizer:
    """Each digit alone, then the GPT-2 split, then byte-level BPE: the order of SmolLM's training.

    The model has no unknown token: the bytes that the vocabulary lacks (six control characters
    and lead bytes of unassigned planes) vanish, as in the original; a special token in their
    place would be worse.
    """
    left_right = [merge.split(" ") for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in left_right],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
