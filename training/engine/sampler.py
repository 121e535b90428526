"""Continuous batching: many requests, prompts and adapters in one forward pass.

Synchronous, for the thread that owns the device. Each ``step`` gives running sequences the blocks
they need, lets waiting ones start, plans, runs one forward pass, and absorbs what it gave; between
two steps the caller may train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.backends.base import SampleRequest, SampleResult, StopReason, TopK
from training.config import EngineConfig
from training.core.errors import UserError
from training.engine.adapter import Adapter, Segment
from training.engine.adapter_files import read_adapter
from training.engine.decoder import BLOCK_TOKENS, Chunk, Decoder
from training.engine.prefix_cache import Match, common_prefix
from training.engine.prompt_scores import PromptScores
from training.engine.sampler_adapters import BASE_VERSION, AdapterStore, Snapshot
from training.engine.sampler_blocks import SequenceBlocks
from training.engine.sampler_line import WaitingLine
from training.engine.sampler_plan import Work, choose_victim, choose_yielder, plan_step
from training.engine.sampler_state import Job, Sequence, check_request
from training.engine.sampling import Cuts

MAX_TOPK = 20
Outcome = tuple[str, SampleResult | Exception]
Begin = Callable[[set[str]], None]
"""Told which requests the next piece of work is for, before it is begun."""
NOT_FINITE = "the weights gave logits that are not finite"


class Sampler:
    """``SampleRequest`` in, ``SampleResult`` or the request's exception out.

    A request either fits the cache alone, or is refused at once. Sequences take blocks as they
    grow; when there are none left one gives way, keeps its tokens and its random stream, and goes
    on later. Each step brings somebody a token and none is ever lost, so all end.
    """

    def __init__(self, decoder: Decoder, engine_config: EngineConfig, tokenizer_path: Path) -> None:
        self._decoder = decoder
        self._config = engine_config
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._cache = decoder.new_cache(max(engine_config.kv_cache_tokens // BLOCK_TOKENS, 1))
        self._blocks = SequenceBlocks(self._cache)
        self._vocabulary = decoder.vocabulary
        self._adapters = AdapterStore(self._load_adapter, engine_config.sampling_adapter_bytes)
        # More than can run cannot start after one prompt, and looking at each takes time.
        self._line = WaitingLine(max_deferred=engine_config.max_running_sequences)
        self._jobs: dict[str, Job] = {}
        self._running: list[Sequence] = []
        self._outcomes: list[Outcome] = []
        self._num_submitted = 0
        self.num_given_way = 0
        """How often a running sequence made room for another."""

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._outcomes)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(len(job.waiting) for job in self._jobs.values())

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with its continuation that the model and the cache hold."""
        return min(self._decoder.config.context_length, self._blocks.num_tokens)

    def publish(self, snapshot_id: str, directory: Path) -> None:
        """Later requests for the id use the adapter in ``directory``."""
        self._forget(self._adapters.publish(snapshot_id, directory))

    def retire(self, snapshot_id: str) -> None:
        """Requests already submitted finish; the directory may be deleted afterwards."""
        self._forget(self._adapters.retire(snapshot_id))

    def submit(self, request: SampleRequest) -> None:
        """Raises ``UserError`` for what can be seen at once; else ``step`` answers some day."""
        config = self._decoder.config
        check_request(request, config, MAX_TOPK)
        if request.request_id in self._jobs:
            raise UserError(f"request {request.request_id!r} is already running")
        room = max(config.context_length - len(request.prompt), 1)
        snapshot = None if request.snapshot_id is None else self._adapters.find(request.snapshot_id)
        job = Job(
            request,
            self._num_submitted,
            snapshot,
            self._line.group(request.tenant, snapshot.version if snapshot else BASE_VERSION),
            min(request.max_tokens, room),
            PromptScores(request, self._vocabulary),
        )
        if job.num_cells > self._blocks.num_tokens:
            raise UserError(
                f"prompt and max_tokens need {job.num_cells} cache tokens, "
                f"this server has {self._blocks.num_tokens} (kv_cache_tokens)"
            )
        num_sequences = request.num_samples if job.max_new_tokens else 1
        tokenizer = self._tokenizer if request.stop_strings else None
        job.sequences = [Sequence(job, index, tokenizer) for index in range(num_sequences)]
        job.waiting.extend(job.sequences)
        self._num_submitted += 1
        self._jobs[request.request_id] = job
        self._line.add(job)

    def cancel(self, request_id: str) -> None:
        """The next ``step`` answers the request with ``UserError``; unknown ids pass."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._fail(job, UserError("the request was cancelled"))

    def drop_prefixes(self) -> None:
        """Empties the prefix cache, for measurements."""
        self._blocks.forget_all()

    @torch.inference_mode()
    def step(self, begin: Begin = lambda requests: None) -> list[Outcome]:
        """One forward pass at most; returns the requests that ended."""
        self._grow()
        self._admit(begin)
        works = plan_step(self._running, self._config.prefill_chunk_tokens)
        if works:
            begin({work.sequence.job.request.request_id for work in works})
            self._absorb(works, self._forward(works))
        self._retire_finished()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` if blocks or sequences are lost or counted wrongly."""
        self._blocks.check_integrity(self._running)
        known = [each for job in self._jobs.values() for each in job.sequences]
        if set(self._running) != {each for each in known if each.is_running}:
            raise RuntimeError("a sequence outlived its request")
        for job in self._jobs.values():
            states = [each.is_running + (each.finished is not None) for each in job.sequences]
            if sum(states) + len(job.waiting) != len(states) or max(states) > 1:
                raise RuntimeError("a sequence is in two places or in none")
            if job.num_running != sum(each.is_running for each in job.sequences):
                raise RuntimeError("running sequences are counted wrongly")

    # ------------------------------------------------------------------ who runs

    def _grow(self) -> None:
        for sequence in list(self._running):
            while sequence.is_running and self._blocks.needs_block(sequence):
                if not self._blocks.grow(sequence):
                    self._give_way(choose_victim(self._running))

    def _admit(self, begin: Begin) -> None:
        """In the order of the line. Nobody overtakes the first for want of blocks, so that a long
        prompt cannot wait for ever behind short ones."""
        limit = self._config.max_running_sequences
        while (sequence := self._line.next()) is not None:
            has_room = len(self._running) < limit
            if has_room:
                begin({sequence.job.request.request_id})
                if not self._load(sequence.job):
                    continue
                sequence.refresh_context()
                match = self._blocks.find(sequence)
                if self._is_being_computed(sequence, match):
                    self._line.defer(sequence.job)
                    continue
                has_room = self._start(sequence, match)
            if not has_room:
                yielder = choose_yielder(self._running, sequence)
                if yielder is None:
                    return
                self._give_way(yielder)

    def _start(self, sequence: Sequence, match: Match) -> bool:
        """False where it would leave running sequences no block each to grow into."""
        if not self._blocks.start(sequence, match, num_reserved=len(self._running)):
            return False
        job = sequence.job
        if job.prompt_cache_hit_tokens is None:
            job.prompt_cache_hit_tokens = match.num_tokens
        sequence.is_running = True
        self._running.append(sequence)
        self._line.start(sequence)
        return True

    def _is_being_computed(self, sequence: Sequence, match: Match) -> bool:
        """Whether a running prompt will soon offer at least a block more than is cached."""
        wanted = match.num_tokens + BLOCK_TOKENS
        reusable = sequence.context[: sequence.num_reusable]
        return len(reusable) >= wanted and any(
            common_prefix(other.context, reusable) >= wanted
            for other in self._running
            if other.num_missing > 1 and other.version == sequence.version
        )

    def _give_way(self, sequence: Sequence) -> None:
        """What it has computed stays where it is until somebody needs the blocks."""
        self._keep(sequence)
        self._stop(sequence)
        self._line.give_way(sequence)
        self.num_given_way += 1

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more and owns nothing."""
        if sequence.is_prefilling:
            self._line.recall()
        self._running.remove(sequence)
        sequence.is_running = False
        self._blocks.release(sequence)

    def _keep(self, sequence: Sequence) -> None:
        """Later prompts may share what it has computed, if they can use these weights at all."""
        if self._adapters.is_published(sequence.job.snapshot):
            self._blocks.keep(sequence)

    # ------------------------------------------------------------------ run

    def _forward(self, works: list[Work]) -> torch.Tensor:
        """Hidden states [T, H] of the works' rows, packed in their order."""
        tokens: list[int] = []
        chunks: list[Chunk] = []
        for sequence, num_rows in works:
            tokens += sequence.next_tokens(num_rows)
            chunks.append(Chunk(sequence.table, sequence.num_computed, num_rows))
        return self._decoder.sampling_pass(
            self._cache, np.array(tokens, np.int32), chunks, _segments(works)
        )

    # ------------------------------------------------------------------ absorb

    def _absorb(self, works: list[Work], hidden_TH: torch.Tensor) -> None:
        if any(work.sequence.is_prefilling for work in works):
            self._absorb_prompts(works, hidden_TH)
        sampling: list[Sequence] = []
        last_rows: list[int] = []
        row = 0
        for sequence, num_rows in works:
            row += num_rows
            if not sequence.is_running:
                continue
            is_prompt = sequence.is_prefilling
            sequence.num_computed += num_rows
            if sequence.num_missing:
                continue
            if is_prompt:
                self._prefilled(sequence)
            if sequence.samples:
                sampling.append(sequence)
                last_rows.append(row - 1)
        if len(sampling) == len(hidden_TH):
            self._sample(sampling, hidden_TH)
        elif sampling:
            self._sample(sampling, hidden_TH[torch.tensor(last_rows, device=hidden_TH.device)])

    def _absorb_prompts(self, works: list[Work], hidden_TH: torch.Tensor) -> None:
        """Scores prompts, and ends requests whose keys and values may be NaN. In a step that only
        decodes, the logprobs of the tokens show that."""
        all_finite = bool(torch.isfinite(hidden_TH).all())
        row = 0
        for sequence, num_rows in works:
            rows_RH = hidden_TH[row : row + num_rows]
            row += num_rows
            job = sequence.job
            if not sequence.is_running:
                continue
            if not all_finite and not bool(torch.isfinite(rows_RH).all()):
                self._fail(job, UserError(NOT_FINITE), is_damaged=True)
            elif not job.is_prefilled and job.scores.first_row is not None:
                self._score(sequence, rows_RH)

    def _score(self, sequence: Sequence, hidden_RH: torch.Tensor) -> None:
        def logits(rows_RH: torch.Tensor) -> torch.Tensor:
            segments = [Segment(sequence.job.adapter, 0, len(rows_RH))]
            return self._decoder.logits(rows_RH, segments)

        sequence.job.scores.absorb(sequence.num_computed, hidden_RH, logits)

    def _prefilled(self, sequence: Sequence) -> None:
        job = sequence.job
        self._keep(sequence)
        if not job.is_prefilled:
            job.is_prefilled = True
            self._line.prefilled(job)
        self._line.recall()

    def _sample(self, sequences: list[Sequence], hidden_RH: torch.Tensor) -> None:
        works = [Work(sequence, 1) for sequence in sequences]
        logits_RV = self._decoder.logits(hidden_RH, _segments(works))
        cuts = Cuts.of([sequence.cut for sequence in sequences])
        uniforms_R = np.array([sequence.next_uniform() for sequence in sequences])
        drawn = self._vocabulary.sample(logits_RV, cuts, uniforms_R)
        best = self._best(sequences, logits_RV, cuts)
        all_finite = bool(np.isfinite(drawn.logprobs).all())
        for row, (sequence, token, logprob) in enumerate(
            zip(sequences, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
        ):
            if all_finite or np.isfinite(logprob):
                sequence.append(token, logprob, best.get(row))
            else:
                self._fail(sequence.job, UserError(NOT_FINITE), is_damaged=True)

    def _best(
        self, sequences: list[Sequence], logits_RV: torch.Tensor, cuts: Cuts
    ) -> dict[int, TopK]:
        """Most probable tokens of the rows that ask for them."""
        counts = [sequence.topk for sequence in sequences]
        rows = [row for row, k in enumerate(counts) if k > 0]
        if not rows:
            return {}
        top = self._vocabulary.top(logits_RV[rows], cuts.temperatures[rows], max(counts))
        return {
            row: TopK(top.token_ids[place, : counts[row]], top.logprobs[place, : counts[row]])
            for place, row in enumerate(rows)
        }

    # ------------------------------------------------------------------ ends

    def _retire_finished(self) -> None:
        for sequence in list(self._running):
            job = sequence.job
            if job.max_new_tokens == 0 and sequence.num_missing == 0:
                sequence.finish(StopReason.LENGTH)
            if sequence.finished is None or not sequence.is_running:
                continue
            if sequence.is_lead and not job.scores.are_finite:
                self._fail(job, UserError(NOT_FINITE), is_damaged=True)
                continue
            self._keep(sequence)
            self._stop(sequence)
            self._line.end(sequence)
            if job.is_done:
                del self._jobs[job.request.request_id]
                self._outcomes.append((job.request.request_id, job.result()))

    def _fail(self, job: Job, error: Exception, is_damaged: bool = False) -> None:
        """``is_damaged``: the sequences' keys and values may be NaN."""
        if self._jobs.get(job.request.request_id) is not job:
            return  # another of its sequences failed in the same step
        del self._jobs[job.request.request_id]
        self._line.remove(job)
        for sequence in [each for each in self._running if each.job is job]:
            if is_damaged:
                self._blocks.wipe(sequence)
            else:
                self._keep(sequence)
            self._stop(sequence)
            self._line.end(sequence)
        self._outcomes.append((job.request.request_id, error))

    def _forget(self, snapshot: Snapshot | None) -> None:
        """Loads a snapshot that requests still wait for, and drops its cached prefixes."""
        if snapshot is None:
            return
        for job in list(self._jobs.values()):
            if job.snapshot == snapshot:
                self._load(job)
        self._blocks.forget(snapshot.version)

    def _load(self, job: Job) -> bool:
        """False where the adapter cannot be read: the request has failed."""
        if job.snapshot is None or job.adapter is not None:
            return True
        try:
            job.adapter = self._adapters.adapter(job.snapshot)
        except UserError as error:
            self._fail(job, error)
            return False
        return True

    def _load_adapter(self, directory: Path) -> Adapter:
        layout, weights = read_adapter(directory, self._decoder.config)
        return self._decoder.new_adapter(layout, weights, trainable=False)


def _segments(works: Iterable[Work]) -> list[Segment]:
    """One segment per adapter of neighbouring works."""
    segments: list[Segment] = []
    version: int | None = None
    start = row = 0
    adapter: Adapter | None = None
    for sequence, num_rows in works:
        if version is not None and version != sequence.version:
            segments.append(Segment(adapter, start, row))
            start = row
        version, adapter = sequence.version, sequence.job.adapter
        row += num_rows
    segments.append(Segment(adapter, start, row))
    return segments
