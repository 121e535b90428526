"""Tables of documents, made from the stored measurements: ``python -m benchmarks.tables``.

A document says where: ``<!-- table: NAME -->`` up to ``<!-- end -->`` is replaced. Nothing else in
it is touched, so that no figure is ever copied by hand.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.baselines import GENERATE, TUNED, VLLM, WRITTEN
from benchmarks.children import REPOSITORY
from benchmarks.workload import IN_BACKEND, OURS, Case

DOCUMENTS = (REPOSITORY / "docs" / "performance.md", REPOSITORY / "README.md")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "*not measured yet*"

Row = Sequence[str]
Measured = Mapping[str, Any]
"""The parts of one file of results."""


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Raises ``KeyError`` for the name of a table that does not exist."""
    return _MARKED.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", text)


def markdown(columns: Row, rows: Iterable[Row]) -> str:
    """The first column is text, the others are figures."""
    align = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, align, *rows))


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def all_tables(compare: Measured, curves: Measured) -> dict[str, str]:
    tables = {}
    for name, (part, make) in COMPARED.items():
        tables[name] = make(compare[part]) if part in compare else NOT_MEASURED
    tables["machine"] = machine({**compare, **curves}) if compare or curves else NOT_MEASURED
    for name in CURVES:
        tables[f"curve_{name}"] = curve(curves[name]) if name in curves else NOT_MEASURED
    tables["summary"] = summary(compare)
    part = "while_training"
    tables[part] = while_training(curves[part]) if part in curves else NOT_MEASURED
    return tables


# --------------------------------------------------------------------------- comparisons


def cases_of(part: Measured) -> list[Case]:
    return [Case.from_json(each) for each in part["cases"]]


def beside(part: Measured, baselines: Sequence[str]) -> str:
    """A row for each case: ours, each baseline, how many times faster ours is, and how near it
    comes to the machine's limit."""
    cases = cases_of(part)
    there = [way for way in baselines if any(way in case.seconds for case in cases)]
    columns = ["work", OURS, *there, *(f"ratio to {way}" for way in there), "limit", "reached"]
    rows = []
    for case in cases:
        limit = part["machine"][case.name]
        rows.append(
            [
                case.name,
                *(case.shown(way) for way in (OURS, *there)),
                *(times(case.ratio(OURS, way)) if way in case.seconds else "" for way in there),
                f"{limit:,.0f}",
                f"{100 * case.figure(OURS) / limit:.0f} %",
            ]
        )
    return markdown(columns, rows)


def train(part: Measured) -> str:
    return beside(part, (WRITTEN.name, TUNED.name))


def tuning(part: Measured) -> str:
    """Every way that was tried, and its memory."""
    case = cases_of(part)[0]
    rows = (
        [way, case.shown(way), f"{part['sizes'][way]['peak_mib']:,.0f} MiB"] for way in case.seconds
    )
    return markdown([case.name, "speed", "peak memory"], rows)


def tenants(part: Measured) -> str:
    rows = []
    for case in cases_of(part):
        for way in (OURS, IN_BACKEND, WRITTEN.name):
            many = f"{way}, 8 tenants"
            if many not in case.seconds:
                continue
            share = f"{100 * case.figure(many) / case.figure(way):.0f} %"
            rows.append([f"{case.name}: {way}", case.shown(way), case.shown(many), share])
    return markdown(["8 x 128 tokens", "one tenant", "8 tenants", "of the one"], rows)


def sample(part: Measured) -> str:
    return beside(part, (VLLM, GENERATE))


def adapters(part: Measured) -> str:
    base = f"{OURS}, base model"
    rows = []
    for case in cases_of(part):
        limit = part["machine"][case.name]
        rows.append(
            [
                case.name,
                *map(case.shown, (OURS, VLLM, base)),
                f"{100 * case.figure(OURS) / case.figure(base):.0f} %",
                f"{limit:,.0f}",
                f"{100 * case.figure(OURS) / limit:.0f} %",
            ]
        )
    columns = ["work", OURS, "vLLM", f"{OURS}, base model", "of that", "limit", "reached"]
    return markdown(columns, rows)


