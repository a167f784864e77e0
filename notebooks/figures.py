"""The figures that only the notebook has, each a PNG in the style of matryoshka/plot_style.py."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

import train_toy
from matryoshka.plot_style import (
    COLOURS,
    FAINT,
    INK,
    MISSED,
    colours_of,
    in_order,
    label_of,
    legend,
    new_figure,
    patch,
    style,
    write,
)
from matryoshka.prefix_draws import expected_reach, reach
from sae import STREAM_PREFIXES, prefix_probabilities, sample_prefixes, seeded_generator
from studies import tables, toy_tables

Results = dict[str, Any]
BLUE = COLOURS["matryoshka"]
GREY = "#C9C9C9"


def log_ticks(axes: Axes) -> None:
    """Labels 1, 2 and 5 of every power of ten on the y axis, which is logarithmic."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=99))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def kinds_in(results: Results) -> list[str]:
    """The kinds of SAE that were trained, in the order in which every figure has them."""
    return [sae for sae, _ in in_order(dict.fromkeys(tables.kinds_of(results)))]


# ----------------------------------------------------------------------------------- 1. the idea

TOY_LATENTS, TOY_PREFIXES = 20, 10
N_DRAWS = 20_000


@style
def nested(path: Path) -> None:
    """Ten prefixes of the toy's first step, the law they are drawn from, and the reach."""
    drawing = new_figure(3.1)
    left, middle, right = drawing.subplots(
        1, 3, gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.82, "bottom": 0.15,
                           "wspace": 0.28, "width_ratios": (1.15, 1, 1)},
    )  # fmt: skip
    _draw_first_step(left)
    _draw_law(middle)
    _draw_reach(right)
    key = [
        Line2D([], [], color=GREY, linewidth=6, label="by the law"),
        Line2D([], [], color=BLUE, linestyle="", marker=".", label=f"{N_DRAWS:,} draws"),
        Line2D([], [], color=BLUE, label=f"expected reach, {TOY_LATENTS} latents"),
        Line2D([], [], color=BLUE, linestyle="--", label="1,024 latents"),
        Line2D([], [], color=COLOURS["vanilla"], linewidth=2, label="vanilla: one prefix"),
    ]
    legend(drawing, key, 0.035)
    write(path, drawing)


def _draw_first_step(axes: Axes) -> None:
    """A bar a prefix, as long as it has latents: those of seed 0."""
    generator = seeded_generator(0, STREAM_PREFIXES, 0)
    lengths = sample_prefixes(TOY_LATENTS, TOY_PREFIXES, generator, 256)[0].tolist()
    for row, length in enumerate(lengths):
        axes.barh(row, length, 0.72, color=BLUE, alpha=0.3 + 0.07 * row)
        axes.annotate(
            f"{length}", (length, row), (2, 0), textcoords="offset points", va="center",
            fontsize=7, color=INK,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, 21.5)
    axes.set_yticks([])
    axes.set_ylabel("ten prefixes, one step", labelpad=6)
    axes.set_xlabel("latents, the largest first")
    axes.set_title("Nested dictionaries")


def _draw_law(axes: Axes) -> None:
    """The probability of a length, and how often it is drawn."""
    drawn = sample_prefixes(TOY_LATENTS, 2, seeded_generator(0), N_DRAWS)[:, 0].numpy()
    shares = np.bincount(drawn, minlength=TOY_LATENTS)[1:] / len(drawn)
    lengths = np.arange(1, TOY_LATENTS)
    axes.bar(lengths, prefix_probabilities(TOY_LATENTS).numpy(), 0.75, color=GREY)
    axes.plot(lengths, shares, ".", color=BLUE, markersize=5)
    axes.set_xlabel("prefix length")
    axes.set_ylabel("probability of a draw")
    axes.set_title("Lengths that are drawn")


