"""What idle sessions cost a busy one: its speed with their heartbeats and without, in turn.

    python -m benchmarks.idle_sessions [--sessions 5000] [--model MODEL_DIRECTORY]

Each idle session has a connection of its own and beats every 10 s, as the SDK does. The busy one
trains through the official SDK: on the fake model, where nothing but the service takes time, or on
a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
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
import tinker
import uvloop
from tinker import types

from benchmarks.load_http import Http
from tests.servers import FAKE_MODEL, REPOSITORY, clean_environment, running_server
from training.config import EMBEDDED_MODEL

HEARTBEAT_S = 10.0
AT_ONCE = 50
"""Sessions that are opened at the same moment."""


async def idle(port: int, api_key: str, num: int) -> None:
    """Opens the sessions, says so, and beats while the last line read was "on"."""
    sessions: list[tuple[Http, dict[str, Any]]] = []
    for _ in range(0, num, AT_ONCE):
        clients = [Http(port, api_key) for _ in range(min(AT_ONCE, num - len(sessions)))]
        created = await asyncio.gather(
            *(http.post("/create_session", {"tags": [], "user_metadata": {}}) for http in clients)
        )
        sessions += [
            (http, {"session_id": answer.json()["session_id"], "type": "session_heartbeat"})
            for http, answer in zip(clients, created, strict=True)
        ]
    is_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(is_on.set if line.strip() == "on" else is_on.clear)

    threading.Thread(target=listen, daemon=True).start()

    async def beats(place: int) -> None:
        http, body = sessions[place]
        await asyncio.sleep(HEARTBEAT_S * place / num)
        next_s = loop.time()
        while True:
            await is_on.wait()
            assert (await http.post("/session_heartbeat", body)).status == 200
            next_s += HEARTBEAT_S
            await asyncio.sleep(max(next_s - loop.time(), 0.0))

    print("ready", flush=True)
    await asyncio.gather(*(beats(place) for place in range(num)))


def processor_s(pid: int) -> float:
    """Seconds that a process has computed for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Busy:
    """A client whose steps are counted."""

    def __init__(self, base_url: str, api_key: str, model: str, tokens: int) -> None:
        self._service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
        self._trainer = self._service.create_lora_training_client(model, rank=8, seed=1).result()
        row = np.random.default_rng(0).integers(3, 500, tokens + 1).tolist()
        inputs = {"target_tokens": row[1:], "weights": [1.0] * tokens}
        self._data = [types.Datum(types.ModelInput.from_ints(row[:-1]), loss_fn_inputs=inputs)]

    def step_s(self, window_s: float) -> float:
        """Seconds of a step, over ``window_s``."""
        start, steps = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start) < window_s:
            losses = self._trainer.forward_backward(self._data, "cross_entropy")
            self._trainer.optim_step(types.AdamParams(learning_rate=1e-4)).result()
            losses.result()
            steps += 1
        return elapsed_s / steps

    def close(self) -> None:
        self._service.close("success").result()


def measure(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tinkercloud-idle-"))
        )
        config: dict[str, Any] = {}
        name = FAKE_MODEL
        if options.model is not None:
            name = EMBEDDED_MODEL
            config = {"supported_models": [{"name": name, "path": str(options.model.absolute())}]}
        server = stack.enter_context(running_server(directory, config))
        port = server.base_url.rsplit(":", 1)[1]
        crowd = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.idle_sessions"),
                *("--child", port, server.api_key),
                *("--sessions", str(options.sessions)),
            ],
            cwd=REPOSITORY,
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(crowd.wait)
        stack.callback(crowd.kill)
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        assert crowd.stdout.readline().strip() == "ready"
        shares = []
        for way in ("off", "on"):
            crowd.stdin.write(way + "\n")
            crowd.stdin.flush()
            time.sleep(HEARTBEAT_S)
            before_s = processor_s(server.process.pid)
            time.sleep(2 * HEARTBEAT_S)
            shares.append((processor_s(server.process.pid) - before_s) / (2 * HEARTBEAT_S))
        busy = Busy(server.base_url, server.api_key, name, options.tokens)
        stack.callback(busy.close)
        busy.step_s(options.window_s)
        taken: dict[str, list[float]] = {"off": [], "on": []}
        for number in range(options.rounds):
            for way in ("off", "on") if number % 2 else ("on", "off"):
                crowd.stdin.write(way + "\n")
                crowd.stdin.flush()
                time.sleep(1.0)
                taken[way].append(busy.step_s(options.window_s))
        print(
            f"{options.sessions} idle sessions take {100 * shares[1]:.1f} % of one processor, "
            f"their connections alone {100 * shares[0]:.1f} %"
        )
        alone_s, beside_s = statistics.median(taken["off"]), statistics.median(taken["on"])
        best = min(taken["off"]), min(taken["on"])
        print(
            f"a step of the busy one takes {1000 * beside_s:.1f} "
            f"ms beside them, {1000 * alone_s:.1f} ms alone ({100 * (beside_s / alone_s - 1):+.1f} "
            f"%; best of each {100 * (best[1] / best[0] - 1):+.1f} %)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=5000)
    parser.add_argument("--model", type=Path, help="a real model's directory; else the fake one")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--window-s", type=float, default=4.0)
    parser.add_argument("--child", nargs=2, metavar=("PORT", "KEY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        os.nice(10)  # on other machines they would not take the server's processor
        uvloop.run(idle(int(options.child[0]), options.child[1], options.sessions))
    else:
        measure(options)


if __name__ == "__main__":
    main()
