"""Heatmaps of the toy: samples as features and as latents, and cosines with true directions.

Each function writes one PNG, whole or not at all. See plot_style.py for what all figures share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from matryoshka.plot_style import (
    ABSENT,
    INK,
    MISSED,
    as_array,
    colours_of,
    headline,
    in_order,
    new_figure,
    style,
    title_of,
    write,
)
from matryoshka.tree_axis import feature_key, mark_features, tree_axis

if TYPE_CHECKING:
    from toy_model import FeatureTree

# Rows of a heatmap of samples, at most: with more rows than pixels, some would be lost at random.
MAX_ROWS = 400
ACTIVATION = LinearSegmentedColormap.from_list(
    "activation", ["#FFFFFF", "#B9A9D6", "#6A3D9A", "#2D0A4E"]
)
COSINE = LinearSegmentedColormap.from_list(
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
    write(path, _toy_activations_figure(truth, acts_by_sae, tree))


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
    write(path, _toy_cosines_figure(cosines_by_sae, tree, which))


@style
def _toy_activations_figure(
    truth: Any, acts_by_sae: Mapping[str, Any], tree: "FeatureTree"
) -> Figure:
    layout = tree_axis(tree)
    panels = {"truth": as_array(truth)} | {sae: as_array(a) for sae, a in in_order(acts_by_sae)}
    colours = colours_of(panels)
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
            acts, aspect="auto", interpolation="nearest", cmap=ACTIVATION, vmin=0, vmax=largest
        )
        _overlay(ax, missing[name], ABSENT)
        if name != "truth":
            _overlay(ax, active & (acts <= 0), MISSED)
        ax.set_title(title_of(name), color=colours[name])
        for border in borders:
            ax.axhline(border, color="#BBBBBB", linewidth=0.4)
        mark_features(ax, layout, "x")
        ax.set_yticks([])
    figure.axes[0].set_ylabel(_sample_count(len(rows), n))
    key: list[Any] = [Patch(color=MISSED, label="feature active, its latent silent")]
    if any(where.any() for where in missing.values()):
        key.append(Patch(color=ABSENT, label="no latent for the feature"))
    figure.legend(
        handles=key, loc="upper right", bbox_to_anchor=(0.911, 1.0), ncols=2, borderaxespad=0.4,
        handlelength=1.2,
    )  # fmt: skip
    headline(figure, "Rows: samples. " + feature_key(layout, "Columns"), 0.05)
    _colour_bar(figure, image, figure.axes[0], "activation (units of the data)")
    return figure


@style
def _toy_cosines_figure(
    cosines_by_sae: Mapping[str, Any], tree: "FeatureTree", which: str
) -> Figure:
    layout, colours = tree_axis(tree), colours_of(cosines_by_sae)
    figure, axes = _panels(len(cosines_by_sae), 2, 4.55, left=0.085, right=0.86, wspace=0.32)
    image = None
    for ax, (sae, cosines) in zip(axes, in_order(cosines_by_sae), strict=True):
        values = as_array(cosines)[np.ix_(layout.order, layout.order)]
        image = ax.imshow(values, aspect="auto", cmap=COSINE, vmin=-1, vmax=1)
        _overlay(ax, np.isnan(values), ABSENT)
        ax.set_title(title_of(sae), color=colours[sae])
        mark_features(ax, layout, "x")
        mark_features(ax, layout, "y")
        if len(values) <= 26:  # with more rows the numbers would touch
            _beside_rows(ax, np.diag(values))
    figure.axes[0].set_ylabel("latent, by the feature matched to it", labelpad=27)
    headline(
        figure,
        f"Cosine of {which} and true directions. {feature_key(layout, 'Columns')}. "
        "Beside a row: its diagonal.",
        0.085,
    )
    _colour_bar(figure, image, figure.axes[0], "cosine")
    return figure


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


def _panels(
    n: int, per_row: int, height: float, *, left: float, right: float, wspace: float
) -> tuple[Figure, list[Axes]]:
    """`n` heatmaps side by side, in rows of at most `per_row`, each row `height` inches high."""
    n_rows, n_columns = max(-(-n // per_row), 1), max(min(n, per_row), 1)
    head, foot, between = 0.6, 0.55, 0.95  # inches
    figure = new_figure(n_rows * height + (n_rows - 1) * (between - head - foot))
    total = figure.get_figheight()
    grid = figure.add_gridspec(
        n_rows, n_columns, left=left, right=right, top=1 - head / total, bottom=foot / total,
        wspace=wspace, hspace=between / (height - head - foot),
    )  # fmt: skip
    return figure, [figure.add_subplot(grid[i // n_columns, i % n_columns]) for i in range(n)]


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
