"""What a greedy tenant costs a modest one: a step and a sample alone, beside another modest one,
and beside a greedy one with 100 models, deep queues and thousands of samples.

    python -m benchmarks.fairness [--model MODEL_DIRECTORY] [--models 100] [--samples 2000]

Tenants are keys. The modest one makes one step after the other, or one sample after the other, and
looks at the clock. Times of the neighbours take turns: their processes are told to go on and to
stop.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop
from tinker.proto import tinker_public_pb2 as pb

from benchmarks.load_http import Answer, Http
from tests.servers import FAKE_MODEL, REPOSITORY, clean_environment, fake_model, running_server
from training.config import EMBEDDED_MODEL

KEYS = ("modest", "other", "greedy")
DEPTH = 4
"""Steps of each of the greedy one's models under way."""
PROMPT_TOKENS, NEW_TOKENS = 16, 16
RANK = 8
VOCABULARY = 500
_TOKENS = re.compile(r"^tinkercloud_trained_tokens_total\{.*\} (\S+)$", re.MULTILINE)


class Tenant:
    """One key's plain client; 429 means again in a second."""

    def __init__(self, port: int, key: str, model: str, tokens: int) -> None:
        self._http = Http(port, f"tml-{key}")
        self._base_model = model
        self._tokens = tokens
        self._num_samples = 0
        self._is_on = asyncio.Event()

    async def open(self, num_models: int) -> None:
        created = await self._post("/create_session", {"tags": [], "user_metadata": {}})
        self.session = created.json()["session_id"]
        wanted = [
            {
                "session_id": self.session,
                "model_seq_id": number,
                "base_model": self._base_model,
                "lora_config": {"rank": RANK, "seed": number},
            }
            for number in range(num_models)
        ]
        promises = [await self._promise("/create_model", each) for each in wanted]
        self.models = [(await self._result(each)).json()["model_id"] for each in promises]
        body = {
            "session_id": self.session,
            "sampling_session_seq_id": 0,
            "base_model": self._base_model,
        }
        sampler = await self._post("/create_sampling_session", body)
        self._sampler = sampler.json()["sampling_session_id"]

    async def step(self, model_id: str, number: int) -> None:
        """Step ``number`` of a model, counted from 0."""
        row = np.random.default_rng(number).integers(3, VOCABULARY, self._tokens + 1)
        message = pb.ForwardBackwardRequest(
            model_id=model_id, seq_id=2 * number + 1, loss_fn="cross_entropy"
        )
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = row[:-1].astype(np.int32).tobytes()
        for name, values, dtype in (
            ("target_tokens", row[1:], pb.DTYPE_INT64),
            ("weights", np.ones(self._tokens, np.float32), pb.DTYPE_FLOAT32),
        ):
            tensor = pb.Tensor(dense=values.tobytes(), dtype=dtype, shape=[self._tokens])
            datum.loss_fn_inputs[name].CopyFrom(tensor)
        body = message.SerializeToString()
        passing = await self._accepted(lambda: self._http.post_bytes("/forward_backward", body))
        adam = {"learning_rate": 1e-4}
        stepping = await self._promise(
            "/optim_step", {"model_id": model_id, "seq_id": 2 * number + 2, "adam_params": adam}
        )
        await asyncio.gather(self._result(passing), self._result(stepping))

    async def sample(self) -> None:
        self._num_samples += 1
        seed = self._num_samples
        tokens = np.random.default_rng(seed).integers(3, VOCABULARY, PROMPT_TOKENS).tolist()
        body = {
            "sampling_session_id": self._sampler,
            "seq_id": seed,
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": tokens, "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": NEW_TOKENS, "seed": seed, "stop": []},
        }
        await self._result(await self._promise("/asample", body))

    async def metrics(self) -> bytes:
        return (await self._http.get("/metrics", prefix="")).body

    # ----------------------------------------------------------------- as a neighbour

    def go(self, is_on: bool) -> None:
        if is_on:
            self._is_on.set()
        else:
            self._is_on.clear()

    async def keep_training(self, model_id: str, depth: int) -> None:
        number = 0
        waiting: list[asyncio.Task[None]] = []
        while True:
            await self._is_on.wait()
            waiting.append(asyncio.create_task(self.step(model_id, number)))
            await asyncio.sleep(0)
            number += 1
            if len(waiting) >= depth:
                await waiting.pop(0)

    async def keep_sampling(self) -> None:
        while True:
            await self._is_on.wait()
            await self.sample()

    # ----------------------------------------------------------------- the wire

    async def _promise(self, path: str, body: dict[str, Any]) -> str:
        return await self._accepted(lambda: self._http.post(path, body))

    async def _accepted(self, send: Any) -> str:
        while True:
            answer: Answer = await send()
            if answer.status != 429:
                assert answer.status == 200, answer
                return str(answer.json()["request_id"])
            await asyncio.sleep(float(answer.headers["retry-after"]))

    async def _result(self, request_id: str) -> Answer:
        body = {"request_id": request_id, "allow_metadata_only": True}
        while (answer := await self._http.post("/retrieve_future", body)).status == 408:
            pass
        assert answer.status == 200, answer
        assert not answer.body.startswith(b'{"error"'), answer
        return answer

    async def _post(self, path: str, body: dict[str, Any]) -> Answer:
        answer = await self._http.post(path, body)
        assert answer.status == 200, answer
        return answer


