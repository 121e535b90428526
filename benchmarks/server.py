"""What a user of the SDK gets: training, sampling, fixed costs; beside doing it without a server.

    python -m benchmarks.server data/models/HuggingFaceTB/SmolLM2-135M-Instruct

Training and sampling go through the official SDK over HTTP to a server process with the local
engine (or the server at TINKER_BASE_URL); next to each runs the same work in this process with
transformers and PEFT. The two take turns, the first round is not counted, medians are told. The
fixed costs are those of the smallest request: on the fake backend they are the service's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tinker
import torch
from rich.console import Console
from rich.table import Table
from tinker import types

from benchmarks.engine_training import RANK, make_data, peft_step
from tests.servers import FAKE_MODEL, KEY, running_server
from training.config import EMBEDDED_MODEL

Work = Callable[[], object]
OURS, THEIRS = "tinkercloud", "transformers + PEFT"
PROMPT_TOKENS, NEW_TOKENS = 64, 128
RATE = types.AdamParams(learning_rate=1e-4)


class Case(NamedTuple):
    """``ways`` do the same work; ``amount`` of ``unit`` is done each time, or None for its time."""

    name: str
    ways: Mapping[str, Work]
    amount: int | None = None


class Measured(NamedTuple):
    case: Case
    seconds: Mapping[str, list[float]]

    def median_s(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def figure(self, way: str) -> str:
        if way not in self.seconds:
            return ""
        if self.case.amount is None:
            return f"{1000 * self.median_s(way):.2f} ms"
        return f"{self.case.amount / self.median_s(way):,.0f} tokens/s"

    def ratio(self) -> str:
        if THEIRS not in self.seconds:
            return ""
        return f"{self.median_s(THEIRS) / self.median_s(OURS):.2f}x"


# --------------------------------------------------------------------------- work through the SDK


def sdk_data(shape: tuple[int, int], vocab_size: int) -> list[types.Datum]:
    """The same numbers as ``make_data`` gives to PEFT."""
    data = []
    for datum in make_data(*shape, vocab_size):
        inputs: dict[str, Any] = {
            "target_tokens": datum.targets,
            "weights": datum.inputs["weights"],
        }
        tokens = types.ModelInput.from_ints(datum.tokens.tolist())
        data.append(types.Datum(model_input=tokens, loss_fn_inputs=inputs))
    return data


def sdk_step(trainer: tinker.TrainingClient, data: list[types.Datum]) -> Work:
    def step() -> float:
        loss = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(RATE).result()
        return loss.result().metrics["loss:sum"]

    return step


def sdk_samples(sampler: tinker.SamplingClient, num: int, vocab_size: int) -> Work:
    """``num`` requests in flight together, each with a prompt no request had before."""
    rng = np.random.default_rng(num)
    params = types.SamplingParams(max_tokens=NEW_TOKENS, stop=[])

    def sample() -> int:
        waiting = [
            sampler.sample(types.ModelInput.from_ints(row.tolist()), 1, params)
            for row in rng.integers(0, vocab_size, (num, PROMPT_TOKENS))
        ]
        return sum(len(future.result().sequences[0].tokens) for future in waiting)

    return sample


def fixed_costs(trainer: tinker.TrainingClient, where: str) -> list[Case]:
    """Of a datum of one token."""
    inputs: dict[str, Any] = {"target_tokens": [5], "weights": [1.0]}
    data = [types.Datum(model_input=types.ModelInput.from_ints([3]), loss_fn_inputs=inputs)]

    def forward_backward() -> object:
        return trainer.forward_backward(data, "cross_entropy").result()

    def optim_step() -> object:
        return trainer.optim_step(RATE).result()

    works = {
        "forward_backward": forward_backward,
        "optim_step": optim_step,
        "both, pipelined": sdk_step(trainer, data),
    }
    return [Case(f"smallest {name}, {where}", {OURS: work}) for name, work in works.items()]


# --------------------------------------------------------------------------- without a server


def generation(model: Any, num: int, vocab_size: int) -> Work:
    rng = np.random.default_rng(num)

    def generate() -> object:
        ids = torch.from_numpy(rng.integers(0, vocab_size, (num, PROMPT_TOKENS)))
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    return generate


# --------------------------------------------------------------------------- servers


@contextmanager
def service_of(config: Mapping[str, Any]) -> Iterator[tinker.ServiceClient]:
    """A client of a server of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), config) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key=f"tml-{KEY}") as service,
    ):
        yield service


