"""The project's figures, in one style. Each function writes one PNG, whole or not at all.

Figures are 1660 pixels wide, twice the width of a README, so that letters are 11 pixels high or
more on the page. The background is white and opaque, so the picture is the same on light and dark
pages. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and an SAE has the
same colour everywhere. In every heatmap, purple means more, and grey means that there is nothing.
Nothing here uses pyplot. Figures neither depend on matplotlib's current settings nor change them.

Arrays may be of NumPy, tensors on any device, or nested lists. Any number of SAEs are given by
name. Those in `COLOURS` come first, in its order; the others get their colours from `CYCLE`.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from matryoshka.files import write_atomically

if TYPE_CHECKING:
    from toy_model import FeatureTree

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
# Rows of a heatmap of samples, at most: with more rows than pixels, some would be lost at random.
MAX_ROWS = 400

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
_style = matplotlib.style.context(_STYLE)  # as a decorator, it is entered anew for each call

_ACTIVATION = LinearSegmentedColormap.from_list(
    "activation", ["#FFFFFF", "#B9A9D6", "#6A3D9A", "#2D0A4E"]
)
_COSINE = LinearSegmentedColormap.from_list(
    "cosine",
    [(0, "#7F3B08"), (0.25, "#E08214"), (0.5, "#FFFFFF"), (0.64, "#B9A9D6"), (0.82, "#6A3D9A"),
     (1, "#2D0A4E")],
)  # fmt: skip


def toy_activations(
    path: str | Path, truth: Any, acts_by_sae: Mapping[str, Any], tree: "FeatureTree"
) -> None:
    """Heatmaps of samples: the true features, and each SAE's latents matched to them, side by side.

    truth: [n, n_features], the features' activations; of more than MAX_ROWS samples, MAX_ROWS are
        shown, evenly spaced.
    acts_by_sae: for each SAE [n, n_features], where column f is the latent matched to feature f, in
        the units of `truth` (activation times decoder norm); NaN if there is no such latent.

    Rows are sorted by which features are active, a parent before its children. A cell is marked if
    its feature is active and its latent silent; in a parent's column, this is absorption.
    """
    _write(path, _toy_activations_figure(truth, acts_by_sae, tree))


def toy_cosines(
    path: str | Path, cosines_by_sae: Mapping[str, Any], tree: "FeatureTree", which: str
) -> None:
    """Heatmaps of the cosines of each SAE's latents with the true directions.

    cosines_by_sae: for each SAE [n_features, n_features]; row f is the latent matched to feature f,
        NaN if there is none, and column g is the direction of feature g.
    which: "decoder" or "encoder", the weights whose directions these are.

    An encoder's row shows what its latent is distinguished from, not what it represents. For
    example, a clean child can have a cosine of 0.53 with its own feature and of -0.83 with a child
    of another parent. Such a latent first represented the other parent alone, and its encoder
    learned to be silent for that parent's children. This is not unlearned: where the other child is
    active, a silent ReLU passes no gradient, and only on 9 of 10,000 samples, where both children
    are active, is the latent missed.
    """
    _write(path, _toy_cosines_figure(cosines_by_sae, tree, which))


def training_curves(
    path: str | Path,
    steps: Any,
    curves: Mapping[str, Mapping[str, Any]],
    target_l0: float,
    expected_l0: float | None = None,
) -> None:
    """L0, FVU and sparsity weight over steps: a thin line for each seed, a thick one for medians.

    steps: [n_points]. curves: for each SAE {"l0", "fvu", "sparsity_weight"}, each
    [n_seeds, n_points]. expected_l0: the expected number of active features in a sample, if known.
    """
    _write(path, _training_curves_figure(steps, curves, target_l0, expected_l0))


def toy_seeds(
    path: str | Path,
    runs: Sequence[Mapping[str, Any]],
    tree: "FeatureTree",
    threshold: float = 0.9,
) -> None:
    """What each seed recovered: the best cosine of every feature, and the number of clean features.

    runs: the "runs" of the toy's results.json, each with "sae", "clean_features" and "best_cosine"
        [n_features] (None if there is no latent).
    threshold: the cosine above which `clean_features` counts a feature.
    """
    _write(path, _toy_seeds_figure(runs, tree, threshold))


def refit_cosines(
    path: str | Path,
    best_by_stage: Mapping[str, Any],
    tree: "FeatureTree",
    sae: str = "matryoshka",
    lowest: float = 0.9,
) -> None:
    """Histograms of the features' best cosines, for each stage of refitting and kind of feature.

    best_by_stage: for each stage, such as "before", [n_seeds, n_features]. The axis begins at
        `lowest`, where lower cosines are shown, too.
    sae: the name of the SAE that was refitted.
    """
    _write(path, _refit_cosines_figure(best_by_stage, tree, sae, lowest))


def fvu_by_prefix(path: str | Path, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """FVU of reconstructions from the first latents: a thin line for each seed, a thick mean.

    curves: for each SAE {"prefix": [n_prefixes], "fvu": [n_seeds, n_prefixes]}.
    """
    _write(path, _fvu_by_prefix_figure(curves))


def density_histograms(path: str | Path, densities: Mapping[str, Any]) -> None:
    """Histograms of how often latents fire: shares of latents by log10 of frequency, and dead ones.

    densities: for each SAE a histogram, or a list with one for each seed, from
        `metrics.density_histogram`: {"log10_edges": [n_bins + 1], "counts": [n_bins], "never":
        latents that never fire}. A thin line is a seed, the thick one their mean.
    """
    _write(path, _density_histograms_figure(densities))


# --- the figures


@_style
def _toy_activations_figure(
    truth: Any, acts_by_sae: Mapping[str, Any], tree: "FeatureTree"
) -> Figure:
    layout = _layout(tree)
    panels = {"truth": _array(truth)} | {sae: _array(a) for sae, a in _in_order(acts_by_sae)}
    colours = _colours(panels)
    panels = {name: acts[:, layout.order] for name, acts in panels.items()}
    n = len(panels["truth"])
    largest = max(float(np.nanmax(acts, initial=0.0)) for acts in panels.values()) or 1.0
    rows = _rows_to_show(panels, 0.01 * largest)
    panels = {name: acts[rows] for name, acts in panels.items()}
    active = panels["truth"] > 0
    missing = {name: np.isnan(acts) for name, acts in panels.items()}

    # Borders are drawn between rows whose first active features are in different groups.
    first = np.where(active.any(axis=1), active.argmax(axis=1), len(layout.order))
    borders = np.flatnonzero(np.diff(np.searchsorted(layout.starts, first, side="right"))) + 0.5

    figure, axes = _panels(len(panels), 3, 4.3, left=0.05, right=0.905, wspace=0.06)
    image = None
    for ax, (name, acts) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(
            acts, aspect="auto", interpolation="nearest", cmap=_ACTIVATION, vmin=0, vmax=largest
        )
        _overlay(ax, missing[name], ABSENT)
        if name != "truth":
            _overlay(ax, active & (acts <= 0), MISSED)
        ax.set_title(_title(name), color=colours[name])
        for border in borders:
            ax.axhline(border, color="#BBBBBB", linewidth=0.4)
        _mark(ax, layout, "x")
        ax.set_yticks([])
    figure.axes[0].set_ylabel(_sample_count(len(rows), n))
    key: list[Any] = [Patch(color=MISSED, label="feature active, its latent silent")]
    if any(where.any() for where in missing.values()):
        key.append(Patch(color=ABSENT, label="no latent for the feature"))
    figure.legend(
        handles=key, loc="upper right", bbox_to_anchor=(0.911, 1.0), ncols=2, borderaxespad=0.4,
        handlelength=1.2,
    )  # fmt: skip
    _headline(figure, "Rows: samples. " + _feature_key(layout, "Columns"), 0.05)
    _colour_bar(figure, image, figure.axes[0], "activation (units of the data)")
    return figure


@_style
def _toy_cosines_figure(
    cosines_by_sae: Mapping[str, Any], tree: "FeatureTree", which: str
) -> Figure:
    layout, colours = _layout(tree), _colours(cosines_by_sae)
    figure, axes = _panels(len(cosines_by_sae), 2, 4.55, left=0.085, right=0.86, wspace=0.32)
    image = None
    for ax, (sae, cosines) in zip(axes, _in_order(cosines_by_sae), strict=True):
        values = _array(cosines)[np.ix_(layout.order, layout.order)]
        image = ax.imshow(values, aspect="auto", cmap=_COSINE, vmin=-1, vmax=1)
        _overlay(ax, np.isnan(values), ABSENT)
        ax.set_title(_title(sae), color=colours[sae])
        _mark(ax, layout, "x")
        _mark(ax, layout, "y")
        if len(values) <= 26:  # with more rows the numbers would touch
            _beside_rows(ax, np.diag(values))
    figure.axes[0].set_ylabel("latent, by the feature matched to it", labelpad=27)
    _headline(
        figure,
        f"Cosine of {which} and true directions. {_feature_key(layout, 'Columns')}. "
        "Beside a row: its diagonal.",
        0.085,
    )
    _colour_bar(figure, image, figure.axes[0], "cosine")
    return figure


@_style
def _training_curves_figure(
    steps: Any,
    curves: Mapping[str, Mapping[str, Any]],
    target_l0: float,
    expected_l0: float | None,
) -> Figure:
    x, colours = _array(steps), _colours(curves)
    figure = _figure(2.9)
    axes = figure.subplots(
        1, 3, gridspec_kw={"left": 0.068, "right": 0.985, "top": 0.81, "bottom": 0.15,
                           "wspace": 0.34},
    )  # fmt: skip
    titles = {"l0": "L0", "fvu": "FVU", "sparsity_weight": "Sparsity weight"}
    units = {"l0": "active latents a sample", "fvu": "share of variance unexplained"}
    for ax, key in zip(axes, titles, strict=True):
        drawn = {sae: _seeds(of[key]) for sae, of in _in_order(curves)}
        for sae, ys in drawn.items():
            _seed_lines(ax, x, ys, _over_seeds(np.nanmedian, ys), colours[sae])
        ax.set_title(titles[key])
        ax.set_ylabel(units.get(key, "weight of the sparsity loss"))
        ax.set_xlabel("training step")
        ax.grid(True)
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
        if key == "l0":
            _frame_l0(ax, list(drawn.values()), target_l0)
        else:
            _log_axis(ax, *drawn.values())
    lines = [
        _sae_line(sae, colours[sae], len(_seeds(of["fvu"])), "median of ")
        for sae, of in _in_order(curves)
    ]
    for name, level, style in (("target", target_l0, "--"), ("true", expected_l0, ":")):
        if level is not None:
            line = axes[0].axhline(level, color=INK, linewidth=1, linestyle=style, zorder=5)
            line.set_label(f"{name} L0, {level:.4g}")
            lines.append(line)
    _legend(figure, lines, 0.05)
    return figure


@_style
def _toy_seeds_figure(
    runs: Sequence[Mapping[str, Any]], tree: "FeatureTree", threshold: float
) -> Figure:
    layout = _layout(tree)
    saes = [sae for sae, _ in _in_order({run["sae"]: None for run in runs})]
    colours = _colours(saes)
    figure = _figure(3.9)
    grid = figure.add_gridspec(
        1, 2, left=0.068, right=0.985, top=0.86, bottom=0.155, width_ratios=(3.1, 1), wspace=0.26
    )
    ax, counts = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])

    lowest = threshold - 0.1
    width = 0.84 / max(len(saes), 1)
    for i, sae in enumerate(saes):
        best = np.array([run["best_cosine"] for run in runs if run["sae"] == sae], dtype=float)
        best = best[:, layout.order]  # [n_seeds, n_features]
        if np.isfinite(best).any():
            lowest = min(lowest, float(np.nanmin(best)))
        centre = np.arange(best.shape[1]) + (i - (len(saes) - 1) / 2) * width
        # Dots are evenly spaced, in the order of multiples of the golden ratio, so that successive
        # seeds are apart; this is the same every time.
        place = np.argsort(np.argsort(np.arange(len(best)) * 0.618034 % 1))
        spread = ((place + 0.5) / len(best) - 0.5) * 0.8 * width
        ax.scatter(
            (centre + spread[:, None]).ravel(), best.ravel(), s=7, color=colours[sae],
            alpha=0.85 if len(best) <= 10 else 0.35, linewidths=0, zorder=3,
        )  # fmt: skip
        if len(best) > 1:
            ax.hlines(
                _over_seeds(np.nanmedian, best), centre - 0.48 * width, centre + 0.48 * width,
                color="black", linewidth=1.1, zorder=4,
            )  # fmt: skip
    for level in sorted({threshold, 0.9, 0.95, 0.99}):
        main = level == threshold
        ax.axhline(level, color=INK if main else FAINT, linewidth=1 if main else 0.7,
                   linestyle=(0, (4, 2)) if main else ":", zorder=2)  # fmt: skip
        ax.annotate(f"{level:.4g}", (1, level), (3, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", fontsize=7.5,
                    color=INK if main else "#666666")  # fmt: skip
    ax.set_ylim(lowest - 0.03, 1.012)
    ax.set_xlim(-0.6, len(layout.order) - 0.4)
    ax.set_ylabel("best decoder cosine to the feature")
    ax.set_title("Recovery of each true feature (dot: a seed, bar: median)")
    _mark(ax, layout, "x")
    ax.set_xlabel(_feature_key(layout, "columns"), labelpad=29)

    _clean_counts(counts, runs, saes, tree.n_features, threshold)
    _legend(
        figure,
        [_patch(sae, sum(run["sae"] == sae for run in runs), colours[sae]) for sae in saes],
        0.06,
    )
    return figure


@_style
def _refit_cosines_figure(
    best_by_stage: Mapping[str, Any], tree: "FeatureTree", sae: str, lowest: float
) -> Figure:
    kinds = {kind: np.array(tree.kind) == kind for kind in dict.fromkeys(tree.kind)}
    figure = _figure(0.95 + len(best_by_stage) * (0.14 + 0.27 * len(kinds)))
    height = figure.get_figheight()
    stages = figure.add_gridspec(
        len(best_by_stage), 1, left=0.16, right=0.97, top=1 - 0.4 / height, bottom=0.5 / height,
        hspace=0.2,
    )  # fmt: skip
    for row, (stage, values) in enumerate(best_by_stage.items()):
        best = _array(values).clip(lowest, 1)
        strips = stages[row].subgridspec(len(kinds), 1, hspace=0.0)
        for strip, (kind, which) in enumerate(kinds.items()):
            ax = figure.add_subplot(strips[strip])
            _cosine_strip(ax, best[:, which], lowest, kind)
            ax.tick_params(bottom=strip + 1 == len(kinds), labelbottom=False)
        span = stages[row].get_position(figure)
        text = stage if len(stage) <= 10 else stage.replace(" ", "\n")
        figure.text(0.012, (span.y0 + span.y1) / 2, text, va="center", color=INK)
    figure.axes[-1].tick_params(labelbottom=True)
    figure.axes[-1].set_xlabel(
        "best cosine of a feature (dotted: 0.95 and 0.99); height: how many features, relative to "
        "the row's highest bar"
    )
    counts = ", ".join(f"{which.sum()} {kind}" for kind, which in kinds.items())
    n_seeds = len(_array(next(iter(best_by_stage.values()))))
    what = f"{_title(sae)}, {_count(n_seeds, 'seed')}; features a seed: {counts}"
    _headline(figure, what, 0.16)
    return figure


def _cosine_strip(ax: Axes, best: np.ndarray, lowest: float, kind: str) -> None:
    """Draws a histogram of cosines `best` [n_seeds, n_features] of one kind, scaled to height 1."""
    counts, edges = np.histogram(best, np.linspace(lowest, 1, 41))
    heights = counts / max(counts.max(), 1)
    ax.stairs(heights, edges, color=KIND_COLOURS[kind], fill=True, alpha=0.45)
    ax.stairs(heights, edges, color=KIND_COLOURS[kind], linewidth=1.1)
    for threshold in (0.95, 0.99):
        ax.axvline(threshold, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlim(lowest, 1.001)
    ax.set_ylim(0, 1.12)
    ax.set_yticks([])
    dark = {"child": "#A3527E", "rare": "#666666"}.get(kind, KIND_COLOURS[kind])
    ax.set_ylabel(kind, rotation=0, ha="right", va="center", color=dark, labelpad=4)


@_style
def _fvu_by_prefix_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, colours = _figure(3.7), _colours(curves)
    ax = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.86, "top": 0.9, "bottom": 0.13})
    lines, ends = [], []
    for sae, of in _in_order(curves):
        x, ys = _array(of["prefix"]), _seeds(of["fvu"])
        mean = _over_seeds(np.nanmean, ys)
        _seed_lines(ax, x, ys, mean, colours[sae], marker="o")
        lines.append(_sae_line(sae, colours[sae], len(ys), "mean of "))
        ends.append((x[-1], mean[-1], sae))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _log_axis(ax, *(_seeds(of["fvu"]) for of in curves.values()))
    _label_ends(ax, ends, colours)
    widths = np.concatenate([_array(of["prefix"]) for of in curves.values()])
    ax.set_xlim(widths.min() / 1.1, widths.max() * 1.1)
    ax.grid(True)
    ax.set_xlabel("latents used: the first so many of the dictionary (log scale)")
    ax.set_ylabel("FVU (share of variance unexplained, log scale)")
    _legend(figure, lines, 0.06)
    return figure


@_style
def _density_histograms_figure(densities: Mapping[str, Any]) -> Figure:
    by_sae = {
        sae: [of] if isinstance(of, Mapping) else list(of) for sae, of in _in_order(densities)
    }
    colours = _colours(by_sae)
    low = min([-1.0, *(_rarest(one) for of in by_sae.values() for one in of)])
    dead_at, bar = 1.07 * low, 0.055 * -low / len(by_sae)  # a little left of the rarest

    figure = _figure(3.3)
    ax = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.985, "top": 0.87, "bottom": 0.15})
    lines = []
    for i, (sae, of) in enumerate(by_sae.items()):
        edges = _array(of[0]["log10_edges"])
        shown = edges[:-1] >= low - 1e-9
        sizes = np.array([max(sum(one["counts"]) + one["never"], 1) for one in of])  # [n_seeds]
        shares = 100 * _array([one["counts"] for one in of]) / sizes[:, None]  # [n_seeds, n_bins]
        shares, edges = shares[:, shown], np.append(edges[:-1][shown], edges[-1])
        for row in shares if len(shares) > 1 else []:
            ax.stairs(row, edges, color=colours[sae], alpha=0.4, linewidth=0.7)
        ax.stairs(shares.mean(axis=0), edges, color=colours[sae], linewidth=2, zorder=3)
        ax.stairs(shares.mean(axis=0), edges, color=colours[sae], fill=True, alpha=0.13)
        dead = float((100 * _array([one["never"] for one in of]) / sizes).mean())
        at = dead_at + (i - (len(by_sae) - 1) / 2) * bar * 1.05
        ax.bar(at, dead, bar, color=colours[sae], zorder=3)
        lines.append(_sae_line(sae, colours[sae], len(of), "mean of ", f"; dead {dead:.3g}%"))
    ax.axvline(1.025 * low, color=FAINT, linewidth=0.7, linestyle=":")
    ticks = np.arange(int(low), 1)
    ax.set_xticks([dead_at, *ticks], ["dead", *(f"$10^{{{t}}}$" if t else "1" for t in ticks)])
    ax.set_xlim(1.12 * low, -0.01 * low)
    ax.set_ylim(bottom=0)
    ax.grid(True, axis="y")
    ax.set_xlabel("firing frequency: share of tokens on which a latent fires (log scale)")
    ax.set_ylabel("latents per bin (%)")
    _legend(figure, lines, 0.06)
    return figure


def _rarest(histogram: Mapping[str, Any]) -> float:
    """log10 of the power of ten below the frequency of the rarest latent that fires; 0 if none."""
    bins = np.flatnonzero(_array(histogram["counts"]))
    return float(np.floor(histogram["log10_edges"][bins[0]] + 1e-9)) if len(bins) else 0.0


# --- how a tree is laid out along an axis


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Features along an axis: each topmost parent with all below it, and then the rare ones."""

    order: list[int]  # position -> feature
    starts: list[int]  # the first position of each group
    labels: list[str]  # the label of each group
    marks: list[str]  # for each position: P, c, or nothing

    def spans(self) -> list[tuple[int, int, str]]:
        """(first position, last position, label) of each group."""
        ends = [*self.starts[1:], len(self.order)]
        return [(a, b - 1, s) for a, b, s in zip(self.starts, ends, self.labels, strict=True)]


