"""Logprobs of a prompt's own tokens, of other tokens in their place, and draws in their place.

Row r of the forward pass, at prompt position r, predicts position r + 1.

Shape legend: P prompt tokens, R rows at hand, V vocab, K cells per row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from training.backends.base import Float32Array, Int32Array, SampleRequest, TopK
from training.engine.sampling import Vocabulary

LOGITS_ROWS = 64
"""Rows whose logits are alive at once."""

ALT_STREAM = 1
"""Philox counter word of the draws in place of prompt tokens; sampled tokens use 0."""


def uniform_stream(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Uniform numbers in [0, 1) that depend on the arguments alone."""
    key = np.array([seed & (2**64 - 1), index], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class PromptScores:
    """What one request asks of its prompt, filled in as the prefill passes over it.

    ``first_row``: the first row that must be computed; None if nothing is asked. ``rows_end`` is
    P - 1: the last row predicts no prompt token.
    """

    def __init__(self, request: SampleRequest, vocabulary: Vocabulary) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self.num_prompt_tokens = num = len(request.prompt)
        self.rows_end = num - 1
        last_n = request.prompt_logprobs_last_n
        self._logprobs_from = max(0, self.rows_end - last_n) if last_n is not None else 0
        self._logprobs = np.full(num, np.nan, np.float32) if request.prompt_logprobs else None
        self._topk = _empty_topk(num, request.topk_prompt_logprobs)
        self._alt = _empty_topk(self.rows_end, request.prompt_alt_tokens_k)
        targets = request.target_prompt_tokens
        self._targets = None if targets is None else np.zeros(targets.shape, np.float32)
        self._alt_uniforms: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
        self.first_row = self._first_row()

    def _first_row(self) -> int | None:
        starts = []
        if self._logprobs is not None or self._topk is not None:
            starts.append(self._logprobs_from)
        if self._alt is not None:
            starts.append(0)
        if self._request.target_prompt_tokens is not None:
            rows = np.flatnonzero((self._request.target_prompt_tokens >= 0).any(1))
            starts += rows[:1].tolist()
        return min((start for start in starts if start < self.rows_end), default=None)

    def absorb(
        self,
        start: int,
        hidden_RH: torch.Tensor,
        logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Scores prompt rows [``start``, ``start + R``); rows that nothing asks for are skipped."""
        if self.first_row is None:
            return
        begin, end = max(start, self.first_row), min(start + len(hidden_RH), self.rows_end)
        for row in range(begin, end, LOGITS_ROWS):
            stop = min(row + LOGITS_ROWS, end)
            self._score(row, logits(hidden_RH[row - start : stop - start]))

    def _score(self, start: int, logits_RV: torch.Tensor) -> None:
        stop = start + len(logits_RV)
        if self._logprobs is not None or self._topk is not None:
            self._score_own(max(start, self._logprobs_from), start, logits_RV)
        targets = self._request.target_prompt_tokens
        if self._targets is not None and targets is not None:
            ids_RK = targets[start:stop]
            values = self._vocabulary.logprobs(logits_RV, np.maximum(ids_RK, 0))
            self._targets[start:stop] = np.where(ids_RK >= 0, values, 0.0)
        if self._alt is not None:
            uniforms = self._uniforms()[start:stop]
            drawn = self._vocabulary.draw(logits_RV, self._request.temperature, uniforms)
            self._alt.token_ids[start:stop] = drawn.tokens
            self._alt.logprobs[start:stop] = drawn.logprobs

    def _score_own(self, begin: int, start: int, logits_RV: torch.Tensor) -> None:
        stop = start + len(logits_RV)
        if begin >= stop:
            return
        logits_RV = logits_RV[begin - start :]
        if self._logprobs is not None:
            own_R1 = self._request.prompt[begin + 1 : stop + 1].astype(np.int64)[:, None]
            logprobs = self._vocabulary.logprobs(logits_RV, own_R1)
            self._logprobs[begin + 1 : stop + 1] = logprobs[:, 0]
        if self._topk is not None:
            unscaled = np.zeros(len(logits_RV), np.float32)
            best = self._vocabulary.top(logits_RV, unscaled, self._topk.logprobs.shape[1])
            self._topk.token_ids[begin + 1 : stop + 1] = best.token_ids
            self._topk.logprobs[begin + 1 : stop + 1] = best.logprobs

    def _uniforms(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """[P - 1, K], all at once: a row's draws do not depend on how the prefill is chunked."""
        if self._alt_uniforms is None:
            shape = (self.rows_end, self._request.prompt_alt_tokens_k)
            self._alt_uniforms = uniform_stream(self._request.seed, 0, ALT_STREAM).random(shape)
        return self._alt_uniforms

    @property
    def are_finite(self) -> bool:
        """False if a computed cell is not a number: the weights are damaged."""
        start = self._logprobs_from + 1
        cells: list[Float32Array] = []
        if self._logprobs is not None:
            cells.append(self._logprobs[start:])
        if self._topk is not None:
            cells.append(self._topk.logprobs[start:])
        cells += [] if self._targets is None else [self._targets]
        cells += [] if self._alt is None else [self._alt.logprobs]
        return not any(np.isnan(each).any() for each in cells)

    @property
    def logprobs(self) -> Float32Array | None:
        return self._logprobs

    @property
    def topk(self) -> TopK | None:
        return self._topk

    @property
    def targets(self) -> Float32Array | None:
        return self._targets

    @property
    def alternatives(self) -> TopK | None:
        return self._alt


def _empty_topk(num_rows: int, k: int) -> TopK | None:
    if k == 0:
        return None
    token_ids: Int32Array = np.zeros((num_rows, k), np.int32)
    return TopK(token_ids, np.full((num_rows, k), np.nan, np.float32))
