"""Many clients at once: are all answers right, and does the server stay quick and small?

    python -m benchmarks.load [--clients 500] [--seconds 300] [--json out.json]

A server of the fake model (exact arithmetic, every call of which takes a while, so that all queues
are full) and clients in processes of their own, over loopback. Each client knows every answer
beforehand. Another process asks for health and sends heartbeats every 50 ms. Told in the end:
errors, lost and duplicated results, requests per second, latencies of the probes, the memory of the
server over time, 429s. The database is counted too. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from benchmarks.memory import memory_of
from tests.servers import (
    FAKE_MODEL,
    REPOSITORY,
    Server,
    clean_environment,
    fake_model,
    running_server,
)

NUM_KEYS = 8
PROCESSES = 2
SAMPLE_EVERY_S = 1.0
_GAUGE = re.compile(r"^(tinkercloud_(?:queued_operations|pending_samples)) (\S+)$", re.MULTILINE)


class Sample(NamedTuple):
    """Of the server, ``at_s`` after the start of the load."""

    at_s: float
    rss_mib: float
    database_mib: float
    queued: float
    samples: float


class Report(NamedTuple):
    clients: int
    seconds: float
    """With all clients there, until they were told to end."""
    counts: dict[str, Any]
    """Of all clients together (``load_client.Counts``)."""
    requests_s: float
    probes_ms: dict[str, dict[str, float]]
    """Health and heartbeat: p50, p99, max."""
    samples: list[Sample]
    stored: dict[str, int]
    """Rows of futures by status, in the end."""

    def problems(self) -> list[str]:
        counts = self.counts
        found = [f"{num} x {what}" for what, num in counts["errors"].items()]
        found += [f"{counts[name]} {name}" for name in ("lost", "duplicated") if counts[name]]
        if self.stored != {"done": counts["accepted"]}:
            found.append(f"accepted {counts['accepted']}, but stored: {self.stored}")
        return found


@contextmanager
def _processes(
    module: str, settings: Sequence[dict[str, Any]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Children that get their settings as JSON, end at a line, and answer with JSON."""
    with ExitStack() as stack:
        children = []
        for each in settings:
            child = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(each)],
                cwd=REPOSITORY,
                env=clean_environment() | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(child)
            stack.callback(child.kill)  # does nothing to one that has ended
            children.append(child)
        yield children


def _end(children: Sequence[subprocess.Popen[bytes]]) -> list[Any]:
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    answers = []
    for child in children:
        out, _ = child.communicate()
        if child.returncode != 0:
            raise SystemExit(f"a process of the load test ended with {child.returncode}")
        answers.append(json.loads(out))
    return answers


def _look(server: Server, database: Path, started_s: float, http: httpx.Client) -> Sample:
    gauges = dict(_GAUGE.findall(http.get("/metrics").text))
    num_bytes = sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))
    return Sample(
        time.monotonic() - started_s,
        memory_of(server.process.pid).steady_mib,
        num_bytes / 2**20,
        float(gauges["tinkercloud_queued_operations"]),
        float(gauges["tinkercloud_pending_samples"]),
    )


