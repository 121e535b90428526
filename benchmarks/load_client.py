"""Clients of the load test: what the SDK sends, in its order, without the SDK's own cost.

Each has a session with a heartbeat every 10 s, trains a model with two steps under way (chunks of a
pass in parallel, the first one last), samples from the base model and now and then from its own
weights. It knows every answer beforehand. Now and then it sends a request twice, or asks for a
result again, as the SDK does after a lost answer.

    python -m benchmarks.load_client '{"port": 8000, ...}'      (started by benchmarks.load)

Reads one line to stop; prints its counts as JSON.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvloop

from benchmarks import load_expected as expected
from benchmarks.load_http import Answer, Http

HEARTBEAT_S = 10.0
STEPS_UNDER_WAY = 4
SAMPLES_UNDER_WAY = 3
NUM_COURSES = 8
"""Different trainings; clients with the same one get the same answers."""
STEPS_PER_SAVE = 4
"""No fewer than are under way: the sample from a save has ended when the next one replaces it."""
SENT_TWICE = 0.05
ASKED_TWICE = 0.05
GIVE_UP_S = 300.0
"""As the SDK does with a request that is refused for so long."""


@dataclass(frozen=True)
class Settings:
    port: int
    api_keys: list[str]
    model: str
    clients: int
    first: int
    """Number of the first one in this process."""
    ramp_s: float
    """In which they start, one after the other."""
    steps: int | None = None
    """Each ends after so many; None: when told to."""


@dataclass
class Counts:
    """``accepted``: promises; each must be in ``answered`` once."""

    requests: int = 0
    accepted: int = 0
    answered: int = 0
    steps: int = 0
    samples: int = 0
    sent_twice: int = 0
    asked_twice: int = 0
    busy: int = 0
    retry_after: Counter[str] = field(default_factory=Counter)
    duplicated: int = 0
    lost: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Client:
    def __init__(self, number: int, settings: Settings, counts: Counts, stop: asyncio.Event):
        self.number = number
        self.course = number % NUM_COURSES
        self._settings = settings
        self._counts = counts
        self._stop = asyncio.Event() if settings.steps else stop
        self._random = random.Random(number)
        self._http = Http(settings.port, settings.api_keys[number % len(settings.api_keys)])
        self._seq = 0
        self._session = self._model = ""
        self._num_samplers = 0
        self._paused_until = 0.0

    async def run(self) -> None:
        try:
            await self._open()
            beats = asyncio.create_task(self._beat())
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._train())
                    group.create_task(self._sample_base())
            finally:
                beats.cancel()
            await self._post(f"/sessions/{self._session}/finish", {"reason": {"type": "success"}})
        except Exception as error:
            self._wrong(f"client ended: {_told(error)}")
        finally:
            await self._http.close()

    async def _open(self) -> None:
        await self._post("/client/config", {"sdk_version": "0.38.0"})
        await self._post("/client/dynamic_config", {"sdk_version": "0.38.0"})
        created = await self._post("/create_session", {"tags": [], "user_metadata": {}})
        self._session = created.json()["session_id"]
        body = {
            "session_id": self._session,
            "model_seq_id": 0,
            "base_model": self._settings.model,
            "lora_config": expected.lora_config(self.course),
            "type": "create_model",
        }
        result = await self._result(await self._accepted(lambda: self._post("/create_model", body)))
        self._model = result.json()["model_id"]
        info = await self._post("/get_info", {"model_id": self._model, "type": "get_info"})
        self._check(info.json()["model_name"] == self._settings.model, "get_info")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._post("/session_heartbeat", {"session_id": self._session})

    # ----------------------------------------------------------------- training

    async def _train(self) -> None:
        step = 0
        waiting: list[asyncio.Task[None]] = []
        while not self._stop.is_set():
            waiting.append(await self._submit_step(step))
            step += 1
            if step == self._settings.steps:
                self._stop.set()
            if step % STEPS_PER_SAVE == self.number % STEPS_PER_SAVE:
                waiting.append(await self._submit_save(step))
            while len(waiting) >= STEPS_UNDER_WAY:
                await waiting.pop(0)
        for task in waiting:
            await task

    async def _submit_step(self, step: int) -> asyncio.Task[None]:
        """Returns when all of it is accepted; the task ends with the results."""
        course, first = expected.course(self.course), self._seq + 1
        self._seq += expected.CHUNKS + 1
        chunks = [*range(1, expected.CHUNKS), 0]
        promises = await asyncio.gather(
            *(self._submit_chunk(first + chunk, step, chunk) for chunk in chunks)
        )
        adam = {
            "learning_rate": expected.LEARNING_RATE,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-12,
            "weight_decay": 0.0,
            "grad_clip_norm": 0.0,
        }
        body = {
            "model_id": self._model,
            "seq_id": first + expected.CHUNKS,
            "adam_params": adam,
            "type": "optim_step",
        }
        stepping = await self._accepted(lambda: self._post("/optim_step", body))

        async def results() -> None:
            for chunk, promise in zip(chunks, promises, strict=True):
                answer = await self._result(promise)
                self._check(answer.body == course.passed(step, chunk), "loss differs")
            answer = await self._result(stepping)
            self._check(answer.body == course.stepped(step), "step differs")
            self._counts.steps += 1

        return asyncio.create_task(results())

    async def _submit_chunk(self, seq: int, step: int, chunk: int) -> str:
        body = expected.train_body(self._model, seq, self.course, step, chunk)
        return await self._accepted(lambda: self._post_bytes("/forward_backward", body))

    async def _submit_save(self, num_steps: int) -> asyncio.Task[None]:
        """Of its weights, to sample from. Inflight: what it saved before is let go, so that the
        server's memory has a chance to be flat; the sample has ended by then."""
        self._seq += 1
        self._num_samplers += 1
        body = {
            "model_id": self._model,
            "seq_id": self._seq,
            "sampling_session_seq_id": self._num_samplers,
            "kind": "inflight",
            "type": "save_weights_for_sampler",
        }
        saving = await self._accepted(lambda: self._post("/save_weights_for_sampler", body))

        async def results() -> None:
            saved = await self._result(saving)
            sampler = saved.json()["sampling_session_id"]
            number = num_steps % expected.NUM_PROMPTS
            answer = await self._sampled(sampler, 0, number, num_steps)
            view = expected.course(self.course).view(num_steps)
            right = expected.sampled(view, number, num_steps)
            self._check(answer.body == right, "sample of own weights differs")

        return asyncio.create_task(results())

    # ----------------------------------------------------------------- sampling

    async def _sample_base(self) -> None:
        body = {
            "session_id": self._session,
            "sampling_session_seq_id": 0,
            "base_model": self._settings.model,
            "type": "create_sampling_session",
        }
        created = await self._post("/create_sampling_session", body)
        sampler = created.json()["sampling_session_id"]
        await asyncio.gather(*(self._sample_on(sampler, lane) for lane in range(SAMPLES_UNDER_WAY)))

    async def _sample_on(self, sampler: str, lane: int) -> None:
        seq = lane
        while not self._stop.is_set():
            number, seed = seq % expected.NUM_PROMPTS, seq % 7
            answer = await self._sampled(sampler, seq, number, seed)
            right = expected.sampled_from_base(number, seed)
            self._check(answer.body == right, "sample differs")
            seq += SAMPLES_UNDER_WAY

    async def _sampled(self, sampler: str, seq: int, number: int, seed: int) -> Answer:
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": expected.prompt(number), "type": "encoded_text"}]},
            "sampling_params": {
                "max_tokens": expected.NEW_TOKENS,
                "seed": seed,
                "stop": [],
                "temperature": 1.0,
                "top_k": -1,
                "top_p": 1.0,
            },
            "prompt_logprobs": False,
            "type": "sample",
        }
        answer = await self._result(await self._accepted(lambda: self._post("/asample", body)))
        self._counts.samples += 1
        return answer

    # ----------------------------------------------------------------- promises

    async def _accepted(self, send: Callable[[], Awaitable[Answer]]) -> str:
        request_id = str((await send()).json()["request_id"])
        self._counts.accepted += 1
        if self._random.random() < SENT_TWICE:
            self._counts.sent_twice += 1
            again = str((await send()).json()["request_id"])
            if again != request_id:
                self._counts.duplicated += 1
        return request_id

    async def _result(self, request_id: str) -> Answer:
        answer = await self._retrieved(request_id)
        self._counts.answered += 1
        if self._random.random() < ASKED_TWICE:
            self._counts.asked_twice += 1
            again = await self._retrieved(request_id)
            self._check(again.body == answer.body, "asked again, another result")
        if answer.body.startswith(b'{"error"'):
            self._wrong(f"failed: {answer.body[:200].decode(errors='replace')}")
        return answer

    async def _retrieved(self, request_id: str) -> Answer:
        body = {"request_id": request_id, "allow_metadata_only": True}
        while True:
            answer = await self._post("/retrieve_future", body)
            if answer.status != 408:
                return answer

    # ----------------------------------------------------------------- HTTP

    async def _post(self, path: str, body: dict[str, Any]) -> Answer:
        return await self._patient(path, lambda: self._http.post(path, body))

    async def _post_bytes(self, path: str, body: bytes) -> Answer:
        return await self._patient(path, lambda: self._http.post_bytes(path, body))

    async def _patient(self, path: str, send: Callable[[], Awaitable[Answer]]) -> Answer:
        """The same request again as long as it is told to wait; other errors are counted."""
        started_s = asyncio.get_running_loop().time()
        while True:
            self._counts.requests += 1
            answer = await send()
            if answer.status in (200, 204, 408):
                return answer
            waited_s = asyncio.get_running_loop().time() - started_s
            if answer.status != 429 or waited_s > GIVE_UP_S:
                raise AssertionError(f"{path}: {answer.status} {answer.body[:200]!r}")
            self._counts.busy += 1
            retry_after = answer.headers.get("retry-after", "none")
            self._counts.retry_after[retry_after] += 1
            await asyncio.sleep(1.0 if path == "/asample" else float(retry_after))

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self._wrong(what)

    def _wrong(self, what: str) -> None:
        self._counts.errors[what] += 1


def _told(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


async def run(settings: Settings) -> Counts:
    counts, stop = Counts(), asyncio.Event()
    loop = asyncio.get_running_loop()
    told = loop.run_in_executor(None, sys.stdin.readline)
    told.add_done_callback(lambda _: stop.set())

    async def one(place: int) -> None:
        await asyncio.sleep(settings.ramp_s * place / settings.clients)
        await Client(settings.first + place, settings, counts, stop).run()

    await asyncio.gather(*(one(place) for place in range(settings.clients)))
    counts.lost = counts.accepted - counts.answered
    return counts


def main() -> None:
    # The server is what is measured; on other machines clients would not take its processor.
    os.nice(10)
    settings = Settings(**orjson.loads(sys.argv[1]))
    counts = uvloop.run(run(settings))
    print(orjson.dumps(vars(counts)).decode())


if __name__ == "__main__":
    main()