@contextmanager
def local_service(directory: Path, num_threads: int) -> Iterator[tinker.ServiceClient]:
    """Of TINKER_BASE_URL, where that is set."""
    if os.environ.get("TINKER_BASE_URL"):
        with tinker.ServiceClient() as service:
            yield service
        return
    config = {
        "supported_models": [{"name": EMBEDDED_MODEL, "path": str(directory.absolute())}],
        "engine": {"num_threads": num_threads},
    }
    with service_of(config) as service:
        yield service


# --------------------------------------------------------------------------- the run


def measure(case: Case, rounds: int) -> Measured:
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    for round_ in range(rounds + 1):
        for way, work in case.ways.items():
            start = time.perf_counter()
            work()
            if round_:
                seconds[way].append(time.perf_counter() - start)
    return Measured(case, seconds)


def cases(
    options: argparse.Namespace, service: tinker.ServiceClient, fake: tinker.ServiceClient
) -> Iterator[Case]:
    """Made one by one, so that no model lies about while others are measured."""
    from transformers import AutoModelForCausalLM

    with (options.model / "config.json").open() as file:
        vocab_size: int = json.load(file)["vocab_size"]
    trainer = service.create_lora_training_client(EMBEDDED_MODEL, rank=RANK, seed=0).result()
    for text in options.shapes:
        batch, length = (int(part) for part in text.split("x"))
        ways = {OURS: sdk_step(trainer, sdk_data((batch, length), vocab_size))}
        if not options.alone:
            data = make_data(batch, length, vocab_size)
            ways[THEIRS] = peft_step(options.model, data, narrow=False)
        yield Case(f"training step {text}, rank {RANK}", ways, batch * length)
    sampler = service.create_sampling_client(base_model=EMBEDDED_MODEL).result()
    model: Any = None
    if not options.alone:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    for num in options.concurrency:
        ways = {OURS: sdk_samples(sampler, num, vocab_size)}
        if model is not None:
            ways[THEIRS] = generation(model, num, vocab_size)
        name = f"sampling, {num} at once, {PROMPT_TOKENS} + {NEW_TOKENS} tokens"
        yield Case(name, ways, num * NEW_TOKENS)
    yield from fixed_costs(trainer, "local engine")
    small = fake.create_lora_training_client(FAKE_MODEL, rank=4).result()
    yield from fixed_costs(small, "fake backend")


def show(results: Sequence[Measured], console: Console) -> None:
    table = Table(title=f"medians; {platform.machine()}, {torch.get_num_threads()} threads")
    for column in ("work", OURS, THEIRS, "ratio"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for result in results:
        table.add_row(result.case.name, result.figure(OURS), result.figure(THEIRS), result.ratio())
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of the embedded model")
    parser.add_argument("--shapes", nargs="*", default=["8x128", "8x512", "32x256"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="counted ones, after the first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", action="store_true", help="leave transformers and PEFT out")
    parser.add_argument("--json", type=Path, help="file that receives all times, in seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    results = []
    with ExitStack() as stack:
        service = stack.enter_context(local_service(options.model, options.threads))
        fake = stack.enter_context(service_of({}))
        for case in cases(options, service, fake):
            # The smallest requests take milliseconds: many rounds cost nothing.
            rounds = options.rounds if case.amount else 30 * options.rounds
            results.append(measure(case, rounds))
            done = results[-1]
            console.print(
                f"{case.name}: {done.figure(OURS)}  {done.figure(THEIRS)}  {done.ratio()}"
            )
    show(results, console)
    if options.json is not None:
        times = {result.case.name: result.seconds for result in results}
        options.json.write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()