def _added(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for each in counts:
        for name, value in each.items():
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            else:
                total[name] = total.get(name, 0) + value
    return total


def _stored(database: Path) -> dict[str, int]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        query = "SELECT status, count(*) FROM futures GROUP BY status"
        return dict(connection.execute(query).fetchall())


def measure(
    directory: Path,
    clients: int,
    seconds: float,
    ramp_s: float,
    delay_s: float,
    steps: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> Report:
    """``steps``: each client ends after so many, however long that takes. ``more``: settings of the
    server."""
    keys = [f"load-{number}" for number in range(NUM_KEYS)]
    config = {
        "supported_models": [fake_model(delay_s=delay_s)],
        "auth": {"api_keys": keys},
        "server": {"long_poll_s": 25.0},
        **(more or {}),
    }
    per_process = -(-clients // PROCESSES)
    with (
        running_server(directory, config) as server,
        httpx.Client(base_url=server.base_url) as http,
    ):
        port = int(server.base_url.rsplit(":", 1)[1])
        database = directory / "metadata" / "futures.db"
        common = {"port": port, "api_keys": [f"tml-{key}" for key in keys]}
        settings = [
            common
            | {
                "model": FAKE_MODEL,
                "clients": min(per_process, clients - first),
                "first": first,
                "ramp_s": ramp_s,
                "steps": steps,
            }
            for first in range(0, clients, per_process)
        ]
        with (
            _processes("benchmarks.load_client", settings) as crowd,
            _processes("benchmarks.load_probe", [common]) as probe,
        ):
            started_s = time.monotonic()
            samples: list[Sample] = []
            while (left_s := started_s + ramp_s + seconds - time.monotonic()) > 0:
                samples.append(_look(server, database, started_s, http))
                time.sleep(min(SAMPLE_EVERY_S, left_s))
            (latencies,) = _end(probe)
            counts = _added(_end(crowd))
            elapsed_s = time.monotonic() - started_s
        return Report(
            clients,
            seconds,
            counts,
            counts["requests"] / elapsed_s,
            {what: _quantiles(all_, ramp_s) for what, all_ in latencies.items()},
            samples,
            _stored(database),
        )


def _quantiles(latencies: Sequence[tuple[float, float]], after_s: float) -> dict[str, float]:
    """Of (when, how long) in seconds; those of the ramp do not count."""
    values_ms = [1000 * each for at_s, each in latencies if at_s >= after_s] or [0.0]
    p50, p99 = np.percentile(values_ms, [50, 99])
    return {"num": len(values_ms), "p50": p50, "p99": p99, "max": max(values_ms)}


def show(report: Report, ramp_s: float) -> None:
    counts = report.counts
    print(
        f"{report.clients} clients, {report.seconds:g} s: {counts['requests']:,} requests "
        f"({report.requests_s:,.0f}/s), {counts['accepted']:,} promises, {counts['steps']:,} "
        f"training steps, {counts['samples']:,} samples"
    )
    print(
        f"sent twice {counts['sent_twice']:,}, asked twice {counts['asked_twice']:,}; "
        f"duplicated {counts['duplicated']}, lost {counts['lost']}, "
        f"errors {sum(counts['errors'].values())}; 429: {counts['busy']:,} "
        f"(Retry-After {counts['retry_after'] or 'none'})"
    )
    for what, values in report.probes_ms.items():
        print(
            f"{what}: p50 {values['p50']:.1f} ms, p99 {values['p99']:.1f} ms, "
            f"max {values['max']:.1f} ms of {values['num']}"
        )
    full = [each for each in report.samples if each.at_s >= ramp_s]
    print(
        f"queued operations at least {min(each.queued for each in full):,.0f}, pending samples at "
        f"least {min(each.samples for each in full):,.0f}"
    )
    for place in ("start", "middle", "end"):
        each = full[{"start": 0, "middle": len(full) // 2, "end": -1}[place]]
        print(
            f"{place}: after {each.at_s:.0f} s RSS {each.rss_mib:.0f} MiB, "
            f"database {each.database_mib:.0f} MiB"
        )
    second_half = full[len(full) // 2 :]
    if len(second_half) > 2:
        slope = np.polyfit([e.at_s for e in second_half], [e.rss_mib for e in second_half], 1)[0]
        print(f"RSS in the second half: {60 * slope:+.2f} MiB a minute")
    for problem in report.problems():
        print(f"WRONG: {problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--ramp-s", type=float, default=20.0, help="in which clients arrive")
    parser.add_argument("--delay-s", type=float, default=0.05, help="of each call of the fake")
    parser.add_argument("--json", type=Path, help="where all figures are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tinkercloud-load-") as directory:
        report = measure(
            Path(directory), options.clients, options.seconds, options.ramp_s, options.delay_s
        )
    show(report, options.ramp_s)
    if options.json is not None:
        options.json.write_text(json.dumps(report._asdict(), indent=1) + "\n")
    sys.exit(1 if report.problems() else 0)


if __name__ == "__main__":
    main()