def _layout(tree: "FeatureTree") -> _Layout:
    groups: dict[int, list[int]] = {}  # topmost feature, or -1 for rare ones -> features
    top: list[int] = []
    for feature, above in enumerate(tree.parent):
        top.append(feature if above is None else top[above])  # pre-order: above comes first
        groups.setdefault(-1 if tree.kind[feature] == "rare" else top[feature], []).append(feature)
    if -1 in groups:
        groups[-1] = groups.pop(-1)  # to the end
    order = [feature for members in groups.values() for feature in members]
    sizes = [len(members) for members in groups.values()]
    return _Layout(
        order=order,
        starts=[sum(sizes[:i]) for i in range(len(sizes))],
        labels=["rare" if g < 0 else tree.ids[g].replace("_", " ") for g in groups],
        marks=[{"parent": "P", "child": "c", "rare": ""}[tree.kind[f]] for f in order],
    )


def _mark(ax: Axes, layout: _Layout, axis: str) -> None:
    """Marks the features along the `axis` "x" or "y".

    It writes P and c, draws a bracket and a label for each group, and lines between groups.
    """
    on_x = axis == "x"
    ax.set_xticks([]) if on_x else ax.set_yticks([])
    box = ax.get_position()
    size = WIDTH * box.width if on_x else _height(ax) * box.height
    pitch = 72 * size / len(layout.order)  # points a feature

    def note(text: str, at: float, off: float, fontsize: float, **kwargs: Any) -> None:
        ax.annotate(
            text,
            (at, 0) if on_x else (0, at),
            (0, -off) if on_x else (-off, 0),
            xycoords=("data", "axes fraction") if on_x else ("axes fraction", "data"),
            textcoords="offset points",
            ha="center" if on_x else "right",
            va="top" if on_x else "center",
            fontsize=fontsize,
            **kwargs,
        )

    letters = any(layout.marks) and pitch >= 6
    if letters:
        for at, mark in enumerate(layout.marks):
            note(mark, at, 2, 7, color=INK, weight="bold" if mark == "P" else "normal")
    off = 12 if letters else 3
    scale = ax.figure.dpi_scale_trans
    if on_x:
        place = ax.get_xaxis_transform() + ScaledTranslation(0, -off / 72, scale)
    else:
        place = ax.get_yaxis_transform() + ScaledTranslation(-off / 72, 0, scale)
    for first, last, label in layout.spans():
        along, across = (first - 0.35, last + 0.35), (0, 0)
        ax.add_artist(
            Line2D(
                *((along, across) if on_x else (across, along)), color=FAINT, linewidth=1.2,
                clip_on=False, transform=place, solid_capstyle="butt",
            )
        )  # fmt: skip
        text, rotation = _fitted(label, pitch * (last - first + 1), upright=not on_x)
        note(text, (first + last) / 2, off + 2, 7.5, rotation=rotation, linespacing=1.05)
        if first:
            (ax.axvline if on_x else ax.axhline)(first - 0.5, color="#A8A8A8", linewidth=0.6)


