"""What must be true of a server's data after its end, and what two runs must have in common."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

Files = Mapping[str, str]
"""File name -> SHA-256."""


class Run(NamedTuple):
    """A model of one client, by the client's and the model's number: comparable between servers."""

    workload: str
    model: str


class Kept(NamedTuple):
    """What a run left behind."""

    checkpoints: Mapping[str, Files]
    operations: Sequence[str]
    """Kinds, in the order of seq_id."""


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A client's results; the last line may be torn."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def differing_lines(
    expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], name: str
) -> list[str]:
    """The first line that is not the same, told in full."""
    for number, (one, other) in enumerate(zip(expected, found, strict=False), 1):
        if one != other:
            return [f"{name} line {number}: expected {one}\n  but found {other}"]
    if len(expected) != len(found):
        return [f"{name}: {len(found)} lines instead of {len(expected)}"]
    return []


@contextmanager
def copied_database(directory: Path) -> Iterator[Path]:
    """Of a server that runs or will run again: a reader must not touch the log of its database."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (directory / "metadata").glob("futures.db*"):
            shutil.copy(path, folder)
        yield Path(folder) / "futures.db"


class Data:
    """The data of a server that has stopped. Opens its SQLite database read-only."""

    def __init__(self, directory: Path, database: Path | None = None) -> None:
        self._directory = directory
        self._database = database or directory / "metadata" / "futures.db"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()

    # ----------------------------------------------------------------- what was trained

    def kept(self) -> dict[Run, list[Kept]]:
        """Every training run of every session; sessions that never made a model have none."""
        found: dict[Run, list[Kept]] = {}
        for model_id, metadata in self.rows(
            "SELECT model_id, sessions.user_metadata FROM models JOIN sessions USING (session_id) "
            "ORDER BY models.created_at"
        ):
            run = Run(json.loads(metadata).get("workload", "?"), model_id.split(":", 1)[1])
            found.setdefault(run, []).append(self._kept_of(model_id))
        return found

    def _kept_of(self, model_id: str) -> Kept:
        saved = self.rows(
            "SELECT path, directory FROM checkpoints "
            f"WHERE training_run_id = '{model_id}' ORDER BY path"
        )
        checkpoints = {
            path.removeprefix("tinker://").split("/", 1)[1]: self._digests(directory)
            for path, directory in saved
        }
        operations = self.rows(
            f"SELECT seq, kind FROM futures WHERE scope = 'model:{model_id}' ORDER BY seq"
        )
        return Kept(checkpoints, [f"{seq} {kind}" for seq, kind in operations])

    def _digests(self, directory: str) -> Files:
        root = self._directory / "checkpoints" / directory
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.iterdir())
        }

    # ----------------------------------------------------------------- what must be true

    def problems(self) -> list[str]:
        """Empty where every promise is kept and nothing is left over."""
        return [
            *self._futures(),
            *self._models(),
            *self._snapshots(),
            *self._missing(),
            *self._orphans(),
            *self._leftovers(),
        ]

    def problems_between(self, is_orderly: bool) -> list[str]:
        """Of a server that has ended and will start again, whatever became of its engines.

        A killed one may leave directories without a row, finished or not: the next start removes
        them. One that ended in order (``is_orderly``) leaves none, and neither leaves a row without
        its directory, a snapshot of a model that has ended, or a run that is marked.
        """
        orphans = self._orphans() if is_orderly else ()
        return [*self._corrupted(), *self._snapshots(), *self._missing(), *orphans]

    def _futures(self) -> Iterator[str]:
        for status, kind, number in self.rows(
            "SELECT status, kind, count(*) FROM futures WHERE status != 'done' "
            "GROUP BY status, kind"
        ):
            yield f"{number} {kind} promises are {status}"
        for scope, number, first, last in self.rows(
            "SELECT scope, count(*), min(seq), max(seq) FROM futures WHERE scope LIKE 'model:%' "
            "GROUP BY scope"
        ):
            if (first, last) != (0, number - 1):
                yield f"{scope} has {number} operations, numbered {first} to {last}"

    def _models(self) -> Iterator[str]:
        yield from self._corrupted()
        for model_id, status in self.rows(
            "SELECT model_id, status FROM models WHERE status != 'unloaded'"
        ):
            yield f"model {model_id} of an ended session is {status}"

    def _corrupted(self) -> Iterator[str]:
        for model_id, fault in self.rows("SELECT model_id, fault FROM models WHERE corrupted"):
            yield f"model {model_id} is marked corrupted: {fault}"

    def _snapshots(self) -> Iterator[str]:
        """Of models that have ended: rows, with their directories, that nobody would remove."""
        for model_id, status, number in self.rows(
            "SELECT model_id, coalesce(status, 'gone'), count(*) FROM snapshots "
            "LEFT JOIN models USING (model_id) "
            "WHERE coalesce(status, 'gone') NOT IN ('creating', 'ready') GROUP BY model_id, status"
        ):
            yield f"{number} snapshots of model {model_id} are kept, which is {status}"

    def _missing(self) -> Iterator[str]:
        for table, on_disk in self._on_disk():
            known = {directory for (directory,) in self.rows(f"SELECT directory FROM {table}")}
            if missing := known - on_disk:
                yield f"{len(missing)} {table} have no directory: {sorted(missing)[:3]}"

    def _orphans(self) -> Iterator[str]:
        """Samplers without a name have directories too, as long as their session is active."""
        used = {
            snapshot_id
            for (snapshot_id,) in self.rows(
                "SELECT snapshot_id FROM sampling_sessions JOIN sessions USING (session_id) "
                "WHERE sessions.status = 'active'"
            )
        }
        for table, on_disk in self._on_disk():
            known = {directory for (directory,) in self.rows(f"SELECT directory FROM {table}")}
            if orphans := on_disk - known - used:
                yield f"{len(orphans)} directories of {table} have no row: {sorted(orphans)[:3]}"
        for staging in self._directory.rglob(".staging"):
            if left := list(staging.iterdir()):
                yield f"{len(left)} unfinished directories are left in {staging}"

    def _on_disk(self) -> Iterator[tuple[str, set[str]]]:
        """Table -> directories in its place."""
        for table, place in (("checkpoints", "checkpoints"), ("snapshots", "metadata/snapshots")):
            root = self._directory / place
            yield table, {path.name for path in root.iterdir() if not path.name.startswith(".")}

    def _leftovers(self) -> Iterator[str]:
        spill = self._directory / "metadata" / "spill"
        if left := [path for path in spill.rglob("*") if path.is_file() and path.name != "lock"]:
            yield f"{len(left)} spill files are left: {left[:3]}"
        for table in ("payloads", "results"):
            ((number,),) = self.rows(
                f"SELECT count(*) FROM {table} JOIN futures USING (request_id) "
                "JOIN sessions USING (session_id) WHERE sessions.status != 'active'"
            )
            if number:
                yield f"{number} {table} of ended sessions are kept"


def differing_runs(
    expected: Mapping[Run, list[Kept]], found: Mapping[Run, list[Kept]]
) -> list[str]:
    """Each run of ``found`` against the one of the undisturbed server; bytes and order."""
    problems = [f"{run.workload} {run.model} is missing" for run in expected if run not in found]
    for run, all_kept in found.items():
        wanted = expected[run][0] if run in expected else Kept({}, [])
        for number, kept in enumerate(all_kept):
            name = f"{run.workload} {run.model}, round {number}"
            if kept.operations != wanted.operations:
                problems.append(f"{name}: other operations: {_first_other(wanted, kept)}")
            if set(kept.checkpoints) != set(wanted.checkpoints):
                problems.append(f"{name}: other checkpoints: {sorted(kept.checkpoints)}")
            for checkpoint, files in wanted.checkpoints.items():
                if files != kept.checkpoints.get(checkpoint, files):
                    problems.append(f"{name}: {checkpoint} has other bytes")
    return problems


def _first_other(wanted: Kept, kept: Kept) -> str:
    for one, other in zip(wanted.operations, kept.operations, strict=False):
        if one != other:
            return f"{other} instead of {one}"
    return f"{len(kept.operations)} instead of {len(wanted.operations)}"
