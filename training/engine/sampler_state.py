"""What the sampler knows of a request (``Job``) and of each of its sequences."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from training.backends.base import (
    Int32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
    TopK,
)
from training.core.errors import UserError
from training.engine.adapter import Adapter
from training.engine.kv_cache import Extent
from training.engine.projections import ModelShape
from training.engine.prompt_scores import PromptScores, uniform_stream
from training.engine.sampler_adapters import BASE_VERSION, Snapshot
from training.engine.sampling import Cut
from training.engine.stop import StopStrings

MIN_TEMPERATURE = 1e-4
"""Below it float32 logits overflow; 0 is greedy."""


@dataclass(eq=False)
class Job:
    """A request from submission to result. ``order`` is its place in the line.

    ``is_prefilled``: some sequence has passed over the whole prompt, so that the others can copy
    it and the prompt is scored.
    """

    request: SampleRequest
    order: int
    snapshot: Snapshot | None
    max_new_tokens: int
    scores: PromptScores
    adapter: Adapter | None = None
    is_prefilled: bool = False
    prompt_cache_hit_tokens: int = 0
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.snapshot.version if self.snapshot else BASE_VERSION

    @property
    def num_cells(self) -> int:
        """Cache tokens of one sequence at its longest: the last token sampled is never read."""
        return len(self.request.prompt) + max(self.max_new_tokens - 1, 0)

    @property
    def is_done(self) -> bool:
        """All sequences ended and gave their cells back."""
        return all(each.finished is not None and each.extent is None for each in self.sequences)

    def result(self) -> SampleResult:
        scores = self.scores
        sequences = [each.finished for each in self.sequences if each.finished is not None]
        if self.max_new_tokens == 0:  # one sequence passed over the prompt for all
            sequences *= self.request.num_samples
        return SampleResult(
            sequences=sequences,
            prompt_logprobs=scores.logprobs,
            topk_prompt=scores.topk,
            target_prompt_logprobs=scores.targets,
            prompt_alt=scores.alternatives,
            prompt_cache_hit_tokens=self.prompt_cache_hit_tokens,
        )


class Sequence:
    """One continuation. Keys and values of its first ``num_computed`` tokens lie in ``extent``
    (None while it waits)."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer | None) -> None:
        request = job.request
        self.job = job
        self.index = index
        self.num_prompt_tokens = len(request.prompt)
        self._buffer = request.prompt
        self._num_tokens = len(request.prompt)
        self.extent: Extent | None = None
        self.num_computed = 0
        self.is_proved_finite = False
        self.finished: SampledSequence | None = None
        self.cut = Cut(request.temperature, request.top_k, request.top_p)
        self._logprobs: list[float] = []
        self._topk: list[TopK] = []
        self._stop_ids = frozenset(request.stop_token_ids)
        self._stop_strings = (
            StopStrings(tokenizer, request.stop_strings)
            if tokenizer is not None and request.stop_strings
            else None
        )
        self._uniforms = uniform_stream(request.seed, index)

    @property
    def is_lead(self) -> bool:
        """The one that passes over the prompt and scores it."""
        return self.index == 0

    @property
    def order(self) -> tuple[int, int]:
        return (self.job.order, self.index)

    @property
    def tokens(self) -> Int32Array:
        """Prompt and what was sampled, int32; a view."""
        return self._buffer[: self._num_tokens]

    @property
    def computed_tokens(self) -> Int32Array:
        return self._buffer[: self.num_computed]

    @property
    def num_wanted(self) -> int:
        """Tokens whose keys and values are wanted now; the last one's row gives the next token.

        A request that only scores needs no prediction after its last prompt token.
        """
        return self._num_tokens - (1 if self.job.max_new_tokens == 0 else 0)

    @property
    def num_missing(self) -> int:
        return self.num_wanted - self.num_computed

    @property
    def samples_next(self) -> bool:
        return self.num_missing == 0 and self.job.max_new_tokens > 0

    def next_uniform(self) -> float:
        return float(self._uniforms.random())

    def append(self, token: int, logprob: float, topk: TopK | None) -> None:
        """Takes a sampled token; sets ``finished`` where it was the last one."""
        if self._num_tokens == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._num_tokens] = token
        self._num_tokens += 1
        self._logprobs.append(logprob)
        if topk is not None:
            self._topk.append(topk)
        stops = token in self._stop_ids
        if self._stop_strings is not None:
            stops |= self._stop_strings.push(token)
        if stops:
            self.finish(StopReason.STOP)
        elif len(self._logprobs) == self.job.max_new_tokens:
            self.finish(StopReason.LENGTH)

    def finish(self, reason: StopReason) -> None:
        topk = None
        if self.job.request.topk_sample_logprobs:
            topk = _stacked(self._topk, self.job.request.topk_sample_logprobs)
        self.finished = SampledSequence(
            tokens=self.tokens[self.num_prompt_tokens :].copy(),
            logprobs=np.array(self._logprobs, np.float32),
            stop_reason=reason,
            topk=topk,
        )


def _stacked(rows: SequenceOf[TopK], k: int) -> TopK:
    if not rows:
        return TopK(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
    return TopK(np.stack([row.token_ids for row in rows]), np.stack([row.logprobs for row in rows]))


def check_request(request: SampleRequest, config: ModelShape, max_topk: int) -> None:
    """Raises ``UserError`` for what this model cannot sample."""
    num_prompt = len(request.prompt)
    last_n, targets = request.prompt_logprobs_last_n, request.target_prompt_tokens
    k_fields = (
        request.topk_prompt_logprobs,
        request.topk_sample_logprobs,
        request.prompt_alt_tokens_k,
    )
    vocab = config.vocab_size
    problems = {
        "the prompt is empty": num_prompt == 0,
        f"the prompt has {num_prompt} tokens, the context {config.context_length}": (
            num_prompt > config.context_length
        ),
        f"prompt tokens must be in [0, {vocab})": num_prompt > 0
        and not (0 <= int(request.prompt.min()) <= int(request.prompt.max()) < vocab),
        "num_samples must be at least 1": request.num_samples < 1,
        "max_tokens must not be negative": request.max_tokens < 0,
        f"temperature must be 0 or at least {MIN_TEMPERATURE} and finite": not (
            request.temperature == 0 or MIN_TEMPERATURE <= request.temperature < float("inf")
        ),
        "top_k must be -1 or at least 1": request.top_k < -1,
        "top_p must be in (0, 1]": not 0 < request.top_p <= 1,
        "a stop string must not be empty": "" in request.stop_strings,
        f"top-k counts must be in [0, {max_topk}]": any(not 0 <= k <= max_topk for k in k_fields),
        "prompt_logprobs_last_n must be at least 1": last_n is not None and last_n < 1,
        "target_prompt_tokens must have one row per prompt token but the first": (
            targets is not None and (targets.ndim != 2 or len(targets) != num_prompt - 1)
        ),
        f"target_prompt_tokens must be in [-1, {vocab})": targets is not None
        and targets.size > 0
        and not (-1 <= int(targets.min()) <= int(targets.max()) < vocab),
    }
    for problem, is_present in problems.items():
        if is_present:
            raise UserError(problem)