def _fitted(label: str, room: float, upright: bool) -> tuple[str, float]:
    """`label` and a rotation with which it fits in `room` points along the axis; "" if none does.

    It is written along the axis if that fits, in one line, or broken at its spaces, or shortened;
    otherwise across the axis.
    """
    short = label if len(label) <= 10 else label[:9] + "…"
    along = 90 if upright else 0
    for text in (label, label.replace(" ", "\n"), short):
        lines = text.split("\n")
        if 4.3 * max(map(len, lines)) <= room and len(lines) <= 2:
            return text, along
    return (short, 90 - along) if room >= 8 else ("", 0)


def _feature_key(layout: _Layout, what: str) -> str:
    return f"{what}: features" + (" (P parent, c child)" if any(layout.marks) else "")


def _rows_to_show(panels: Mapping[str, np.ndarray], least: float) -> np.ndarray:
    """The rows of the panels [n, n_features] to show, in order. [n_shown]

    They are sorted by the truth: first those whose first feature is active; within these, first
    those whose second feature is active; and so on. Rows without an activation above `least` are
    left out. Of more than MAX_ROWS rows, MAX_ROWS are kept, evenly spaced.
    """
    rows = np.lexsort(tuple((panels["truth"] <= 0).T[::-1]))
    seen = np.any([np.any(acts > least, axis=1) for acts in panels.values()], axis=0)
    rows = rows[seen[rows]] if seen.any() else rows
    if len(rows) > MAX_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_ROWS).round().astype(int)]
    return rows