def fixed(part: Measured) -> str:
    ways = ("client", "backend", "service")
    rows = ([case.name, *map(case.shown, ways)] for case in cases_of(part))
    return markdown(["work", "as the client sees it", "in the backend", "the service adds"], rows)


def memory(part: Measured) -> str:
    rows = [
        [name, f"{size['steady_mib']:,.0f} MiB", f"{size['peak_mib']:,.0f} MiB"]
        for name, size in part["sizes"].items()
    ]
    return markdown(
        [f"after {part['steps']} steps of {part['shape']} tokens", "at rest", "peak"], rows
    )


def summary(compare: Measured) -> str:
    """The figures of a README, of whatever has been measured."""
    rows = []
    for part, way in (("train", WRITTEN.name), ("sample", VLLM)):
        for case in cases_of(compare[part]) if part in compare else ():
            there = way if way in case.seconds else GENERATE
            shown = f"{there}: {case.shown(there)}"
            rows.append([case.name, case.shown(OURS), shown, times(case.ratio(OURS, there))])
    return markdown(["work", OURS, "baseline", "ratio"], rows)


COMPARED: Mapping[str, tuple[str, Callable[[Measured], str]]] = {
    "train": ("train", train),
    "tuning": ("tuning", tuning),
    "tenants": ("tenants", tenants),
    "sample": ("sample", sample),
    "adapters": ("adapters", adapters),
    "fixed": ("fixed", fixed),
    "memory": ("memory", memory),
}
"""Name of the table: the part of compare.json it is made of, and how."""


# --------------------------------------------------------------------------- machine, curves


def machine(parts: Measured) -> str:
    """What the limits were, over all parts: they drift."""

    def spread(key: str, unit: float) -> str:
        values = [part["limits"][key] / unit for part in parts.values()]
        return f"{min(values):.2f} to {max(values):.2f}"

    rows = [
        ["products in bfloat16, TFLOP/s", spread("gemm_flops", 1e12)],
        ["memory read, GB/s", spread("memory_bytes_s", 1e9)],
        ["as much as the weights read again, GB/s", spread("weights_bytes_s", 1e9)],
    ]
    first = next(iter(parts.values()))["limits"]
    return markdown([f"{first['processor']}, {first['threads']} threads", "best of a part"], rows)


CURVES = ("batch", "length", "tenants", "rank", "concurrency", "first_token")


def curve(part: Measured) -> str:
    """A row for each x; the share of the machine's limit that ours reaches."""
    series = {way: dict(points) for way, points in part["series"].items()}
    limits = dict(part["machine"]["points"])
    rising = part["unit"] == "tokens/s"  # else less is better
    rows = []
    for x, ours in series[OURS].items():
        share = ours / limits[x] if rising else limits[x] / ours
        figures = [f"{points[x]:,.0f}" if x in points else "" for points in series.values()]
        rows.append([f"{x:g}", *figures, f"{limits[x]:,.0f}", f"{100 * share:.0f} %"])
    return markdown([part["x"], *series, "limit", "reached"], rows)


def while_training(part: Measured) -> str:
    rows = []
    for work, states in part["latencies_ms"].items():
        for state, all_ms in states.items():
            median, most = statistics.median(all_ms), max(all_ms)
            rows.append([f"{work}, {state}", f"{median:,.0f} ms", f"{most:,.0f} ms"])
    for state, all_s in part["steps_s"].items():
        median, most = 1000 * statistics.median(all_s), 1000 * max(all_s)
        rows.append(
            [f"training step {part['shape']}, {state}", f"{median:,.0f} ms", f"{most:,.0f} ms"]
        )
    return markdown(["latency", "median", "longest"], rows)


def update(document: Path, tables: Mapping[str, str]) -> bool:
    """Whether anything changed."""
    old = document.read_text()
    new = filled(old, tables)
    document.write_text(new)
    return new != old


def made() -> dict[str, str]:
    """All tables of what is stored now."""
    return all_tables(results.load("compare"), results.load("curves"))


def main() -> None:
    tables = made()
    for document in DOCUMENTS:
        print(f"{document.name}: {'changed' if update(document, tables) else 'as it was'}")


if __name__ == "__main__":
    main()
