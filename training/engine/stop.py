"""Stop strings in the text of sampled tokens, found while the tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from training.backends.base import REPLACEMENT

MAX_PENDING_TOKENS = 8
NUM_UNDECIDED_TOKENS = 3
"""The most that one more byte can make a character of, since UTF-8 takes four at most: where a text
ends in a replacement character for long, that is what the tokens before these decode to for good.
"""


class StopStrings:
    """Watches one sequence. Special tokens count with their text, so that a stop string may name
    one (``<|im_end|>``).

    Only a tail is decoded. Tokens before it are dropped at a point where the text was whole, but
    the ones just before stay as context: some decoders treat the first token of a text specially.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._num_kept_chars = max(map(len, stops)) - 1
        self._tail = ""
        self._context: list[int] = []
        self._num_context_chars = 0
        self._pending: list[int] = []

    def push(self, token: int) -> bool:
        """True if the text up to and with ``token`` holds a stop string for the first time."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        searched = self._searched(text)
        # Bytes of a character that is not complete yet decode to a replacement character too.
        if not text.endswith(REPLACEMENT):
            self._settle(len(self._pending), text)
        elif len(self._pending) > MAX_PENDING_TOKENS:
            num_tokens = len(self._pending) - NUM_UNDECIDED_TOKENS
            self._settle(num_tokens, self._decode(self._context + self._pending[:num_tokens]))
        searched = searched.rstrip(REPLACEMENT)
        return any(stop in searched for stop in self._stops)

    def _searched(self, text: str) -> str:
        return self._tail + text[self._num_context_chars :]

    def _settle(self, num_tokens: int, text: str) -> None:
        """The first of the pending tokens become the context; with it they decode to ``text``."""
        searched = self._searched(text)
        self._tail = searched[-self._num_kept_chars :] if self._num_kept_chars else ""
        self._context, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        self._num_context_chars = len(self._decode(self._context))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""