def _sample_count(shown: int, n: int) -> str:
    left_out = "" if shown == n else " with anything active" if shown < MAX_ROWS else ""
    return f"{shown} of {n} samples{left_out}" if shown < n else f"{n} samples"


# --- parts of figures


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _height(ax: Axes) -> float:
    """The height of the figure of `ax` in inches."""
    return ax.figure.bbox.height / DPI


def _headline(figure: Figure, text: str, left: float) -> None:
    """Writes a line at the top of the figure that says how to read it."""
    figure.text(left, 1 - 0.15 / figure.get_figheight(), text, va="center", color=INK)


def _beside_rows(ax: Axes, values: np.ndarray) -> None:
    """Writes a number to the right of each row of a heatmap. values: [n_rows]"""
    for row, value in enumerate(values):
        ax.annotate(
            "none" if np.isnan(value) else f"{value:.2f}", (1, row), (3, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=7, color=INK,
        )  # fmt: skip


def _overlay(ax: Axes, where: np.ndarray, colour: str) -> None:
    """Paints the cells of an image where `where` is true."""
    if where.any():
        cells = np.ma.masked_where(~where, np.zeros(where.shape))
        ax.imshow(cells, aspect="auto", interpolation="nearest", cmap=ListedColormap([colour]))


def _colour_bar(figure: Figure, image: Any, beside: Axes, label: str) -> None:
    box = beside.get_position()
    axes = figure.add_axes((0.922, box.y0, 0.015, box.height))
    figure.colorbar(image, cax=axes, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=2)
    image.colorbar.outline.set_linewidth(0.5)


def _seed_lines(
    ax: Axes, x: np.ndarray, ys: np.ndarray, middle: np.ndarray, colour: str, marker: str = ""
) -> None:
    """Draws ys [n_seeds, n_points] as thin lines and `middle` [n_points] as a thick one."""
    if len(ys) > 1:
        lines = [np.column_stack([x, y]) for y in ys]
        alpha = float(np.clip(4 / len(ys), 0.12, 0.45))
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=0.7, alpha=alpha))
    ax.plot(x, middle, color=colour, linewidth=1.8, marker=marker, markersize=4, zorder=4)


