"""The figure of a frontier: scores of SAEs of several sparsities against their L0."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from matryoshka.frontier import Lines, by_target, mean
from matryoshka.plot_style import (
    colours_of,
    count_of,
    legend,
    log_axis,
    new_figure,
    style,
    write,
)

PANELS = {
    "fvu": "FVU (lower is better)",
    "loss_recovered": "loss recovered (higher is better)",
    "absorption": "absorption (lower is better)",
    "mean_highest_cosine": "mean highest cosine (lower is less alike)",
}
DASHES: dict[str, Literal["-", "--", ":", "-."]] = {  # by activation function
    "relu": "-", "batchtopk": "--", "topk": ":", "jumprelu": "-."
}  # fmt: skip

Looks = dict[str, dict[str, Any]]  # a line's name -> matplotlib's settings for it


def draw(path: str | Path, lines: Lines) -> None:
    """Draws the four scores against L0: a dot for each SAE, and a line through the mean at each
    target L0. SAEs of a kind with a single target have diamonds and no line."""
    write(path, _figure(lines))


@style
def _figure(lines: Lines) -> Figure:
    figure = new_figure(6.2)
    axes = figure.subplots(
        2, 2, gridspec_kw={"left": 0.075, "right": 0.985, "top": 0.92, "bottom": 0.075,
                           "wspace": 0.2, "hspace": 0.3},
    )  # fmt: skip
    looks = _looks(lines)
    for ax, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        _panel(ax, lines, looks, key)
        ax.set_title(title)
        if key == "fvu":
            values = [run[key] for points in lines.values() for run in points]
            log_axis(ax, np.array(values, dtype=float))
    for ax in axes[1]:
        ax.set_xlabel("L0: active latents a token (log scale)")
    handles = [
        Line2D([], [], **looks[name], markersize=4,
               label=f"{name}, {count_of(len({run.get('seed') for run in points}), 'seed')}")
        for name, points in lines.items()
    ]  # fmt: skip
    legend(figure, handles, 0.06, handlelength=3.2)
    return figure


def _panel(ax: Axes, lines: Lines, looks: Looks, key: str) -> None:
    seen = []
    for name, points in lines.items():
        known = [run for run in points if run.get(key) is not None]
        if not known:
            continue
        groups = by_target(known).values()
        x, y = ([mean(group, what) for group in groups] for what in ("l0", key))
        look = looks[name]
        ax.plot(x, y, **look | {"marker": ""}, linewidth=1.6)
        x = [run["l0"] for run in known]
        size = 6 if look["marker"] == "D" else 3.2
        ax.plot(
            x, [run[key] for run in known], **look | {"linestyle": ""}, markersize=size, alpha=0.75
        )
        seen += x
    ax.grid(True)
    ax.set_xscale("log")
    ticks = sorted({run["target_l0"] for points in lines.values() for run in points})
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if seen:
        ax.set_xlim(min(seen) / 1.15, max(seen) * 1.15)


def _looks(lines: Lines) -> Looks:
    """How each line is drawn: its colour shows the kind, its dashes the activation function, and
    hollow diamonds that there is only one target L0."""
    colours = colours_of(dict.fromkeys(name.split(",")[0] for name in lines))
    looks = {}
    for name, points in lines.items():
        is_line, colour = len(by_target(points)) > 1, colours[name.split(",")[0]]
        looks[name] = {
            "color": colour,
            "linestyle": DASHES.get(name.split(", ")[-1], "-") if is_line else "",
            "marker": "o" if is_line else "D",
            "markerfacecolor": colour if is_line else "none",
        }
    return looks
