"""Builds the kernels with the machine's C++ compiler, once per version of their sources.

The library lies in the user's cache directory. Nothing here loads it or knows what is in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=default", "-Wno-psabi")
COMPILERS = ("g++", "g++-14", "g++-13", "g++-12")

_log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no library, and why."""


@dataclass(frozen=True)
class Target:
    """Processors that one form of the kernels is for, by what Linux calls their abilities."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    """Of the compiler. What they allow it to use is part of ``needs``."""

    def lacks(self, processor: set[str]) -> set[str]:
        return set(self.needs - processor)


_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
TARGETS = (
    Target(
        "AMX",
        _AVX512 | {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_fp16"},
        ("-march=sapphirerapids",),
    ),
    Target("AVX-512 BF16", _AVX512 | {"avx512_bf16"}, ("-march=x86-64-v4", "-mavx512bf16")),
    Target("AVX-512", _AVX512, ("-march=x86-64-v4",)),
)
"""Fastest first: products in tile registers, of pairs of bfloat16, of fp32 that was widened."""


def library_path(target: Target | None = None) -> Path:
    """Path of the shared library, built now if it is not there (10 to 20 s): for the best target
    that this processor is one of, or for ``target``. Raises ``BuildError``.

    Several processes may do so at once: each builds its own and the last one to finish renames it
    into place.
    """
    if target is None:
        target = supported_targets()[0]
    compiler = _compiler()
    flags = (*FLAGS, *target.flags)
    path = cache_directory() / f"kernels-{_digest(compiler, flags)}.so"
    if not path.exists():
        _log.info("compiling the kernels for %s with %s (once; 10 to 20 s)", target.name, compiler)
        _build(compiler, flags, path)
    return path


def supported_targets() -> list[Target]:
    """Those whose kernels this processor can run, fastest first. Raises ``BuildError`` for none."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise BuildError(f"the kernels are for Linux on x86-64, not {platform.platform()}")
    processor = _processor_flags()
    found = [target for target in TARGETS if not target.lacks(processor)]
    if not found:
        missing = TARGETS[-1].lacks(processor)
        raise BuildError(f"this processor lacks {', '.join(sorted(missing))}")
    return found


def _processor_flags() -> set[str]:
    """As Linux reports them; asked before any code made for such a processor runs."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _compiler() -> str:
    """``CXX``, or the first g++ on the path."""
    if chosen := os.environ.get("CXX"):
        return chosen
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler (g++ 12 or newer; on Debian and Ubuntu: apt install g++)")


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(root).expanduser() / "tinkercloud"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot make {directory}: {error}") from error
    return directory


def _sources() -> list[Path]:
    return sorted(KERNELS.glob("*.cpp"))


def _digest(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join((compiler, *flags)).encode())
    for path in sorted(KERNELS.glob("*.[ch]pp")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, flags: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as temporary:
        directory = Path(temporary)
        objects = [directory / f"{source.stem}.o" for source in _sources()]

        def compile_one(source: Path, into: Path) -> None:
            _run([compiler, *flags, "-c", str(source), "-o", str(into)])

        with ThreadPoolExecutor(os.cpu_count()) as executor:
            list(executor.map(compile_one, _sources(), objects))
        library = directory / path.name
        _run([compiler, *flags, "-shared", "-o", str(library), *map(str, objects)])
        library.replace(path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        raise BuildError(f"{command[0]} failed: {(lines or ['no message'])[0]}") from error


def main() -> int:
    """``python -m training.engine.native.build``: builds now. Exit code 1 where it cannot."""
    try:
        print(f"{library_path()} ({supported_targets()[0].name})")
    except BuildError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
