"""The figure of a frontier: each score of SAEs of several sparsities against their L0."""

from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from matryoshka import plots
from matryoshka.frontier import Lines, by_target, mean

PANELS = {
    "fvu": "FVU (lower is better)",
    "loss_recovered": "loss recovered (higher is better)",
    "absorption": "absorption (lower is better)",
    "mean_highest_cosine": "mean highest cosine (lower is less alike)",
}
DASHES: dict[str, Literal["-", "--", ":", "-."]] = {  # of activations
    "relu": "-", "batchtopk": "--", "topk": ":", "jumprelu": "-."
}  # fmt: skip


def draw(path: str | Path, lines: Lines) -> None:
    """The four scores against L0: a dot an SAE, a line through the means of each target L0."""
    plots._write(path, _figure(lines))


@plots._style
def _figure(lines: Lines) -> Figure:
    figure = plots._figure(6.2)
    axes = figure.subplots(
        2, 2, gridspec_kw={"left": 0.075, "right": 0.985, "top": 0.92, "bottom": 0.075,
                           "wspace": 0.2, "hspace": 0.3},
    )  # fmt: skip
    for ax, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        _panel(ax, lines, key)
        ax.set_title(title)
        if key == "fvu":
            values = [run[key] for points in lines.values() for run in points]
            plots._log_axis(ax, np.array(values, dtype=float))
    for ax in axes[1]:
        ax.set_xlabel("L0: active latents a token (log scale)")
    handles = [
        Line2D([], [], color=_colour(name), linestyle=_dash(name), marker="o", markersize=4,
               label=f"{name}, {plots._count(len({run.get('seed') for run in points}), 'seed')}")
        for name, points in lines.items()
    ]  # fmt: skip
    plots._legend(figure, handles, 0.06)
    return figure


def _panel(ax: Axes, lines: Lines, key: str) -> None:
    seen = []
    for name, points in lines.items():
        known = [run for run in points if run.get(key) is not None]
        if not known:
            continue
        groups = by_target(known).values()
        x, y = ([mean(group, what) for group in groups] for what in ("l0", key))
        colour = _colour(name)
        ax.plot(x, y, color=colour, linestyle=_dash(name), linewidth=1.6)
        x = [run["l0"] for run in known]
        ax.plot(x, [run[key] for run in known], "o", color=colour, markersize=3.2, alpha=0.75)
        seen += x
    ax.grid(True)
    ax.set_xscale("log")
    ticks = sorted({run["target_l0"] for points in lines.values() for run in points})
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if seen:
        ax.set_xlim(min(seen) / 1.15, max(seen) * 1.15)


def _colour(name: str) -> str:
    kind, others = name.split(",")[0], [*plots.CYCLE]
    return plots.COLOURS.get(kind) or others[sum(map(ord, kind)) % len(others)]


def _dash(name: str) -> Literal["-", "--", ":", "-."]:
    return DASHES.get(name.split(", ")[-1], "-")
