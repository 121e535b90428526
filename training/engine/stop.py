"""Stop strings in the text of sampled tokens, found while the tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING_TOKENS = 8
"""A UTF-8 character has at most four bytes: text that is still broken after this many more tokens
stays broken."""


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
        self._pending: list[int] = []

    def push(self, token: int) -> bool:
        """True if the text up to and with ``token`` holds a stop string for the first time."""
        self._pending.append(token)
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        # Bytes of a character that is not complete yet decode to a replacement character.
        is_whole = not text.endswith(REPLACEMENT) or len(self._pending) >= MAX_PENDING_TOKENS
        searched = self._tail + text[len(before) :]
        if not is_whole:
            return self._found(searched.rstrip(REPLACEMENT))
        self._tail = searched[-self._num_kept_chars :] if self._num_kept_chars else ""
        self._context, self._pending = self._pending, []
        return self._found(searched)

    def _found(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""
