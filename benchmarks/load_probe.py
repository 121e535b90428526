"""How long health and heartbeats take while the server is under load: asked every 50 ms.

    python -m benchmarks.load_probe '{"port": 8000, "api_keys": [...]}'

Started by ``benchmarks.load``. Reads one line to stop; prints of each when it was asked and how
long it took, in seconds, as JSON.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import uvloop

from benchmarks.load_http import Answer, Http

EVERY_S = 0.05
Taken = list[tuple[float, float]]


async def run(port: int, api_keys: list[str]) -> dict[str, Taken]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    told = loop.run_in_executor(None, sys.stdin.readline)
    told.add_done_callback(lambda _: stop.set())
    http = Http(port, api_keys[0])
    created = await http.post("/create_session", {"tags": [], "user_metadata": {}})
    beat = {"session_id": created.json()["session_id"], "type": "session_heartbeat"}
    started_s = time.perf_counter()
    taken: dict[str, Taken] = {"health": [], "heartbeat": []}

    async def timed(what: str, ask: Callable[[], Awaitable[Answer]]) -> None:
        asked_s = time.perf_counter()
        answer = await ask()
        assert answer.status == 200, answer
        taken[what].append((asked_s - started_s, time.perf_counter() - asked_s))

    asking: list[asyncio.Task[None]] = []
    next_s = started_s
    while not stop.is_set():
        asking.append(asyncio.create_task(timed("health", lambda: http.get("/health"))))
        asking.append(
            asyncio.create_task(timed("heartbeat", lambda: http.post("/session_heartbeat", beat)))
        )
        next_s += EVERY_S
        await asyncio.sleep(max(next_s - time.perf_counter(), 0.0))
    await asyncio.gather(*asking)
    await http.post(f"/sessions/{beat['session_id']}/finish", {"reason": {"type": "success"}})
    await http.close()
    return taken


def main() -> None:
    settings: dict[str, Any] = orjson.loads(sys.argv[1])
    print(orjson.dumps(uvloop.run(run(**settings))).decode())


if __name__ == "__main__":
    main()