def _draw_reach(axes: Axes) -> None:
    """The share of prefixes that hold each latent: exact, drawn, of more latents, of vanilla."""
    prefixes = sample_prefixes(TOY_LATENTS, TOY_PREFIXES, seeded_generator(0), N_DRAWS)
    drawn = reach(prefixes, TOY_LATENTS).mean(dim=0).numpy()
    places = np.arange(1, TOY_LATENTS + 1) / TOY_LATENTS
    exact, large = (expected_reach(n, TOY_PREFIXES).numpy() for n in (TOY_LATENTS, 1024))
    axes.plot(places, exact, color=BLUE, linewidth=1.6)
    axes.plot(places, drawn, ".", color=BLUE, markersize=5)
    axes.plot(np.arange(1, 1025) / 1024, large, "--", color=BLUE, linewidth=1.2)
    axes.axhline(1, color=COLOURS["vanilla"], linewidth=1.8)
    axes.set_ylim(0, 1.06)
    axes.set_xlabel("place of the latent, as a share of all")
    axes.set_ylabel("share of prefixes with it")
    axes.set_title("Reach")


# ------------------------------------------------------------------------------------ 2. the toy

ABSORBED = 1 / math.sqrt(2)  # child plus parent, against the child
CHILD_GIVEN_PARENT = 0.2  # of the tree: each of three children
HEDGED_PARENT = 1 / math.sqrt(1 + 3 * CHILD_GIVEN_PARENT**2)  # parent + 0.2 of each child
# what such a parent leaves to its child: 0.8 of itself, less 0.2 of each sibling
HEDGED_CHILD = 0.8 / math.sqrt(0.8**2 + 2 * CHILD_GIVEN_PARENT**2)
# By kind of SAE and of feature: what its cosine is predicted to be, and why.
PREDICTED = {
    ("vanilla", "parent"): (1.0, "clean"),
    ("vanilla", "child"): (ABSORBED, "absorbed"),
    ("matryoshka", "parent"): (HEDGED_PARENT, "hedged"),
    ("matryoshka", "child"): (HEDGED_CHILD, "hedged"),
}


@style
def cosines(path: Path, results: Results) -> None:
    """Best decoder cosines over seeds: a row a kind of SAE, a column a kind of feature."""
    tree = train_toy.load_tree(results["sources"][0]["config"]["tree"])
    kinds = np.array(tree.kind)
    best = {
        sae: np.array([run["best_cosine"] for run in tables.runs_of(results, sae)])
        for sae in kinds_in(results)
    }  # [n_seeds, n_features] each
    colours = colours_of(best)
    drawing = new_figure(0.9 + 1.6 * len(best))
    axes = drawing.subplots(
        len(best), 3, sharex=True, sharey=True, squeeze=False,
        gridspec_kw={"left": 0.075, "right": 0.985, "top": 0.87, "bottom": 0.12, "wspace": 0.06,
                     "hspace": 0.3},
    )  # fmt: skip
    lowest = math.floor(10 * min(float(of.min()) for of in best.values())) / 10
    edges = np.linspace(lowest, 1, round(100 * (1 - lowest)) + 1)
    threshold = results["sources"][0]["config"]["threshold"]
    for row, (sae, of_sae) in zip(axes, best.items(), strict=True):
        for ax, kind in zip(row, ("parent", "child", "rare"), strict=True):
            counts = np.histogram(of_sae[:, kinds == kind].clip(max=1), edges)[0]
            _draw_cosines(ax, colours[sae], counts, edges, threshold)
            _mark_prediction(ax, PREDICTED.get((sae, kind)))
            ax.set_xlim(lowest, 1.01)
            ax.xaxis.set_major_locator(MaxNLocator(4, prune="lower"))  # else neighbours touch
        row[0].set_ylabel(label_of(sae), color=colours[sae], fontweight="bold")
        row[0].set_ylim(0.7, 30 * len(of_sae))
    for ax, kind in zip(axes[-1], ("parent", "child", "rare feature"), strict=True):
        n = int((kinds == kind.split()[0]).sum())
        ax.set_xlabel(f"best cosine to a {kind} ({n} a seed)")
    key = [
        *(patch(sae, len(of), colours[sae]) for sae, of in best.items()),
        Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 2)), label="clean above"),
        Line2D([], [], color=INK, linewidth=0.8, linestyle=":", label="predicted"),
    ]
    legend(drawing, key, 0.065)
    drawing.text(0.985, 0.965, "height: features over all seeds (log scale)", ha="right",
                 va="center", fontsize=7.5, color=INK)  # fmt: skip
    write(path, drawing)


