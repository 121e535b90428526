"""Cost curves: how speed, latency and memory change with the work. ``scripts/bench curves``.

    python -m benchmarks.curves MODEL_DIRECTORY [--only batch length] [--vllm-python PATH]

Each part stands alone, begins with the machine's limits and ends in docs/performance/curves.json.
``benchmarks.plot`` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import curves_sampling as sampling
from benchmarks import curves_training as training
from benchmarks.run import Part, parser_of, run_parts

PARTS: Mapping[str, Part] = {
    "batch": training.batch,
    "length": training.length,
    "tenants": training.tenants,
    "rank": training.rank,
    "memory_batch": training.memory_batch,
    "memory_length": training.memory_length,
    "concurrency": sampling.concurrency,
    "first_token": sampling.first_token,
    "while_training": sampling.while_training,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--points", type=int, help="only so many of each curve; to try it out")
    run_parts("curves", PARTS, parser.parse_args())


if __name__ == "__main__":
    main()
