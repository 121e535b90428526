"""Fixed cost of a call to the engine process, without the engine: ``python -m benchmarks.ipc``.

The other end of the socket pair is a process that answers at once, with the frames, the socket
settings and the reading thread of ``training.engine.process``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import time

import numpy as np

from training.backends import ipc
from training.backends.base import Datum, SampleRequest, TrainOp, TrainOutput, TrainUnit

ROUNDS = 2000


def unit_of(num_tokens: int) -> TrainUnit:
    """``num_tokens`` in sequences of 512, with cross entropy weights."""
    data = [
        Datum(
            np.arange(512, dtype=np.int32),
            np.arange(512, dtype=np.int64),
            {"weights": np.ones(512, np.float32)},
        )
        for _ in range(num_tokens // 512)
    ]
    return TrainUnit([TrainOp(0, "cross_entropy", {}, data)])


def sample_of(num_tokens: int) -> SampleRequest:
    return SampleRequest("request", None, np.arange(num_tokens, dtype=np.int32), 1, 64, 0)


def answer_all(sock: socket.socket) -> None:
    """Answers a unit with logprobs of its size, all else with nothing."""
    while (message := ipc.receive(sock)) is not None:
        assert isinstance(message, ipc.Call)
        value: object = None
        if isinstance(message.command, ipc.ForwardBackward):
            value = [
                TrainOutput([np.zeros(len(d.targets), np.float32) for d in op.data], {})
                for op in message.command.unit.ops
            ]
        ipc.send(sock, ipc.Reply(message.call_id, value))


async def measure(name: str, command: ipc.Command, sock: socket.socket, rounds: int) -> None:
    loop = asyncio.get_running_loop()
    seconds = []
    for number in range(rounds):
        started_at = time.perf_counter()
        await ipc.send_async(loop, sock, ipc.Call(number, command))
        await ipc.receive_async(loop, sock)
        seconds.append(time.perf_counter() - started_at)
    micros = [each * 1e6 for each in seconds]
    p50, p99 = statistics.median(micros), statistics.quantiles(micros, n=100)[98]
    print(f"{name:<34} median {p50:9.1f} us   p99 {p99:9.1f} us")


async def main() -> None:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ipc.SOCKET_BUFFER_BYTES)
    child = multiprocessing.get_context("fork").Process(target=answer_all, args=(theirs,))
    child.start()
    theirs.close()
    ours.setblocking(False)
    await measure("empty (cancel an unknown id)", ipc.Cancel("nobody"), ours, ROUNDS)
    await measure("sample, prompt of 512 tokens", ipc.Sample(sample_of(512)), ours, ROUNDS)
    for num_tokens in (2048, 16384, 131072):
        command = ipc.ForwardBackward(unit_of(num_tokens))
        await measure(f"forward_backward, {num_tokens} tokens", command, ours, 200)
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
    child.join()


if __name__ == "__main__":
    asyncio.run(main())