def _draw_cosines(
    axes: Axes, colour: str, counts: np.ndarray, edges: np.ndarray, threshold: float
) -> None:
    """One histogram, on a logarithmic axis, with the threshold."""
    axes.stairs(counts, edges, color=colour, fill=True, alpha=0.55)
    axes.stairs(counts, edges, color=colour, linewidth=1)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _mark_prediction(axes: Axes, predicted: tuple[float, str] | None) -> None:
    """A dotted line where a cosine is predicted to be, and its name above the axes."""
    if predicted is None:
        return
    cosine, name = predicted
    axes.axvline(cosine, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.annotate(
        f"{name} {cosine:.3f}", (cosine, 1), (0, 2), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if cosine > 0.9 else "center", va="bottom",
        fontsize=7.5, color=INK,
    )  # fmt: skip


@style
def recipes(path: Path) -> None:
    """FVU of every Matryoshka seed by recipe; those that lost a feature are marked."""
    drawing = new_figure(2.5)
    ax = drawing.subplots(gridspec_kw={"left": 0.19, "right": 0.9, "top": 0.87, "bottom": 0.17})
    for row, file in enumerate(tables.RECIPES.values()):
        runs = tables.runs_of(tables.read(f"toy/{file}.json"), "matryoshka")
        fvu = np.array([run["fvu"] for run in runs])
        short = np.array([run["clean_features"] < run["n_features"] for run in runs])
        place = np.argsort(np.argsort(np.arange(len(fvu)) * 0.618034 % 1)) / len(fvu)
        y = row + 0.5 * (place - 0.5)
        ax.scatter(fvu[~short], y[~short], s=9, color=BLUE, alpha=0.5, linewidths=0)
        ax.scatter(fvu[short], y[short], s=22, color=MISSED, marker="X", linewidths=0, zorder=3)
        ax.annotate(
            f"{(~short).sum()} of {len(fvu)}", (1, row), (4, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=INK,
        )  # fmt: skip
    labels = [name.replace(" (", "\n(").replace(", ", ",\n") for name in tables.RECIPES]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(True, axis="x")
    ax.set_xlabel("FVU on held-out samples (right: seeds at 20/20)")
    key = [
        Line2D([], [], color=BLUE, linestyle="", marker="o", markersize=3.5,
               label="a seed with 20/20"),
        Line2D([], [], color=MISSED, linestyle="", marker="X", markersize=5.5, label="with fewer"),
    ]  # fmt: skip
    legend(drawing, key, 0.18)
    write(path, drawing)


@style
def clean_by_threshold(path: Path, results: Results) -> None:
    """Clean features by the cosine that counts as clean: a panel a stage of refitting."""
    drawing = new_figure(2.7)
    titles = ("As trained", "Decoder refitted", "Both refitted")
    axes = drawing.subplots(
        1, len(titles), sharey=True,
        gridspec_kw={"left": 0.058, "right": 0.985, "top": 0.79, "bottom": 0.17, "wspace": 0.08},
    )  # fmt: skip
    thresholds = np.linspace(0.6, 1.0, 401)
    kinds = kinds_in(results)
    colours = colours_of(kinds)
    for ax, title, how in zip(axes, titles, toy_tables.REFITS, strict=True):
        for sae in kinds:
            runs = tables.runs_of(results, sae + how)
            best = np.array([run["best_cosine"] for run in runs])  # [n_seeds, n_features]
            clean = (best[:, :, None] > thresholds).sum(axis=1).mean(axis=0)
            ax.plot(thresholds, clean, color=colours[sae], linewidth=1.7)
        for level in map(float, toy_tables.THRESHOLDS):
            ax.axvline(level, color=FAINT, linewidth=0.7, linestyle=":", zorder=0)
        ax.set_title(title)
        ax.set_xlim(0.6, 1.002)
        ax.set_xticks([0.7, 0.8, 0.9, 1.0])
        ax.grid(True, axis="y")
    axes[0].set_ylim(0, 20.6)
    axes[0].yaxis.set_major_locator(MaxNLocator(4, steps=[5]))
    axes[0].set_ylabel("clean features of 20, mean over seeds")
    axes[1].set_xlabel("cosine above which a feature is clean (dotted: 0.9, 0.95, 0.99)")
    n_seeds = {sae: len(tables.runs_of(results, sae)) for sae in kinds}
    legend(drawing, [patch(sae, n_seeds[sae], colours[sae]) for sae in kinds], 0.05)
    write(path, drawing)


# -------------------------------------------------------------------------------------- 4. speed


@style
def speed(path: Path) -> None:
    """A step at full size by kind, and by the size of the dictionary, beside the products."""
    times = tables.read("bench/step.json")["sources"][0]["step"]
    shown = {name: t for name, t in times.items() if not name.startswith("of these")}
    drawing = new_figure(0.6 + 0.2 * len(shown))
    left, right = drawing.subplots(
        1, 2, gridspec_kw={"left": 0.29, "right": 0.985, "top": 0.9, "bottom": 0.16,
                           "wspace": 0.24, "width_ratios": (1.35, 1)},
    )  # fmt: skip
    _draw_steps(left, shown, times["five dense products"]["median"])
    _draw_growth(right, tables.read("bench/growth.json")["sources"][0]["growth"])
    write(path, drawing)


def _draw_steps(axes: Axes, times: Mapping[str, Mapping[str, float]], yardstick: float) -> None:
    """A bar a kind of step, with its quartiles, as a multiple of `yardstick` milliseconds."""
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    for row, (name, t) in enumerate(times.items()):
        colour = COLOURS["vanilla"] if "vanilla" in name else BLUE
        if name.endswith("five dense products"):
            colour = FAINT
        strength = 0.4 if name.startswith(("the original", "SAELens")) else 0.85
        axes.barh(row, t["median"] / yardstick, 0.62, color=colour, alpha=strength)
        axes.hlines(row, t["q1"] / yardstick, t["q3"] / yardstick, color=INK, linewidth=1.2)
        axes.annotate(
            f"{t['median']:.0f} ms", (max(t["q3"], t["median"]) / yardstick, row), (4, 0),
            textcoords="offset points", va="center", fontsize=7.5, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_yticks(range(len(times)), list(times))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.2 * max(t["q3"] for t in times.values()) / yardstick)
    axes.set_xlabel("time, in that of the products (line: quartiles)")
    axes.set_title("A step at 3,072 latents")


def _draw_growth(axes: Axes, growth: Mapping[str, Mapping[str, float]]) -> None:
    """Milliseconds a step by the size of the dictionary, on two logarithmic axes."""
    end = " latents, five products"
    sizes = [int(name.removesuffix(end)) for name in growth if name.endswith(end)]
    for suffix, label, colour, alpha in (
        (end, "products", FAINT, 1.0),
        (" latents", "10 prefixes", BLUE, 0.85),
        (" latents, bfloat16", "in bfloat16", BLUE, 0.5),
    ):
        medians = [growth[f"{n}{suffix}"]["median"] for n in sizes]
        axes.plot(sizes, medians, "o-", color=colour, alpha=alpha, markersize=4, linewidth=1.8)
        below = "bfloat16" in suffix
        axes.annotate(
            label, (sizes[2], medians[2]), (5, -12) if below else (-4, 6),
            textcoords="offset points", ha="left" if below else "right", fontsize=7.5,
            color=colour,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=6.5)
    axes.minorticks_off()
    log_ticks(axes)
    axes.grid(True)
    axes.set_xlabel("latents")
    axes.set_ylabel("ms a step (log scale)", labelpad=1)
    axes.set_title("By size, at L0 30")
