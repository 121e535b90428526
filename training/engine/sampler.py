"""Continuous batching: many requests, prompts and adapters in one forward pass.

Synchronous, for the thread that owns the device. Each ``step`` admits waiting sequences, plans,
runs one forward pass, and absorbs what it gave; between two steps the caller may train.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.backends.base import Int32Array, SampleRequest, SampleResult, StopReason, TopK
from training.config import EngineConfig
from training.core.errors import UserError
from training.engine.adapter import Adapter
from training.engine.adapter_files import load_adapter
from training.engine.kv_cache import ExtentPool, KvCache, extent_size
from training.engine.model import Segment, Transformer
from training.engine.prefix_cache import Entry, Match, PrefixCache, common_prefix
from training.engine.prompt_scores import PromptScores
from training.engine.sampler_adapters import AdapterStore, Snapshot
from training.engine.sampler_attention import Chunk, StepAttention
from training.engine.sampler_plan import Work, plan_step
from training.engine.sampler_state import Job, Sequence, check_request
from training.engine.sampling import draw, scaled_logprobs, top_logprobs

MAX_TOPK = 20
INVARIANT_ROWS = range(48, 257)
"""Numbers of rows for which a bfloat16 product on the CPU gives each row the same bits, measured
with oneDNN on AMX: 33 to 256 with one and two threads."""
Outcome = tuple[str, SampleResult | Exception]


class Sampler:
    """``SampleRequest`` in, ``SampleResult`` or the request's exception out.

    A request either fits the cache alone, or is refused at once; sequences are admitted first come
    first served and own their cells to the end: none can wait for ever.
    """

    def __init__(
        self, model: Transformer, engine_config: EngineConfig, tokenizer_path: Path
    ) -> None:
        self._model = model
        self._config = engine_config
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._pool = ExtentPool(engine_config.kv_cache_tokens)
        self._cache = KvCache(model.config, self._pool.num_tokens, model.device, model.dtype)
        self._adapters = AdapterStore(self._load_adapter, engine_config.max_sampling_adapters)
        self._prefixes = PrefixCache()
        self._is_invariant = engine_config.batch_invariant and model.device.type == "cpu"
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._outcomes: list[Outcome] = []
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._outcomes)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with its continuation that the model and the cache hold."""
        return min(self._model.config.context_length, self._pool.largest_extent)

    def publish(self, snapshot_id: str, directory: Path) -> None:
        """Later requests for the id use the adapter in ``directory``."""
        self._forget(self._adapters.publish(snapshot_id, directory))

    def retire(self, snapshot_id: str) -> None:
        """Requests already submitted finish; the directory may be deleted afterwards."""
        self._forget(self._adapters.retire(snapshot_id))

    def submit(self, request: SampleRequest) -> None:
        """Raises ``UserError`` for what can be seen at once; else ``step`` answers some day."""
        config = self._model.config
        check_request(request, config, MAX_TOPK)
        if request.request_id in self._jobs:
            raise UserError(f"request {request.request_id!r} is already running")
        room = max(config.context_length - len(request.prompt), 1)
        snapshot = None if request.snapshot_id is None else self._adapters.find(request.snapshot_id)
        job = Job(
            request,
            self._num_submitted,
            snapshot,
            min(request.max_tokens, room),
            PromptScores(request),
        )
        if extent_size(job.num_cells) > self._pool.largest_extent:
            raise UserError(
                f"prompt and max_tokens need {job.num_cells} cache tokens, "
                f"this server has {self._pool.largest_extent} per sequence (kv_cache_tokens)"
            )
        num_sequences = request.num_samples if job.max_new_tokens else 1
        tokenizer = self._tokenizer if request.stop_strings else None
        job.sequences = [Sequence(job, index, tokenizer) for index in range(num_sequences)]
        self._num_submitted += 1
        self._jobs[request.request_id] = job
        self._waiting.extend(job.sequences)

    def cancel(self, request_id: str) -> None:
        """The next ``step`` answers the request with ``UserError``; unknown ids pass."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._fail(job, UserError("the request was cancelled"))

    def drop_prefixes(self) -> None:
        """Empties the prefix cache, for measurements."""
        while (extent := self._prefixes.evict()) is not None:
            self._pool.free(extent)

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """One forward pass at most; returns the requests that ended."""
        self._admit()
        max_rows = INVARIANT_ROWS[-1] if self._is_invariant else None
        works = plan_step(self._running, self._config.prefill_chunk_tokens, max_rows)
        if works:
            self._absorb(works, self._forward(works))
        self._retire_finished()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` if cache cells are lost or owned twice."""
        owned = [each.extent for each in self._running if each.extent is not None]
        expected = set(owned) | self._prefixes.extents
        if len(expected) != len(owned) + len(self._prefixes.extents):
            raise RuntimeError("an extent has two owners")
        self._pool.check_integrity(expected)
        known = {id(each) for job in self._jobs.values() for each in job.sequences}
        if any(id(each) not in known for each in self._running + self._waiting):
            raise RuntimeError("a sequence outlived its request")

    # ------------------------------------------------------------------ admission

    def _admit(self) -> None:
        """First come first served: nobody overtakes a sequence that waits for cells. The other
        samples of a prompt wait until the first one has passed over it, and copy its cells."""
        deferred: list[Sequence] = []
        while self._waiting and len(self._running) < self._config.max_running_sequences:
            sequence = self._waiting.pop(0)
            if not self._is_alive(sequence.job):
                continue  # the adapter could not be loaded for another sequence of the request
            if not sequence.is_lead and not sequence.job.is_prefilled:
                deferred.append(sequence)
            elif not self._start(sequence):
                deferred.append(sequence)
                break
        self._waiting = [each for each in deferred if self._is_alive(each.job)] + self._waiting

    def _is_alive(self, job: Job) -> bool:
        return self._jobs.get(job.request.request_id) is job

    def _start(self, sequence: Sequence) -> bool:
        """Gives the sequence cells; False where none are free now. A request whose adapter cannot
        be loaded fails here."""
        job = sequence.job
        if job.snapshot is not None and job.adapter is None and not self._load(job):
            return True
        if not self._make_room(job.num_cells):
            return False
        sequence.extent = self._pool.allocate(job.num_cells)
        match = self._find_prefix(sequence)
        if match is not None:
            self._cache.copy_prefix(match.start, sequence.extent.start, match.num_tokens)
            sequence.num_computed = match.num_tokens
        if sequence.is_lead:
            job.prompt_cache_hit_tokens = sequence.num_computed
        self._running.append(sequence)
        return True

    def _find_prefix(self, sequence: Sequence) -> Match | None:
        """Cells to copy. The last row is always computed, it gives the next token; so is every
        row that the prompt is scored at."""
        job = sequence.job
        limit = sequence.num_wanted - 1
        if not job.is_prefilled and job.scores.first_row is not None:
            limit = min(limit, job.scores.first_row)
        tokens = sequence.tokens[: max(limit, 0)]
        best = self._prefixes.find(job.version, tokens)
        for other in self._running:
            if other.job.version == job.version and other.extent is not None:
                num_tokens = common_prefix(other.computed_tokens, tokens)
                if num_tokens > (best.num_tokens if best else 0):
                    best = Match(other.extent.start, num_tokens)
        return best

    def _make_room(self, num_tokens: int) -> bool:
        while not self._pool.can_allocate(num_tokens):
            extent = self._prefixes.evict()
            if extent is None:
                return False
            self._pool.free(extent)
        return True

    # ------------------------------------------------------------------ run

    def _forward(self, works: list[Work]) -> torch.Tensor:
        """Hidden states [T, H] of the works' rows, packed in their order."""
        tokens: list[Int32Array] = []
        positions: list[int] = []
        chunks: list[Chunk] = []
        for sequence, num_rows in works:
            start, stop = sequence.num_computed, sequence.num_computed + num_rows
            tokens.append(sequence.tokens[start:stop])
            positions += range(start, stop)
            assert sequence.extent is not None
            chunks.append(Chunk(sequence.extent, start, num_rows))
        model = self._model
        num_padding = self._num_padding(len(positions))
        tokens.append(np.zeros(num_padding, np.int32))
        positions += [0] * num_padding
        attention = StepAttention(model.config, self._cache, chunks, model.device)
        return model.hidden(
            torch.from_numpy(np.concatenate(tokens)).to(model.device),
            torch.tensor(positions, device=model.device),
            _segments([(work.sequence.job, work.num_rows) for work in works]),
            attention,
        )

    def _logits(self, hidden_BH: torch.Tensor, parts: list[tuple[Job, int]]) -> torch.Tensor:
        """Logits [B, V] of ``parts`` (job, number of rows)."""
        num_rows = len(hidden_BH)
        if num_padding := self._num_padding(num_rows):
            hidden_BH = torch.cat([hidden_BH, hidden_BH[:1].expand(num_padding, -1)])
        return self._model.logits(hidden_BH, _segments(parts))[:num_rows]

    def _num_padding(self, num_rows: int) -> int:
        return max(INVARIANT_ROWS[0] - num_rows, 0) if self._is_invariant else 0

    # ------------------------------------------------------------------ absorb

    def _absorb(self, works: list[Work], hidden_TH: torch.Tensor) -> None:
        sampling: list[Sequence] = []
        last_rows: list[int] = []
        row = 0
        for sequence, num_rows in works:
            job = sequence.job
            if sequence.is_lead and not job.is_prefilled:
                self._score(sequence, hidden_TH[row : row + num_rows])
            sequence.num_computed += num_rows
            row += num_rows
            if sequence.num_missing == 0:
                job.is_prefilled = True
            if sequence.samples_next:
                sampling.append(sequence)
                last_rows.append(row - 1)
        if sampling:
            rows = torch.tensor(last_rows, device=hidden_TH.device)
            self._sample(sampling, hidden_TH[rows])

    def _score(self, sequence: Sequence, hidden_RH: torch.Tensor) -> None:
        def logits(rows_RH: torch.Tensor) -> torch.Tensor:
            return self._logits(rows_RH, [(sequence.job, len(rows_RH))])

        sequence.job.scores.absorb(sequence.num_computed, hidden_RH, logits)

    def _sample(self, sequences: list[Sequence], hidden_BH: torch.Tensor) -> None:
        logits_BV = self._logits(hidden_BH, [(sequence.job, 1) for sequence in sequences])
        cuts = [sequence.cut for sequence in sequences]
        logprobs_BV = scaled_logprobs(logits_BV, [cut.temperature for cut in cuts])
        tokens_B = draw(logprobs_BV, cuts, [sequence.next_uniform() for sequence in sequences])
        chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        best = self._best(sequences, logprobs_BV)
        for sequence, token, logprob in zip(
            sequences, tokens_B.tolist(), chosen_B.tolist(), strict=True
        ):
            if not np.isfinite(logprob):
                self._fail(sequence.job, UserError("the weights gave logits that are not finite"))
                continue
            sequence.is_proved_finite = True
            sequence.append(token, logprob, best.get(id(sequence)))

    def _best(self, sequences: list[Sequence], logprobs_BV: torch.Tensor) -> dict[int, TopK]:
        """Most probable tokens of the rows that ask for them, by the sequence's ``id``."""
        best: dict[int, TopK] = {}
        counts = [sequence.job.request.topk_sample_logprobs for sequence in sequences]
        rows = [row for row, k in enumerate(counts) if k > 0]
        if rows:
            top = top_logprobs(logprobs_BV[rows], max(counts))
            for place, row in enumerate(rows):
                k = counts[row]
                best[id(sequences[row])] = TopK(top.token_ids[place, :k], top.logprobs[place, :k])
        return best

    # ------------------------------------------------------------------ ends

    def _retire_finished(self) -> None:
        for sequence in list(self._running):
            job = sequence.job
            if job.max_new_tokens == 0 and sequence.num_missing == 0:
                sequence.finish(StopReason.LENGTH)
            if sequence.finished is None or not self._is_alive(job):
                continue
            if sequence.is_lead and not job.scores.are_finite:
                self._fail(job, UserError("the weights gave logits that are not finite"))
                continue
            sequence.is_proved_finite |= job.scores.first_row is not None
            self._running.remove(sequence)
            self._release(sequence)
            if job.is_done:
                del self._jobs[job.request.request_id]
                self._outcomes.append((job.request.request_id, job.result()))

    def _fail(self, job: Job, error: Exception) -> None:
        if not self._is_alive(job):
            return  # another of its sequences failed in the same step
        del self._jobs[job.request.request_id]
        self._waiting = [each for each in self._waiting if each.job is not job]
        for sequence in [each for each in self._running if each.job is job]:
            self._running.remove(sequence)
            self._release(sequence)
        self._outcomes.append((job.request.request_id, error))

    def _release(self, sequence: Sequence) -> None:
        """Keeps the cells for later prompts, if they are known to be good and still of use."""
        extent, sequence.extent = sequence.extent, None
        assert extent is not None
        if not sequence.is_proved_finite:
            self._cache.clear(extent)
            self._pool.free(extent)
            return
        if not self._adapters.is_published(sequence.job.snapshot):
            self._pool.free(extent)
            return
        extent = self._pool.shrink(extent, sequence.num_computed)
        entry = Entry(sequence.job.version, sequence.computed_tokens, extent)
        surplus = self._prefixes.put(entry)
        if surplus is not None:
            self._pool.free(surplus)

    def _forget(self, snapshot: Snapshot | None) -> None:
        """Loads a snapshot that requests still wait for, and drops its cached prefixes."""
        if snapshot is None:
            return
        for job in list(self._jobs.values()):
            if job.snapshot == snapshot and job.adapter is None:
                self._load(job)
        for extent in self._prefixes.drop(snapshot.version):
            self._pool.free(extent)

    def _load(self, job: Job) -> bool:
        """False where the adapter cannot be read: the request has failed."""
        assert job.snapshot is not None
        try:
            job.adapter = self._adapters.adapter(job.snapshot)
        except UserError as error:
            self._fail(job, error)
            return False
        return True

    def _load_adapter(self, directory: Path) -> Adapter:
        model = self._model
        return load_adapter(directory, model.config, model.device, model.dtype)


def _segments(parts: list[tuple[Job, int]]) -> list[Segment]:
    """One segment per adapter of neighbouring (job, number of rows)."""
    segments: list[Segment] = []
    version: int | None = None
    row = 0
    for job, num_rows in parts:
        if version == job.version:
            segments[-1] = segments[-1]._replace(stop=row + num_rows)
        else:
            segments.append(Segment(job.adapter, row, row + num_rows))
            version = job.version
        row += num_rows
    return segments
