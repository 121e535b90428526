"""What the sampler knows of a request (``Job``) and of each of its sequences."""

from __future__ import annotations

from array import array
from collections import deque
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
from training.engine.projections import ModelShape
from training.engine.prompt_scores import PromptScores, uniform_stream
from training.engine.sampler_adapters import Snapshot
from training.engine.sampling import Cut
from training.engine.stop import StopStrings
from training.engine.turns import Turns

MIN_TEMPERATURE = 1e-4
"""Below it float32 logits overflow; 0 is greedy."""


@dataclass(eq=False)
class Tenant:
    """``groups`` are those with waiting sequences; ``num_deferred`` requests wait for another's
    prompt."""

    num_running: int = 0
    num_deferred: int = 0
    groups: Turns[Group] = field(default_factory=lambda: Turns[Group]())


@dataclass(eq=False)
class Group:
    """A tenant's requests that sample from one ``version`` of the weights. ``jobs`` are those with
    waiting sequences."""

    tenant: Tenant
    version: int
    num_running: int = 0
    jobs: Turns[Job] = field(default_factory=lambda: Turns[Job]())


@dataclass(eq=False)
class Job:
    """A request from submission to result. ``order`` is its place in the order of arrival.

    ``is_prefilled``: some sequence has passed over the whole prompt, so that the others can share
    its blocks and the prompt is scored. ``is_deferred``: it waits for another request's prompt.
    """

    request: SampleRequest
    order: int
    snapshot: Snapshot | None
    group: Group
    max_new_tokens: int
    scores: PromptScores
    adapter: Adapter | None = None
    is_prefilled: bool = False
    is_deferred: bool = False
    num_running: int = 0
    prompt_cache_hit_tokens: int | None = None
    waiting: deque[Sequence] = field(default_factory=deque)
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.group.version

    @property
    def num_cells(self) -> int:
        """Cache tokens of one sequence at its longest: the last token sampled is never read."""
        return len(self.request.prompt) + max(self.max_new_tokens - 1, 0)

    @property
    def is_done(self) -> bool:
        return all(each.finished is not None and not each.is_running for each in self.sequences)

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
            prompt_cache_hit_tokens=self.prompt_cache_hit_tokens or 0,
        )


class Sequence:
    """One continuation. Keys and values of its first ``num_computed`` tokens lie in ``blocks``.

    ``num_wanted`` are the tokens whose keys and values are wanted now; the last one's row gives
    the next token. A request that only scores needs no prediction after its last prompt token.
    """

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer | None) -> None:
        request = job.request
        self.job = job
        self.group = job.group
        self.tenant = job.group.tenant
        self.version = job.version
        self.index = index
        self.order = (job.order, index)
        self.samples = job.max_new_tokens > 0
        self.topk = request.topk_sample_logprobs
        self.cut = Cut(request.temperature, request.top_k, request.top_p)
        self.num_prompt_tokens = len(request.prompt)
        self.num_wanted = len(request.prompt) - (1 if job.max_new_tokens == 0 else 0)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.table: Int32Array = np.zeros(0, np.int32)
        self.context = request.prompt
        self.is_running = False
        self.finished: SampledSequence | None = None
        self._sampled = array("i")
        self._logprobs = array("f")
        self._topk: list[TopK] = []
        self._stop_ids = frozenset(request.stop_token_ids)
        self._stop_strings = (
            StopStrings(tokenizer, request.stop_strings)
            if tokenizer is not None and request.stop_strings
            else None
        )
        self._uniforms: np.random.Generator | None = None

    @property
    def is_lead(self) -> bool:
        """The one that passes over the prompt and scores it."""
        return self.index == 0

    @property
    def tokens(self) -> Int32Array:
        """Prompt and what was sampled; a copy."""
        return np.concatenate([self.job.request.prompt, self._sampled_array()])

    @property
    def num_missing(self) -> int:
        return self.num_wanted - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Its next row is one of the context, not of a token just sampled."""
        return self.num_computed < len(self.context)

    @property
    def num_reusable(self) -> int:
        """Tokens of the context whose keys and values may be another's. The last row is always
        computed, it gives the next token; so is every row that the prompt is scored at."""
        first_row = self.job.scores.first_row
        if self.job.is_prefilled or first_row is None:
            return max(self.num_wanted - 1, 0)
        return max(min(self.num_wanted - 1, first_row), 0)

    def refresh_context(self) -> None:
        """Before it starts to run: all its tokens so far are to be computed."""
        if self._sampled:
            self.context = self.tokens

    def next_tokens(self, num_rows: int) -> list[int]:
        """Those of the next rows to compute: of the context, or the last one sampled."""
        start = self.num_computed
        if start < len(self.context):
            tokens: list[int] = self.context[start : start + num_rows].tolist()
            return tokens
        return [self._sampled[-1]]

    def next_uniform(self) -> float:
        """Its own stream goes on where it was, also after the sequence had to give way."""
        if self._uniforms is None:
            self._uniforms = uniform_stream(self.job.request.seed, self.index)
        return self._uniforms.random()

    def append(self, token: int, logprob: float, topk: TopK | None) -> None:
        """Takes a sampled token; sets ``finished`` where it was the last one."""
        self._sampled.append(token)
        self._logprobs.append(logprob)
        self.num_wanted += 1
        if topk is not None:
            self._topk.append(topk)
        stops = token in self._stop_ids
        if self._stop_strings is not None:
            stops |= self._stop_strings.push(token)
        if stops:
            self.finish(StopReason.STOP)
        elif len(self._sampled) == self.job.max_new_tokens:
            self.finish(StopReason.LENGTH)

    def finish(self, reason: StopReason) -> None:
        topk = _stacked(self._topk, self.topk) if self.topk else None
        self.finished = SampledSequence(
            tokens=self._sampled_array(),
            logprobs=np.array(self._logprobs, np.float32),
            stop_reason=reason,
            topk=topk,
        )

    def _sampled_array(self) -> Int32Array:
        return np.array(self._sampled, np.int32)


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
