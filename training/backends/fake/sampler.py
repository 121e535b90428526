"""Sampling from the fake's model: every option of a request, one sequence after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.backends.base import (
    Float32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
    TopK,
)
from training.backends.fake.model import Float64Array, HeadView, log_softmax, stream
from training.core.errors import ConfigError, UserError

TOKENS_PER_TURN = 32
"""Tokens drawn before other work gets a turn."""

_FIRST_SURROGATE = 0xD800  # code points from here on are no characters
_ALT_STREAM = -1  # never the index of a sequence


def texts(directory: Path | None, vocab_size: int) -> Callable[[list[int]], str]:
    """Tokens to text: by the directory's tokenizer; without one, token i is character i."""
    if directory is not None and (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False))
    if vocab_size > _FIRST_SURROGATE:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens needs a tokenizer.json")
    return lambda tokens: "".join(map(chr, tokens))


def check_request(request: SampleRequest, vocab_size: int, context_length: int) -> None:
    prompt, targets = request.prompt, request.target_prompt_tokens
    if len(prompt) == 0:
        raise UserError("the prompt is empty")
    if len(prompt) > context_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; the context length is {context_length}"
        )
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
        raise UserError(f"a prompt token is outside the vocabulary of {vocab_size}")
    if targets is not None:
        if targets.ndim != 2 or len(targets) != len(prompt) - 1:
            raise UserError("target_prompt_tokens needs one row for each prompt token but one")
        if targets.size and not -1 <= int(targets.min()) <= int(targets.max()) < vocab_size:
            raise UserError(f"a target prompt token is outside the vocabulary of {vocab_size}")


def run_request(
    view: HeadView,
    request: SampleRequest,
    context_length: int,
    text_of: Callable[[list[int]], str],
) -> Iterator[SampleResult | None]:
    """Yields None whenever others may run, the result last."""
    room = max(context_length - len(request.prompt), 1)
    request = dataclasses.replace(request, max_tokens=min(request.max_tokens, room))
    sequences = []
    for index in range(request.num_samples):
        sequence = None
        for sequence in _sequence(view, request, index, text_of):
            if sequence is None:
                yield None
        assert sequence is not None
        sequences.append(sequence)
    prompt = request.prompt
    targets = request.target_prompt_tokens
    yield SampleResult(
        sequences=sequences,
        prompt_logprobs=_prompt_logprobs(view, request) if request.prompt_logprobs else None,
        topk_prompt=_topk_prompt(view, request) if request.topk_prompt_logprobs else None,
        target_prompt_logprobs=None
        if targets is None
        else np.where(
            targets >= 0, view.logprobs_of(prompt[:-1], np.maximum(targets, 0)), 0.0
        ).astype(np.float32),
        prompt_alt=_prompt_alt(view, request) if request.prompt_alt_tokens_k else None,
    )


def _sequence(
    view: HeadView, request: SampleRequest, index: int, text_of: Callable[[list[int]], str]
) -> Iterator[SampledSequence | None]:
    rng = stream(request.seed, index)
    context = int(request.prompt[-1])
    tokens: list[int] = []
    logprobs: list[float] = []
    top: list[TopK] = []
    reason = StopReason.LENGTH
    stop_ids = frozenset(request.stop_token_ids)
    while len(tokens) < request.max_tokens:
        scaled_V = _scaled(view.logprobs(context), request.temperature)
        token = _draw(scaled_V, request, rng)
        tokens.append(token)
        logprobs.append(float(scaled_V[token]))
        if request.topk_sample_logprobs:
            top.append(_topk(scaled_V, request.topk_sample_logprobs))
        if token in stop_ids or _ends_in(request.stop_strings, tokens, text_of):
            reason = StopReason.STOP
            break
        context = token
        if len(tokens) % TOKENS_PER_TURN == 0:
            yield None
    yield SampledSequence(
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        stop_reason=reason,
        topk=_stack(top, request.topk_sample_logprobs) if request.topk_sample_logprobs else None,
    )


def _ends_in(
    stop_strings: tuple[str, ...], tokens: list[int], text_of: Callable[[list[int]], str]
) -> bool:
    if not stop_strings:
        return False
    # A character takes four byte tokens at most, so the end of the text is enough.
    text = text_of(tokens[-4 * max(map(len, stop_strings)) - 4 :])
    return any(stop in text for stop in stop_strings)


def _scaled(logprobs_V: Float64Array, temperature: float) -> Float64Array:
    return logprobs_V if temperature in (0.0, 1.0) else log_softmax(logprobs_V / temperature)


def _draw(scaled_V: Float64Array, request: SampleRequest, rng: np.random.Generator) -> int:
    """Inverse-CDF draw after top-k, then top-p; one uniform number for each token."""
    if request.temperature == 0.0:
        return int(scaled_V.argmax())
    uniform = rng.random()
    probabilities = np.exp(scaled_V)
    if request.top_k <= 0 and request.top_p >= 1.0:
        return _inverse_cdf(probabilities, uniform)
    order = np.argsort(-scaled_V, kind="stable")
    if request.top_k > 0:
        order = order[: request.top_k]
    kept = probabilities[order]
    if request.top_p < 1.0:
        before = np.cumsum(kept) - kept
        num_kept = max(1, int((before < request.top_p * kept.sum()).sum()))
        order, kept = order[:num_kept], kept[:num_kept]
    return int(order[_inverse_cdf(kept, uniform)])


def _inverse_cdf(probabilities: Float64Array, uniform: float) -> int:
    cumulated = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(place, len(probabilities) - 1)


def _topk(logprobs_V: Float64Array, k: int) -> TopK:
    order = np.argsort(-logprobs_V, kind="stable")[:k]
    return TopK(order.astype(np.int32), logprobs_V[order].astype(np.float32))


def _stack(rows: list[TopK], k: int) -> TopK:
    return TopK(
        np.array([row.token_ids for row in rows], np.int32).reshape(len(rows), k),
        np.array([row.logprobs for row in rows], np.float32).reshape(len(rows), k),
    )


def _first_scored(request: SampleRequest) -> int:
    """The first prompt position whose logprob is asked for; position 0 never has one."""
    if request.prompt_logprobs_last_n is None:
        return 1
    return max(1, len(request.prompt) - request.prompt_logprobs_last_n)


def _prompt_logprobs(view: HeadView, request: SampleRequest) -> Float32Array:
    prompt, first = request.prompt, _first_scored(request)
    out = np.full(len(prompt), np.nan, np.float32)
    out[first:] = view.logprobs_of(prompt[first - 1 : -1], prompt[first:])
    return out


def _topk_prompt(view: HeadView, request: SampleRequest) -> TopK:
    k, first = request.topk_prompt_logprobs, _first_scored(request)
    nothing = TopK(np.zeros(k, np.int32), np.full(k, np.nan, np.float32))
    rows = [_topk(view.logprobs(int(context)), k) for context in request.prompt[first - 1 : -1]]
    return _stack([nothing] * first + rows, k)


def _prompt_alt(view: HeadView, request: SampleRequest) -> TopK:
    rng = stream(request.seed, _ALT_STREAM)
    k = request.prompt_alt_tokens_k
    rows = []
    for context in request.prompt[:-1]:
        scaled_V = _scaled(view.logprobs(int(context)), request.temperature)
        tokens = np.array([_draw(scaled_V, request, rng) for _ in range(k)], np.int32)
        rows.append(TopK(tokens, scaled_V[tokens].astype(np.float32)))
    return _stack(rows, k)