async def neighbour(settings: dict[str, Any]) -> None:
    """Opens, says so, then trains and samples while the last line read was "on"."""
    tenant = Tenant(settings["port"], settings["key"], settings["model"], settings["tokens"])
    await tenant.open(settings["models"])
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(tenant.go, line.strip() == "on")

    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    await asyncio.gather(
        *(tenant.keep_training(model, settings["depth"]) for model in tenant.models),
        *(tenant.keep_sampling() for _ in range(settings["samples"])),
    )


class Neighbour:
    """The process of one."""

    def __init__(self, stack: ExitStack, settings: dict[str, Any]) -> None:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fairness", "--child", orjson.dumps(settings)],
            cwd=REPOSITORY,
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(child.wait)
        stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        self._child = child

    def go(self, is_on: bool) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write("on\n" if is_on else "off\n")
        self._child.stdin.flush()


async def trained_tokens(tenant: Tenant) -> float:
    """Of all tenants, since the server started."""
    text = (await tenant.metrics()).decode()
    return sum(map(float, _TOKENS.findall(text)))


async def timed(tenant: Tenant, what: str, window_s: float, done: list[int]) -> list[float]:
    """Seconds of each step or sample, for about ``window_s``; three at least."""
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - start < window_s:
        asked = time.perf_counter()
        if what == "step":
            await tenant.step(tenant.models[0], done[0])
            done[0] += 1
        else:
            await tenant.sample()
        taken.append(time.perf_counter() - asked)
    return taken


async def measure(options: argparse.Namespace) -> None:
    config: dict[str, Any] = {
        "auth": {"api_keys": list(KEYS)},
        "supported_models": [fake_model(delay_s=0.02)],
    }
    model = FAKE_MODEL
    if options.model is not None:
        model = EMBEDDED_MODEL
        config["supported_models"] = [{"name": model, "path": str(options.model.absolute())}]
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tinkercloud-fair-"))
        )
        server = stack.enter_context(running_server(directory, config))
        port = int(server.base_url.rsplit(":", 1)[1])
        common = {"port": port, "model": model, "tokens": options.tokens}
        modest = {"models": 1, "depth": 1, "samples": 1}
        greedy = {"models": options.models, "depth": DEPTH, "samples": options.samples}
        neighbours = {
            "alone": None,
            "beside a modest one": Neighbour(stack, common | {"key": "other"} | modest),
            "beside the greedy one": Neighbour(stack, common | {"key": "greedy"} | greedy),
        }
        tenant = Tenant(port, "modest", model, options.tokens)
        await tenant.open(1)
        done = [0]
        taken: dict[tuple[str, str], list[float]] = {}
        tokens: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for who, other in neighbours.items():
                if other is not None:
                    other.go(True)
                    await asyncio.sleep(options.settle_s)
                for what in ("step", "sample"):
                    before = await trained_tokens(tenant)
                    found = await timed(tenant, what, options.window_s, done)
                    taken.setdefault((what, who), []).extend(found)
                    if what == "step":
                        trained = await trained_tokens(tenant) - before
                        tokens.setdefault(who, []).append(trained / len(found))
                if other is not None:
                    other.go(False)
                    await asyncio.sleep(options.rest_s)
    print("| ms: median (longest) | step | tokens trained in it, of all | sample |")
    print("|---|---|---|---|")
    for who in neighbours:
        cells = [
            f"{1000 * statistics.median(each):.0f} ({1000 * max(each):.0f})"
            for each in (taken["step", who], taken["sample", who])
        ]
        print(f"| {who} | {cells[0]} | {statistics.mean(tokens[who]):.0f} | {cells[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a real model's directory; else the fake one")
    parser.add_argument("--models", type=int, default=100, help="of the greedy tenant")
    parser.add_argument("--samples", type=int, default=2000, help="of the greedy one, at once")
    parser.add_argument("--tokens", type=int, default=256, help="of each pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window-s", type=float, default=5.0)
    parser.add_argument("--settle-s", type=float, default=5.0, help="until queues are full")
    parser.add_argument("--rest-s", type=float, default=10.0, help="until they are empty again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        uvloop.run(neighbour(orjson.loads(options.child)))
    else:
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
