"""The frontier of SAEs of several sparsities: what each kind reaches at each L0.

A point is an SAE as evaluate.py scores it, {"l0", "fvu", "loss_recovered", "absorption",
"mean_highest_cosine"}, of which all but l0 and fvu may be None. A line is the points of one kind.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from matryoshka import plots
from matryoshka.command_line import table

PANELS = {
    "fvu": "FVU (lower is better)",
    "loss_recovered": "loss recovered (higher is better)",
    "absorption": "absorption (lower is better)",
    "mean_highest_cosine": "mean highest cosine (lower is less alike)",
}
DASHES: dict[str, Literal["-", "--", ":", "-."]] = {  # of activations
    "relu": "-", "batchtopk": "--", "topk": ":", "jumprelu": "-."
}  # fmt: skip

Lines = Mapping[str, Sequence[Mapping[str, Any]]]


def lines_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Scored SAEs by kind and activation function, "matryoshka, relu", in order of their L0."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        name = f"{run.get('kind') or run['sae']}, {run.get('activation', 'relu')}"
        lines.setdefault(name, []).append(run)
    return {name: sorted(points, key=lambda run: run["l0"]) for name, points in lines.items()}


def is_frontier(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some kind was trained at more than one L0."""
    targets = [{run.get("target_l0") for run in points} for points in lines_of(runs).values()]
    return any(len(of_kind) > 1 for of_kind in targets)


def frontier_table(lines: Lines) -> str:
    """A kind and target L0 a row, as means over its SAEs; "-" where none has the score."""
    headers = ["SAE", "asked L0", "L0", "FVU", "dead", "loss recovered", "highest cosine"]
    forms = {"l0": ".2f", "fvu": ".4f", "dead_share": ".1%", "loss_recovered": ".1%"}
    forms |= {"mean_highest_cosine": ".3f", "absorption": ".1%"}
    rows = [
        [name, f"{target:g}", *(_cell(points, key, form) for key, form in forms.items())]
        for name, of_kind in lines.items()
        for target, points in _by_target(of_kind).items()
    ]
    return table([*headers, "absorption"], rows)


def _cell(points: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    mean = _mean(points, key)
    return "-" if math.isnan(mean) else f"{mean:{form}}"


def _by_target(points: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    targets = sorted({run["target_l0"] for run in points})
    return {target: [run for run in points if run["target_l0"] == target] for target in targets}


def _mean(points: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [run[key] for run in points if run.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


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
        groups = _by_target(known).values()
        x, y = ([_mean(group, what) for group in groups] for what in ("l0", key))
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
