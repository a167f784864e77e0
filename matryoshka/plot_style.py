"""The style of the project's figures, and the parts that several of them have.

Figures are 1660 pixels wide, twice the width of a README, so that letters are 11 pixels high or
more on the page. The background is white and opaque, so the picture is the same on light and dark
pages. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and an SAE has the
same colour everywhere. In every heatmap, purple means more, and grey means that there is nothing.
Nothing here uses pyplot. Figures neither depend on matplotlib's current settings nor change them.

Functions with the decorator `style` make figures from `new_figure`; `write` writes them. Arrays may
be of NumPy, tensors on any device, or nested lists. Any number of SAEs are given by name. Those in
`COLOURS` come first, in its order; the others get their colours from `CYCLE`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from matryoshka.files import write_atomically

# In the order of panels and legends. Other SAEs come after these, with colours from CYCLE.
COLOURS = {"truth": "#333333", "vanilla": "#D55E00", "matryoshka": "#0072B2"}
NAMES = {"truth": "ground truth", "vanilla": "vanilla", "matryoshka": "Matryoshka"}
CYCLE = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C564B", "#6B8E23", "#00838F")
KIND_COLOURS = {"parent": "#0072B2", "child": "#CC79A7", "rare": "#8A8A8A"}  # of features
MISSED = "#F0B429"  # a feature is active and its latent is silent
ABSENT = "#D9D9D9"  # no latent is matched to the feature
FAINT = "#8A8A8A"  # lines and marks beside the data
INK = "#333333"

WIDTH = 8.3  # inches
DPI = 200

_STYLE: list[str | Path | dict[str, Any]] = [
    "default",
    {
        "font.family": "DejaVu Sans",  # is part of matplotlib, so it is the same everywhere
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.edgecolor": "#444444",
        "axes.axisbelow": True,
        "axes.grid.axis": "both",
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.6,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    },
]
style = matplotlib.style.context(_STYLE)  # as a decorator, it is entered anew for each call


def new_figure(height: float) -> Figure:
    """An empty figure, WIDTH wide and `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def height_of(ax: Axes) -> float:
    """The height of the figure of `ax` in inches."""
    return ax.figure.bbox.height / DPI


def headline(figure: Figure, text: str, left: float) -> None:
    """Writes a line at the top of the figure that says how to read it."""
    figure.text(left, 1 - 0.15 / figure.get_figheight(), text, va="center", color=INK)


def legend(figure: Figure, handles: Sequence[Any], left: float, handlelength: float = 1.8) -> None:
    """Draws a legend at the top; if it needs more than one row, the figure grows by the others."""
    for n_columns in range(max(len(handles), 1), 0, -1):
        drawn = figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(left, 1.0), ncols=n_columns,
            borderaxespad=0.4, columnspacing=1.8, handlelength=handlelength,
        )  # fmt: skip
        if n_columns == 1 or drawn.get_window_extent().x1 <= figure.bbox.x1:
            break
        drawn.remove()
    n_rows = -(-len(handles) // n_columns)
    _grow(figure, 0.17 * (n_rows - 1))


def _grow(figure: Figure, inches: float) -> None:
    """Adds room at the top of a figure; its axes keep their size and distance from the bottom."""
    if inches <= 0:
        return
    height = figure.get_figheight()
    boxes = [(ax, ax.get_position()) for ax in figure.axes]
    figure.set_figheight(height + inches)
    share = height / (height + inches)
    for ax, box in boxes:
        ax.set_position((box.x0, box.y0 * share, box.width, box.height * share))


def seed_lines(
    ax: Axes, x: np.ndarray, ys: np.ndarray, middle: np.ndarray, colour: str, marker: str = ""
) -> None:
    """Draws ys [n_seeds, n_points] as thin lines and `middle` [n_points] as a thick one."""
    if len(ys) > 1:
        lines = [np.column_stack([x, y]) for y in ys]
        alpha = float(np.clip(4 / len(ys), 0.12, 0.45))
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=0.7, alpha=alpha))
    ax.plot(x, middle, color=colour, linewidth=1.8, marker=marker, markersize=4, zorder=4)


def sae_line(sae: str, colour: str, n_seeds: int, prefix: str, suffix: str = "") -> Line2D:
    """A line for the legend's entry of an SAE."""
    what = f"{prefix if n_seeds > 1 else ''}{count_of(n_seeds, 'seed')}"
    return Line2D([], [], color=colour, linewidth=2, label=f"{label_of(sae)}, {what}{suffix}")


def patch(sae: str, n_seeds: int, colour: str | None = None) -> Patch:
    """A patch for the legend's entry of an SAE."""
    label = f"{label_of(sae)}, {count_of(n_seeds, 'seed')}"
    return Patch(color=colour or COLOURS[sae], label=label)


def log_axis(ax: Axes, *values: np.ndarray) -> None:
    """Sets a log y axis that spans the positive `values`; a linear one if there are none."""
    seen = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values] or [np.ones(0)])
    if not seen.size:
        ax.set_ylim(-0.05, 1.0)
        return
    top = seen.max()
    bottom = max(seen.min(), top * 1e-8)
    pad = (top / bottom) ** 0.06 * 1.1
    ax.set_yscale("log")
    ax.set_ylim(bottom / pad, top * pad)
    _log_ticks(ax, np.log10(top / bottom * pad**2))


def _log_ticks(ax: Axes, n_decades: float) -> None:
    """Sets ticks of a log y axis so that three or more have a number."""
    if n_decades > 3:
        return  # matplotlib's ticks, powers of ten, are enough
    if n_decades > 0.9:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if n_decades < 2 else (1, 3)))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def in_order(by_sae: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The items of `by_sae`: first those in `COLOURS`, in its order, then the others as given."""
    known = [(sae, by_sae[sae]) for sae in COLOURS if sae in by_sae]
    return known + [(sae, of) for sae, of in by_sae.items() if sae not in COLOURS]


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of each SAE in one figure, by name."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(others)}


def label_of(name: str, longest: int = 30) -> str:
    """The name of an SAE in a figure, shortened if it is too long."""
    label = NAMES.get(name, name)
    return label if len(label) <= longest else label[: longest - 1] + "…"


def title_of(name: str) -> str:
    """The title of a panel: "Vanilla SAE", or the name itself of an SAE that is not in `NAMES`."""
    if name not in NAMES:
        return label_of(name, 22)
    label = NAMES[name] if name == "truth" else f"{NAMES[name]} SAE"
    return label[0].upper() + label[1:]


def count_of(n: int, noun: str) -> str:
    """A number with its noun: "1 seed", "2 seeds"."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def thousands(value: float, _: int) -> str:
    """A tick's label, with k for thousands."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def as_array(values: Any) -> np.ndarray:
    """Converts anything array-like to a float64 NumPy array."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def per_seed(values: Any) -> np.ndarray:
    """An array [n_seeds, n] of values [n_seeds, n], or of one seed's values [n]."""
    return np.atleast_2d(as_array(values))


def over_seeds(statistic: Any, ys: np.ndarray) -> np.ndarray:
    """`statistic` over the first axis of `ys` [n_seeds, n], NaN where every seed is NaN. [n]"""
    known = ~np.isnan(ys).all(axis=0)
    out = np.full(ys.shape[1], np.nan)
    if known.any():
        out[known] = statistic(ys[:, known], axis=0)
    return out


def write(path: str | Path, figure: Figure) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    # Without matplotlib's version in the metadata, the same picture is the same file.
    with matplotlib.style.context(_STYLE):
        write_atomically(
            Path(path),
            lambda part: figure.savefig(part, format="png", dpi=DPI, metadata={"Software": None}),
        )
