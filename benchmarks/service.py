"""Work for a real server: through the official SDK and HTTP, as any client does it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import tinker
from tinker import types

from benchmarks.memory import children_of, memory_of
from benchmarks.workload import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    RANK,
    Shape,
    Work,
    clocked,
    token_rows,
    training_rows,
)
from tests.servers import Server, running_server
from training.config import EMBEDDED_MODEL

RATE = types.AdamParams(learning_rate=1e-4)
_UNIT_SECONDS = re.compile(r"^tinkercloud_unit_seconds_sum\{.*\} (\S+)$", re.MULTILINE)


class Service(NamedTuple):
    """A server of its own and a client of it."""

    server: Server
    client: tinker.ServiceClient
    model: str

    # ----------------------------------------------------------------- what it is made of

    @property
    def api_pid(self) -> int:
        return self.server.process.pid

    @property
    def engine_pid(self) -> int:
        """Of the process that computes: the largest child. Raises ``ValueError`` without one."""
        return max(children_of(self.api_pid), key=lambda pid: memory_of(pid).steady_mib)

    def backend_seconds(self) -> float:
        """Spent in calls to the backend since the start, as the server's own metrics tell it."""
        text = httpx.get(f"{self.server.base_url}/metrics").raise_for_status().text
        return sum(map(float, _UNIT_SECONDS.findall(text)))

    def in_backend(self, work: Work) -> Work:
        """Seconds of ``work`` spent there; a unit is counted before its results are out."""

        def seconds() -> float:
            before = self.backend_seconds()
            work()
            return self.backend_seconds() - before

        return seconds

    # ----------------------------------------------------------------- work

    def trainer(self, rank: int = RANK, seed: int = 0) -> tinker.TrainingClient:
        return self.client.create_lora_training_client(self.model, rank=rank, seed=seed).result()

    def sampler(self) -> tinker.SamplingClient:
        return self.client.create_sampling_client(base_model=self.model).result()

    def adapter_samplers(self, num: int, rank: int = RANK) -> list[tinker.SamplingClient]:
        """Of ``num`` adapters, each trained for one step so that none is zero."""
        server, paths = self.server, []
        # A session of their own: when it ends, the trainer's memory is free again.
        with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as client:
            for seed in range(num):
                trainer = self._replace(client=client).trainer(rank, seed)
                step(trainer, sdk_data(training_rows(Shape(1, 16), seed)))()
                paths.append(trainer.save_weights_for_sampler(f"adapter-{seed}").result().path)
        return [self.client.create_sampling_client(model_path=path).result() for path in paths]


@contextmanager
def service_of(config: Mapping[str, Any], model: str) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), config) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as client,
    ):
        yield Service(server, client, model)


@contextmanager
def local_service(
    directory: Path, num_threads: int, engine: Mapping[str, Any] | None = None
) -> Iterator[Service]:
    """With the model in ``directory``; ``engine``: further settings of that section."""
    config = {
        "supported_models": [{"name": EMBEDDED_MODEL, "path": str(directory.absolute())}],
        "engine": {"num_threads": num_threads, **(engine or {})},
    }
    with service_of(config, EMBEDDED_MODEL) as service:
        yield service


# --------------------------------------------------------------------------- work


def sdk_data(rows: np.ndarray[Any, np.dtype[np.int64]]) -> list[types.Datum]:
    """Each row's tokens predict the next one; all weights are one."""
    weights = np.ones(rows.shape[1] - 1, np.float32)
    data = []
    for row in rows:
        inputs: dict[str, Any] = {"target_tokens": row[1:], "weights": weights}
        tokens = types.ModelInput.from_ints(row[:-1].tolist())
        data.append(types.Datum(model_input=tokens, loss_fn_inputs=inputs))
    return data


def step(trainer: tinker.TrainingClient, data: Sequence[types.Datum]) -> Callable[[], object]:
    """forward_backward and optim_step, both asked for before either is waited for."""

    def run() -> float:
        loss = trainer.forward_backward(list(data), "cross_entropy")
        trainer.optim_step(RATE).result()
        return loss.result().metrics["loss:sum"]

    return run


def smallest_step(trainer: tinker.TrainingClient) -> Callable[[], object]:
    """Of one token."""
    return step(trainer, sdk_data(np.array([[3, 5]])))


def training(trainer: tinker.TrainingClient, shape: Shape) -> Work:
    return clocked(step(trainer, sdk_data(training_rows(shape))))


def tenants(trainers: Sequence[tinker.TrainingClient], length: int, optimize: bool = True) -> Work:
    """One sequence for each, all submitted before any is waited for."""
    data = [sdk_data(training_rows(Shape(1, length), seed)) for seed in range(len(trainers))]

    def run() -> None:
        losses = [
            trainer.forward_backward(each, "cross_entropy")
            for trainer, each in zip(trainers, data, strict=True)
        ]
        steps = [trainer.optim_step(RATE) for trainer in trainers]
        for loss in losses:
            loss.result()
        for optimized in steps:
            optimized.result()

    return clocked(run)


def sampling(
    samplers: Sequence[tinker.SamplingClient],
    requests: int,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> Work:
    """``requests`` in flight together, spread over ``samplers``; prompts are new every time."""
    params = types.SamplingParams(max_tokens=new_tokens, stop=[])
    seed = 1000 * requests

    def run() -> None:
        nonlocal seed
        seed += 1
        rows = token_rows(requests, prompt_tokens, seed).tolist()
        waiting = [
            samplers[number % len(samplers)].sample(types.ModelInput.from_ints(row), 1, params)
            for number, row in enumerate(rows)
        ]
        num_tokens = sum(len(future.result().sequences[0].tokens) for future in waiting)
        assert num_tokens == requests * new_tokens

    return clocked(run)
