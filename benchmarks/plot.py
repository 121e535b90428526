"""Draws the stored curves: ``python -m benchmarks.plot [--png DIRECTORY]``.

Each as an SVG for light and one for dark pages, into docs/images/performance/; then fills in the
tables (``benchmarks.tables``). Draws only what has been measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results, tables
from benchmarks.baselines import TUNED, VLLM
from benchmarks.children import REPOSITORY
from benchmarks.workload import OURS

IMAGES = REPOSITORY / "docs" / "images" / "performance"
FONT = "DejaVu Sans"
READERS_FONTS = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
"""Those of the page; narrower than the one that lays the plot out, so all fits."""
WIDTH, HEIGHT = 7.6, 3.9  # inches; GitHub shows about 830 pixels


class Theme(NamedTuple):
    text: str
    faint: str
    ours: str
    ours_too: str
    baseline: str
    baseline_too: str


THEMES = {
    "light": Theme("#1f2328", "#d1d9e0", "#0969da", "#54aeff", "#bc4c00", "#9a6700"),
    "dark": Theme("#f0f6fc", "#3d444d", "#4493f8", "#a5d6ff", "#f0883e", "#d29922"),
}
TITLES = {
    "batch": "Training: tokens per second against batch size",
    "length": "Training: tokens per second against sequence length",
    "tenants": "Training: tokens per second against tenants",
    "rank": "Training: tokens per second against LoRA rank",
    "concurrency": "Sampling: tokens per second against requests at once",
    "first_token": "Sampling: time to the first token against prompt length",
    "memory_batch": "Training: peak memory against batch size",
    "memory_length": "Training: peak memory against sequence length",
}
LOGARITHMIC = ("first_token", "concurrency")


class Line(NamedTuple):
    color: str
    style: str
    marker: str


def line_of(way: str, theme: Theme) -> Line:
    """The same way looks the same in every plot."""
    if way == OURS:
        return Line(theme.ours, "-", "o")
    if way.startswith(OURS):
        return Line(theme.ours_too, "-", "s")
    if way.startswith(TUNED.name):
        return Line(theme.baseline_too, "-", "v")
    if way.startswith(("PEFT", VLLM)):
        return Line(theme.baseline, "-", "^")
    raise KeyError(way)


def new_axes(theme: Theme, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_title(title, loc="left", color=theme.text, fontsize=11.5, fontweight="bold", pad=30)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(colors=theme.text, length=0, labelsize=9.5)
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes, theme: Theme) -> None:
    drawn = axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=5,
        frameon=False,
        labelcolor=theme.text,
        fontsize=9.5,
        handlelength=1.3,
        columnspacing=0.8,
        handletextpad=0.5,
        borderpad=0.2,
    )
    drawn.set_in_layout(False)  # else a long one would squeeze the axes


def draw_curve(part: Mapping[str, Any], name: str, theme: Theme) -> Figure:
    figure, axes = new_axes(theme, TITLES[name])
    for way, points in part["series"].items():
        line = line_of(way, theme)
        axes.plot(
            *zip(*points, strict=True),
            label=way,
            color=line.color,
            linestyle=line.style,
            marker=line.marker,
            linewidth=2.2 if way == OURS else 1.6,
            markersize=5,
            zorder=3 if way == OURS else 2,
        )
    if "machine" in part:
        points = part["machine"]["points"]
        label = f"limit: {part['machine']['limit']}"
        color = theme.text
        axes.plot(*zip(*points, strict=True), "--", label=label, color=color, linewidth=1.2)
        label_shares(axes, part, theme)
    xs = sorted({x for points in part["series"].values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    pad = 24 if "machine" in part else 4
    axes.set_xlabel(part["x"], color=theme.text, fontsize=9.5, labelpad=pad)
    axes.set_ylabel(part["unit"], color=theme.text, fontsize=9.5)
    if name in LOGARITHMIC:
        axes.set_yscale("log")
        axes.set_yticks(steps_between(*axes.get_ylim()))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    legend(axes, theme)
    return figure


def steps_between(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... as far as they lie within."""
    steps = [digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def label_shares(axes: Axes, part: Mapping[str, Any], theme: Theme) -> None:
    """How much of the limit ours reaches at each of its points: a row under the numbers of x, where
    no line is in the way."""
    limits = dict(part["machine"]["points"])
    rising = part["unit"] == "tokens/s"
    shares = {x: y / limits[x] if rising else limits[x] / y for x, y in part["series"][OURS]}
    text: dict[str, Any] = {"y": -0.155, "fontsize": 9.0, "color": theme.ours}
    axes.text(-0.01, s="of limit", ha="right", transform=axes.transAxes, **text)
    for x, share in shares.items():
        place = axes.get_xaxis_transform()
        axes.text(x, s=f"{100 * share:.0f} %", ha="center", transform=place, **text)


def draw_latencies(part: Mapping[str, Any], theme: Theme) -> Figure:
    """Every latency as a dot: the spread matters more than the mean."""
    figure, axes = new_axes(theme, "Sampling: latency, alone and while another tenant trains")
    names = []
    colors = {"alone": theme.ours, "while another tenant trains": theme.baseline}
    for row, (work, states) in enumerate(part["latencies_ms"].items()):
        names.append(work)
        for number, (state, all_ms) in enumerate(states.items()):
            heights = [row - 0.16 + 0.32 * number] * len(all_ms)
            label = state if row == 0 else None
            color = colors[state]
            axes.plot(all_ms, heights, "o", color=color, alpha=0.55, markersize=6, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms", color=theme.text, fontsize=9.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)
    legend(axes, theme)
    return figure


def draw(name: str, part: Mapping[str, Any], theme: Theme) -> Figure:
    if name == "while_training":
        return draw_latencies(part, theme)
    return draw_curve(part, name, theme)


def save_all(
    curves: Mapping[str, Any], suffix: str, directory: Path, say: Callable[[str], None] = print
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in curves.items():
        for theme_name, theme in THEMES.items():
            figure = draw(name, part, theme)
            path = directory / f"{name}-{theme_name}.{suffix}"
            if suffix == "png":  # to look at: pages are not transparent there
                figure.patch.set_alpha(1)
                figure.patch.set_facecolor("#ffffff" if theme_name == "light" else "#0d1117")
                figure.savefig(path, dpi=120)
            else:
                figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
                path.write_text(path.read_text().replace(f"'{FONT}'", READERS_FONTS))
        say(f"{directory.name}/{name}.{suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--png", type=Path, help="draw here, to look at, and change no document")
    parser.add_argument("--directory", type=Path, default=results.DIRECTORY, help="of the results")
    options = parser.parse_args()
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "tinkercloud",
        "font.family": FONT,
    }
    curves = results.load("curves", options.directory)
    if options.png is not None:
        save_all(curves, "png", options.png)
        return
    save_all(curves, "svg", IMAGES)
    tables.main()


if __name__ == "__main__":
    main()
