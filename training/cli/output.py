"""What every command prints with: results to stdout, everything else to stderr."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape

from training import __version__

out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)


def print_error(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}")


def package_version(package: str) -> str | None:
    """Of an installed distribution, without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_versions() -> None:
    out.print(f"tinkercloud {__version__}")
    out.print(f"python {platform.python_version()}")
    for package in ("torch", "transformers", "tinker"):
        out.print(f"{package} {package_version(package) or 'not installed'}")


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