def _sae_line(sae: str, colour: str, n_seeds: int, prefix: str, suffix: str = "") -> Line2D:
    """The legend's entry for an SAE."""
    what = f"{prefix if n_seeds > 1 else ''}{_count(n_seeds, 'seed')}"
    return Line2D([], [], color=colour, linewidth=2, label=f"{_label(sae)}, {what}{suffix}")


def _legend(figure: Figure, handles: Sequence[Any], left: float, handlelength: float = 1.8) -> None:
    """Draws a legend at the top; if it needs more than one row, the figure grows by the others."""
    for n_columns in range(max(len(handles), 1), 0, -1):
        legend = figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(left, 1.0), ncols=n_columns,
            borderaxespad=0.4, columnspacing=1.8, handlelength=handlelength,
        )  # fmt: skip
        if n_columns == 1 or legend.get_window_extent().x1 <= figure.bbox.x1:
            break
        legend.remove()
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


def _panels(
    n: int, per_row: int, height: float, *, left: float, right: float, wspace: float
) -> tuple[Figure, list[Axes]]:
    """`n` heatmaps side by side, in rows of at most `per_row`, each row `height` inches high."""
    n_rows, n_columns = max(-(-n // per_row), 1), max(min(n, per_row), 1)
    head, foot, between = 0.6, 0.55, 0.95  # inches
    figure = _figure(n_rows * height + (n_rows - 1) * (between - head - foot))
    total = figure.get_figheight()
    grid = figure.add_gridspec(
        n_rows, n_columns, left=left, right=right, top=1 - head / total, bottom=foot / total,
        wspace=wspace, hspace=between / (height - head - foot),
    )  # fmt: skip
    return figure, [figure.add_subplot(grid[i // n_columns, i % n_columns]) for i in range(n)]


def _log_axis(ax: Axes, *values: np.ndarray) -> None:
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


def _frame_l0(ax: Axes, curves: Sequence[np.ndarray], target: float) -> None:
    """Sets limits that include the target, and L0 after the first fifth of the steps.

    In the first fifth, L0 may be many times as high. curves: each [n_seeds, n_points].
    """
    settled = np.concatenate([ys[:, ys.shape[1] // 5 :].ravel() for ys in curves])
    settled = settled[np.isfinite(settled)]
    top = float(np.quantile(settled, 0.99)) if settled.size else 0.0
    ax.set_ylim(0, max(1.3 * target, 1.15 * top))


def _clean_counts(
    ax: Axes, runs: Sequence[Mapping[str, Any]], saes: Sequence[str], n_features: int,
    threshold: float,
) -> None:  # fmt: skip
    """Draws a bar for each number of clean features: how many seeds of an SAE reached it."""
    colours = _colours(saes)
    clean = {
        sae: Counter(int(run["clean_features"]) for run in runs if run["sae"] == sae)
        for sae in saes
    }
    for number in sorted(set().union(*clean.values())):
        there = [sae for sae in saes if number in clean[sae]]
        height = 0.8 / len(there)
        for i, sae in enumerate(there):
            at = number + ((len(there) - 1) / 2 - i) * height
            bar = ax.barh(at, clean[sae][number], min(height, 0.6), color=colours[sae])
            ax.bar_label(bar, padding=2, fontsize=7.5, color=colours[sae])
    lowest = min((min(of) for of in clean.values()), default=n_features)
    most = max((max(of.values()) for of in clean.values()), default=1)
    ax.set_ylim(lowest - 0.9, n_features + 0.7)
    ax.set_xlim(0, 1.18 * most)
    ax.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlabel("seeds")
    ax.set_ylabel(f"clean features of {n_features} (cosine > {threshold:.4g})")
    ax.set_title("Clean features")


def _label_ends(
    ax: Axes, ends: Sequence[tuple[float, float, str]], colours: Mapping[str, str]
) -> None:
    """Writes each curve's last value beside its end; labels that would overlap are moved apart."""
    height = 72 * ax.get_position().height * _height(ax)  # points
    last = -np.inf
    for x, y, sae in sorted((e for e in ends if np.isfinite(e[1])), key=lambda e: e[1]):
        fraction = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]
        at = max(fraction * height, last + 11)
        ax.annotate(
            f"{_label(sae, 11)} {y:.3f}", (1, at / height), (2, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", fontsize=7.5, color=colours[sae],
        )  # fmt: skip
        last = at


def _in_order(by_sae: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The items of `by_sae`: first those in `COLOURS`, in its order, then the others as given."""
    known = [(sae, by_sae[sae]) for sae in COLOURS if sae in by_sae]
    return known + [(sae, of) for sae, of in by_sae.items() if sae not in COLOURS]


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each SAE in one figure, by name."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(others)}


def _patch(sae: str, n_seeds: int, colour: str | None = None) -> Patch:
    label = f"{_label(sae)}, {_count(n_seeds, 'seed')}"
    return Patch(color=colour or COLOURS[sae], label=label)


def _label(name: str, longest: int = 30) -> str:
    """The name of an SAE in a figure, shortened if it is too long."""
    label = NAMES.get(name, name)
    return label if len(label) <= longest else label[: longest - 1] + "…"


def _title(name: str) -> str:
    """The title of a panel: "Vanilla SAE", or the name itself of an SAE that is not in `NAMES`."""
    if name not in NAMES:
        return _label(name, 22)
    label = NAMES[name] if name == "truth" else f"{NAMES[name]} SAE"
    return label[0].upper() + label[1:]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


# --- arrays and files


def _array(values: Any) -> np.ndarray:
    """Converts anything array-like to a float64 NumPy array."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def _seeds(values: Any) -> np.ndarray:
    """An array [n_seeds, n] of values [n_seeds, n], or of one seed's values [n]."""
    return np.atleast_2d(_array(values))


def _over_seeds(statistic: Any, ys: np.ndarray) -> np.ndarray:
    """`statistic` over the first axis of `ys` [n_seeds, n], NaN where every seed is NaN. [n]"""
    known = ~np.isnan(ys).all(axis=0)
    out = np.full(ys.shape[1], np.nan)
    if known.any():
        out[known] = statistic(ys[:, known], axis=0)
    return out


def _write(path: str | Path, figure: Figure) -> None:
    # Without matplotlib's version in the metadata, the same picture is the same file.
    with matplotlib.style.context(_STYLE):
        write_atomically(
            Path(path),
            lambda part: figure.savefig(part, format="png", dpi=DPI, metadata={"Software": None}),
        )
