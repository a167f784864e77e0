"""Figures of training and scores: curves, dots and histograms. heatmaps.py has the toy's heatmaps.

Each function writes one PNG, whole or not at all. See plot_style.py for what all figures share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from matryoshka.plot_style import (
    FAINT,
    INK,
    KIND_COLOURS,
    as_array,
    colours_of,
    count_of,
    headline,
    height_of,
    in_order,
    label_of,
    legend,
    log_axis,
    new_figure,
    over_seeds,
    patch,
    per_seed,
    sae_line,
    seed_lines,
    style,
    thousands,
    title_of,
    write,
)
from matryoshka.tree_axis import feature_key, mark_features, tree_axis

if TYPE_CHECKING:
    from toy_model import FeatureTree


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
    write(path, _training_curves_figure(steps, curves, target_l0, expected_l0))


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
    write(path, _toy_seeds_figure(runs, tree, threshold))


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
    write(path, _refit_cosines_figure(best_by_stage, tree, sae, lowest))


def fvu_by_prefix(path: str | Path, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """FVU of reconstructions from the first latents: a thin line for each seed, a thick mean.

    curves: for each SAE {"prefix": [n_prefixes], "fvu": [n_seeds, n_prefixes]}.
    """
    write(path, _fvu_by_prefix_figure(curves))


def density_histograms(path: str | Path, densities: Mapping[str, Any]) -> None:
    """Histograms of how often latents fire: shares of latents by log10 of frequency, and dead ones.

    densities: for each SAE a histogram, or a list with one for each seed, from
        `metrics.density_histogram`: {"log10_edges": [n_bins + 1], "counts": [n_bins], "never":
        latents that never fire}. A thin line is a seed, the thick one their mean.
    """
    write(path, _density_histograms_figure(densities))


@style
def _training_curves_figure(
    steps: Any,
    curves: Mapping[str, Mapping[str, Any]],
    target_l0: float,
    expected_l0: float | None,
) -> Figure:
    x, colours = as_array(steps), colours_of(curves)
    figure = new_figure(2.9)
    axes = figure.subplots(
        1, 3, gridspec_kw={"left": 0.068, "right": 0.985, "top": 0.81, "bottom": 0.15,
                           "wspace": 0.34},
    )  # fmt: skip
    titles = {"l0": "L0", "fvu": "FVU", "sparsity_weight": "Sparsity weight"}
    units = {"l0": "active latents a sample", "fvu": "share of variance unexplained"}
    for ax, key in zip(axes, titles, strict=True):
        drawn = {sae: per_seed(of[key]) for sae, of in in_order(curves)}
        for sae, ys in drawn.items():
            seed_lines(ax, x, ys, over_seeds(np.nanmedian, ys), colours[sae])
        ax.set_title(titles[key])
        ax.set_ylabel(units.get(key, "weight of the sparsity loss"))
        ax.set_xlabel("training step")
        ax.grid(True)
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(thousands))
        if key == "l0":
            _frame_l0(ax, list(drawn.values()), target_l0)
        else:
            log_axis(ax, *drawn.values())
    lines = [
        sae_line(sae, colours[sae], len(per_seed(of["fvu"])), "median of ")
        for sae, of in in_order(curves)
    ]
    for name, level, dashes in (("target", target_l0, "--"), ("true", expected_l0, ":")):
        if level is not None:
            line = axes[0].axhline(level, color=INK, linewidth=1, linestyle=dashes, zorder=5)
            line.set_label(f"{name} L0, {level:.4g}")
            lines.append(line)
    legend(figure, lines, 0.05)
    return figure


def _frame_l0(ax: Axes, curves: Sequence[np.ndarray], target: float) -> None:
    """Sets limits that include the target, and L0 after the first fifth of the steps.

    In the first fifth, L0 may be many times as high. curves: each [n_seeds, n_points].
    """
    settled = np.concatenate([ys[:, ys.shape[1] // 5 :].ravel() for ys in curves])
    settled = settled[np.isfinite(settled)]
    top = float(np.quantile(settled, 0.99)) if settled.size else 0.0
    ax.set_ylim(0, max(1.3 * target, 1.15 * top))


@style
def _toy_seeds_figure(
    runs: Sequence[Mapping[str, Any]], tree: "FeatureTree", threshold: float
) -> Figure:
    layout = tree_axis(tree)
    saes = [sae for sae, _ in in_order({run["sae"]: None for run in runs})]
    colours = colours_of(saes)
    figure = new_figure(3.9)
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
                over_seeds(np.nanmedian, best), centre - 0.48 * width, centre + 0.48 * width,
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
    mark_features(ax, layout, "x")
    ax.set_xlabel(feature_key(layout, "columns"), labelpad=29)

    _clean_counts(counts, runs, saes, tree.n_features, threshold)
    legend(
        figure,
        [patch(sae, sum(run["sae"] == sae for run in runs), colours[sae]) for sae in saes],
        0.06,
    )
    return figure


def _clean_counts(
    ax: Axes, runs: Sequence[Mapping[str, Any]], saes: Sequence[str], n_features: int,
    threshold: float,
) -> None:  # fmt: skip
    """Draws a bar for each number of clean features: how many seeds of an SAE reached it."""
    colours = colours_of(saes)
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


@style
def _refit_cosines_figure(
    best_by_stage: Mapping[str, Any], tree: "FeatureTree", sae: str, lowest: float
) -> Figure:
    kinds = {kind: np.array(tree.kind) == kind for kind in dict.fromkeys(tree.kind)}
    figure = new_figure(0.95 + len(best_by_stage) * (0.14 + 0.27 * len(kinds)))
    height = figure.get_figheight()
    stages = figure.add_gridspec(
        len(best_by_stage), 1, left=0.16, right=0.97, top=1 - 0.4 / height, bottom=0.5 / height,
        hspace=0.2,
    )  # fmt: skip
    for row, (stage, values) in enumerate(best_by_stage.items()):
        best = as_array(values).clip(lowest, 1)
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
    n_seeds = len(as_array(next(iter(best_by_stage.values()))))
    what = f"{title_of(sae)}, {count_of(n_seeds, 'seed')}; features a seed: {counts}"
    headline(figure, what, 0.16)
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


@style
def _fvu_by_prefix_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, colours = new_figure(3.7), colours_of(curves)
    ax = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.86, "top": 0.9, "bottom": 0.13})
    lines, ends = [], []
    for sae, of in in_order(curves):
        x, ys = as_array(of["prefix"]), per_seed(of["fvu"])
        mean = over_seeds(np.nanmean, ys)
        seed_lines(ax, x, ys, mean, colours[sae], marker="o")
        lines.append(sae_line(sae, colours[sae], len(ys), "mean of "))
        ends.append((x[-1], mean[-1], sae))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    log_axis(ax, *(per_seed(of["fvu"]) for of in curves.values()))
    _label_ends(ax, ends, colours)
    widths = np.concatenate([as_array(of["prefix"]) for of in curves.values()])
    ax.set_xlim(widths.min() / 1.1, widths.max() * 1.1)
    ax.grid(True)
    ax.set_xlabel("latents used: the first so many of the dictionary (log scale)")
    ax.set_ylabel("FVU (share of variance unexplained, log scale)")
    legend(figure, lines, 0.06)
    return figure


def _label_ends(
    ax: Axes, ends: Sequence[tuple[float, float, str]], colours: Mapping[str, str]
) -> None:
    """Writes each curve's last value beside its end; labels that would overlap are moved apart."""
    height = 72 * ax.get_position().height * height_of(ax)  # points
    last = -np.inf
    for x, y, sae in sorted((e for e in ends if np.isfinite(e[1])), key=lambda e: e[1]):
        fraction = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]
        at = max(fraction * height, last + 11)
        ax.annotate(
            f"{label_of(sae, 11)} {y:.3f}", (1, at / height), (2, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", fontsize=7.5, color=colours[sae],
        )  # fmt: skip
        last = at


@style
def _density_histograms_figure(densities: Mapping[str, Any]) -> Figure:
    by_sae = {sae: [of] if isinstance(of, Mapping) else list(of) for sae, of in in_order(densities)}
    colours = colours_of(by_sae)
    low = min([-1.0, *(_rarest(one) for of in by_sae.values() for one in of)])
    dead_at, bar = 1.07 * low, 0.055 * -low / len(by_sae)  # a little left of the rarest

    figure = new_figure(3.3)
    ax = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.985, "top": 0.87, "bottom": 0.15})
    lines = []
    for i, (sae, of) in enumerate(by_sae.items()):
        edges = as_array(of[0]["log10_edges"])
        shown = edges[:-1] >= low - 1e-9
        sizes = np.array([max(sum(one["counts"]) + one["never"], 1) for one in of])  # [n_seeds]
        shares = 100 * as_array([one["counts"] for one in of]) / sizes[:, None]  # [n_seeds, n_bins]
        shares, edges = shares[:, shown], np.append(edges[:-1][shown], edges[-1])
        for row in shares if len(shares) > 1 else []:
            ax.stairs(row, edges, color=colours[sae], alpha=0.4, linewidth=0.7)
        ax.stairs(shares.mean(axis=0), edges, color=colours[sae], linewidth=2, zorder=3)
        ax.stairs(shares.mean(axis=0), edges, color=colours[sae], fill=True, alpha=0.13)
        dead = float((100 * as_array([one["never"] for one in of]) / sizes).mean())
        at = dead_at + (i - (len(by_sae) - 1) / 2) * bar * 1.05
        ax.bar(at, dead, bar, color=colours[sae], zorder=3)
        lines.append(sae_line(sae, colours[sae], len(of), "mean of ", f"; dead {dead:.3g}%"))
    ax.axvline(1.025 * low, color=FAINT, linewidth=0.7, linestyle=":")
    ticks = np.arange(int(low), 1)
    ax.set_xticks([dead_at, *ticks], ["dead", *(f"$10^{{{t}}}$" if t else "1" for t in ticks)])
    ax.set_xlim(1.12 * low, -0.01 * low)
    ax.set_ylim(bottom=0)
    ax.grid(True, axis="y")
    ax.set_xlabel("firing frequency: share of tokens on which a latent fires (log scale)")
    ax.set_ylabel("latents per bin (%)")
    legend(figure, lines, 0.06)
    return figure


def _rarest(histogram: Mapping[str, Any]) -> float:
    """log10 of the power of ten below the frequency of the rarest latent that fires; 0 if none."""
    bins = np.flatnonzero(as_array(histogram["counts"]))
    return float(np.floor(histogram["log10_edges"][bins[0]] + 1e-9)) if len(bins) else 0.0
