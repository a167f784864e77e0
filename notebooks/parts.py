"""What only the notebook has: its figures, a few tables, and how it shows them.

Functions that draw write one PNG in the style of plots.py; those that return text return Markdown
made of results/ and nothing else, as those of report.py do.
"""

import dataclasses
import io
import math
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import IPython.display
import numpy as np
import PIL.Image
import scipy.stats
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import ablate_toy
import bench
import evaluate
import plots
import report
import sae
import script
import train_tinystories
import train_toy
from plots import COLOURS, FAINT, INK, MISSED, NAMES, _figure, _legend, _style, _write

Results = dict[str, Any]

# --------------------------------------------------------------------------------------- showing


def text(*paragraphs: str | Callable[[], str]) -> None:
    """Shows Markdown, or what functions return as such; one line in place of absent results."""
    shown = [p if isinstance(p, str) else or_absence(p) for p in paragraphs]
    IPython.display.display(IPython.display.Markdown("\n\n".join(shown)))


def or_absence(make: Callable[[], str]) -> str:
    """What `make` returns, or which file of results/ it lacks."""
    try:
        return make()
    except script.UserError as error:
        return f"*{error}*"


def figure(draw: Callable[..., None], *args: Any, alt: str) -> None:
    """Shows the figure that `draw(path, *args)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        try:
            draw(path, *args)
        except script.UserError as error:
            text(f"*{error}*")
        else:
            png(path, alt)


def png(path: Path, alt: str) -> None:
    """Shows a figure at half its pixels; in 256 colours it has a third of the bytes."""
    few = PIL.Image.open(path).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    IPython.display.display(IPython.display.Image(buffer.getvalue(), width=830, alt=alt))


# --------------------------------------------------------------------------- where numbers are from

# Settings that say where files go or how the work is shared, not what is computed.
NOT_SHOWN = {"out", "device", "workers", "resume", "checkpoint_every"}
CONFIGS = {
    "train_toy.py": train_toy.Config,
    "ablate_toy.py": ablate_toy.Config,
    "train_tinystories.py": train_tinystories.Config,
    "evaluate.py": evaluate.Config,
}


def made_by(name: str, program: str) -> str:
    """The command that made a file of results/, from the settings in it, and where that was."""
    return or_absence(lambda: _made_by(name, program))


def _made_by(name: str, program: str) -> str:
    results = report.read(name)
    flags = []
    for field in dataclasses.fields(CONFIGS[program]):
        value = results["config"].get(field.name, field.default)
        filled_in = program == "train_toy.py" and field.name == "n_latents"
        if value == field.default or field.name in NOT_SHOWN or filled_in:
            continue
        flag = field.name.replace("_", "-")
        shown = f"{value:g}" if isinstance(value, float) else value
        flags.append(f" --{flag}" if value is True else f" --{flag} {shown}")
    took = f", {results['seconds']:.0f} s" if "seconds" in results else ""
    return f"`results/{name}`: `python {program}{''.join(flags)}`, {where(results)}{took}"


def bench_table(part: str) -> str:
    """A part of bench.py as it prints it."""
    return bench.show(report.read(f"bench/{part}.json")[part])


def measured_by(part: str) -> str:
    """As `made_by`, of a part of bench.py."""
    name = f"bench/{part}.json"
    return or_absence(
        lambda: f"`results/{name}`: `python bench.py --part {part}`, {where(report.read(name))}"
    )


def where(results: Results) -> str:
    """On what results were measured."""
    e = results["environment"]
    threads = plots._count(e["threads"], "thread")
    return f"on {e['device']}, {threads}, torch {e['torch']}"


# ----------------------------------------------------------------------------------- 1. the idea


@_style
def nested(path: Path) -> None:
    """Ten prefixes of the toy's first step, the law they are drawn from, and the reach."""
    n, k = 20, 10
    drawing = _figure(3.1)
    axes = drawing.subplots(
        1, 3, gridspec_kw={"left": 0.045, "right": 0.985, "top": 0.82, "bottom": 0.15,
                           "wspace": 0.28, "width_ratios": (1.15, 1, 1)},
    )  # fmt: skip
    first = sae.sample_prefixes(n, k, sae.seeded_generator(0, sae.STREAM_PREFIXES, 0), 256)[0]
    for row, length in enumerate(first.tolist()):
        axes[0].barh(row, length, 0.72, color=COLOURS["matryoshka"], alpha=0.3 + 0.07 * row)
        axes[0].annotate(
            f"{length}", (length, row), (2, 0), textcoords="offset points", va="center",
            fontsize=7, color=INK,
        )  # fmt: skip
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 21.5)
    axes[0].set_yticks([])
    axes[0].set_ylabel("ten prefixes, one step", labelpad=6)
    axes[0].set_xlabel("latents, the largest first")
    axes[0].set_title("Nested dictionaries")

    law = sae.prefix_probabilities(n).numpy()
    drawn = sae.sample_prefixes(n, 2, sae.seeded_generator(0), 20_000)[:, 0].numpy()
    seen = np.bincount(drawn, minlength=n)[1:] / len(drawn)
    lengths = np.arange(1, n)
    axes[1].bar(lengths, law, 0.75, color="#C9C9C9")
    axes[1].plot(lengths, seen, ".", color=COLOURS["matryoshka"], markersize=5)
    axes[1].set_xlabel("prefix length")
    axes[1].set_ylabel("probability of a draw")
    axes[1].set_title("Lengths that are drawn")

    prefixes = sae.sample_prefixes(n, k, sae.seeded_generator(0), 20_000)
    reach = sae.reach(prefixes, n).mean(dim=0).numpy()
    exact = sae.expected_reach(n, k).numpy()
    large = sae.expected_reach(1024, k).numpy()
    axes[2].plot(np.arange(1, n + 1) / n, exact, color=COLOURS["matryoshka"], linewidth=1.6)
    axes[2].plot(np.arange(1, n + 1) / n, reach, ".", color=COLOURS["matryoshka"], markersize=5)
    axes[2].plot(np.arange(1, 1025) / 1024, large, "--", color=COLOURS["matryoshka"], linewidth=1.2)
    axes[2].axhline(1, color=COLOURS["vanilla"], linewidth=1.8)
    axes[2].set_ylim(0, 1.06)
    axes[2].set_xlabel("place of the latent, as a share of all")
    axes[2].set_ylabel("share of prefixes with it")
    axes[2].set_title("Reach")
    blue = COLOURS["matryoshka"]
    key = [
        Line2D([], [], color="#C9C9C9", linewidth=6, label="by the law"),
        Line2D([], [], color=blue, linestyle="", marker=".", label="20,000 draws"),
        Line2D([], [], color=blue, label="expected reach, 20 latents"),
        Line2D([], [], color=blue, linestyle="--", label="1,024 latents"),
        Line2D([], [], color=COLOURS["vanilla"], linewidth=2, label="vanilla: one prefix"),
    ]
    _legend(drawing, key, 0.035)
    _write(path, drawing)


# ------------------------------------------------------------------------------------ 2. the toy

ABSORBED = 1 / math.sqrt(2)  # child plus parent, against the child
CHILD_GIVEN_PARENT = 0.2  # of the tree: each of three children
HEDGED_PARENT = 1 / math.sqrt(1 + 3 * CHILD_GIVEN_PARENT**2)  # parent + 0.2 of each child
# what such a parent leaves to its child: 0.8 of itself, less 0.2 of each sibling
HEDGED_CHILD = 0.8 / math.sqrt(0.8**2 + 2 * CHILD_GIVEN_PARENT**2)


@_style
def cosines(path: Path, results: Results) -> None:
    """Best decoder cosines over seeds by kind of feature, with what theory says of the three."""
    tree = train_toy.load_tree(results["config"]["tree"])
    kinds = np.array(tree.kind)
    marks = {
        "parent": [(HEDGED_PARENT, "hedged\n0.945")],
        "child": [(ABSORBED, "absorbed\n0.707"), (HEDGED_CHILD, "hedged\n0.943")],
        "rare": [],
    }
    drawing = _figure(3.0)
    axes = drawing.subplots(
        1, 3, sharey=True,
        gridspec_kw={"left": 0.068, "right": 0.985, "top": 0.79, "bottom": 0.15, "wspace": 0.08},
    )  # fmt: skip
    lowest = min(min(run["best_cosine"]) for run in results["runs"] if run["sae"] in train_toy.SAES)
    start = math.floor(10 * lowest) / 10
    edges = np.linspace(start, 1, round(100 * (1 - start)) + 1)
    threshold = results["config"]["threshold"]
    for ax, (kind, levels) in zip(axes, marks.items(), strict=True):
        for name in ("vanilla", "matryoshka"):
            best = np.array([run["best_cosine"] for run in report.runs_of(results, name)])
            counts = np.histogram(best[:, kinds == kind].clip(max=1), edges)[0]
            ax.stairs(counts, edges, color=COLOURS[name], fill=True, alpha=0.55)
            ax.stairs(counts, edges, color=COLOURS[name], linewidth=1)
        for level, label in levels:
            ax.axvline(level, color=INK, linewidth=0.8, linestyle=":", zorder=0)
            ax.annotate(
                label, (level, 1), (0, 2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=INK,
            )  # fmt: skip
        ax.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        ax.set_yscale("log")
        ax.set_xlim(start, 1.01)
        what = "rare feature" if kind == "rare" else kind
        ax.set_xlabel(f"best cosine to a {what} ({(kinds == kind).sum()} a seed)")
    n = len(report.runs_of(results, "matryoshka"))
    axes[0].set_ylim(0.7, 12 * n)
    axes[0].set_ylabel("features, over all seeds (log scale)")
    key: list[Any] = [plots._patch(name, n) for name in ("vanilla", "matryoshka")]
    key.append(Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 2)), label="clean above"))
    _legend(drawing, key, 0.058)
    _write(path, drawing)


def failures(results: Results) -> str:
    """How many Matryoshka seeds fall short, and how their FVU stands apart."""
    runs = report.runs_of(results, "matryoshka")
    whole = [run["fvu"] for run in runs if run["clean_features"] == run["n_features"]]
    short = [run["fvu"] for run in runs if run["clean_features"] < run["n_features"]]
    lost = ", ".join(
        f"{kind} {sum(run['lost'][kind] for run in runs)}" for kind in ("parent", "child", "rare")
    )
    found = (
        f"**{len(short)} of {len(runs)}** Matryoshka seeds recover fewer than all features. Lost "
        f"by kind, over all seeds: {lost}."
    )
    if not short or not whole:
        return found
    return (
        f"{found} Their FVU is {min(short):.4f} to {max(short):.4f}, that of the others "
        f"{min(whole):.4f} to {max(whole):.4f}."
    )


def told_apart() -> str:
    """Whether the ablation's seeds tell the original's three defects together from none of them."""
    ablation = report.read("toy_ablation/ablation.json")
    n = ablation["config"]["seeds"]
    whole = [
        ablation["variants"][name]["matryoshka"]["clean_features"].get("20", 0)
        for name in ("none", "all")
    ]
    p = scipy.stats.fisher_exact([[k, n - k] for k in whole]).pvalue
    return (
        f"20/20 in {whole[0]} of {n} seeds with none of the defects, in {whole[1]} with all three: "
        f"Fisher's exact test, two-sided, p = {p:.2f}."
    )


@_style
def recipes(path: Path) -> None:
    """FVU of every Matryoshka seed by recipe; those that lost a feature are marked."""
    drawing = _figure(2.5)
    ax = drawing.subplots(gridspec_kw={"left": 0.19, "right": 0.9, "top": 0.87, "bottom": 0.17})
    for row, folder in enumerate(report.RECIPES.values()):
        runs = report.runs_of(report.read(f"{folder}/results.json"), "matryoshka")
        fvu = np.array([run["fvu"] for run in runs])
        short = np.array([run["clean_features"] < run["n_features"] for run in runs])
        place = np.argsort(np.argsort(np.arange(len(fvu)) * 0.618034 % 1)) / len(fvu)
        y = row + 0.5 * (place - 0.5)
        ax.scatter(
            fvu[~short], y[~short], s=9, color=COLOURS["matryoshka"], alpha=0.5, linewidths=0
        )
        ax.scatter(fvu[short], y[short], s=22, color=MISSED, marker="X", linewidths=0, zorder=3)
        ax.annotate(
            f"{(~short).sum()} of {len(fvu)}", (1, row), (4, 0),
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=INK,
        )  # fmt: skip
    labels = [textwrap.fill(name, 27) for name in report.RECIPES]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(True, axis="x")
    ax.set_xlabel("FVU on held-out samples (right: seeds at 20/20)")
    key = [
        Line2D([], [], color=COLOURS["matryoshka"], linestyle="", marker="o", markersize=3.5,
               label="a seed with 20/20"),
        Line2D([], [], color=MISSED, linestyle="", marker="X", markersize=5.5, label="with fewer"),
    ]  # fmt: skip
    _legend(drawing, key, 0.18)
    _write(path, drawing)


@_style
def clean_by_threshold(path: Path, results: Results) -> None:
    """Clean features by the cosine that counts as clean, before and after the refits."""
    drawing = _figure(3.0)
    ax = drawing.subplots(gridspec_kw={"left": 0.068, "right": 0.975, "top": 0.87, "bottom": 0.15})
    thresholds = np.linspace(0.6, 1.0, 401)
    key = []
    for name in ("vanilla", "matryoshka"):
        styles = {"": (0, ()), ", refit": (0, (3, 1.5)), ", refit both": (0, (1, 1))}
        for suffix, line in styles.items():
            runs = report.runs_of(results, name + suffix)
            best = np.array([run["best_cosine"] for run in runs])  # [n_seeds, n_features]
            clean = (best[:, :, None] > thresholds).sum(axis=1).mean(axis=0)
            ax.plot(thresholds, clean, color=COLOURS[name], linestyle=line, linewidth=1.7)
            key.append(
                Line2D([], [], color=COLOURS[name], linestyle=line, linewidth=1.7,
                       label=NAMES[name] + suffix)
            )  # fmt: skip
    for level in (0.9, 0.95, 0.99):
        ax.axvline(level, color=FAINT, linewidth=0.7, linestyle=":", zorder=0)
    ax.set_xlim(0.6, 1.0)
    ax.set_ylim(0, 20.6)
    ax.yaxis.set_major_locator(MaxNLocator(4, steps=[5]))
    ax.grid(True, axis="y")
    ax.set_xlabel("cosine above which a feature is clean")
    ax.set_ylabel("clean features of 20, mean over seeds")
    _legend(drawing, key, 0.058)
    _write(path, drawing)


# ------------------------------------------------------------------------- 3. the language model


def standin_commands() -> str:
    """The command of each file of the stand-in's evidence."""
    files = []
    for seed in (f"seed{i}" for i in range(report.STANDIN_SEEDS)):
        for folder in (seed, f"expected_{seed}"):
            files.append((f"{folder}_training", "train_tinystories.py"))
            files += [(f"{folder}{how}", "evaluate.py") for how in ("", "_refit")]
        files.append((f"{seed}_refit_both", "evaluate.py"))
        for folder in (f"bfloat16_{seed}", f"bfloat16_dense_{seed}"):
            files += [(f"{folder}_training", "train_tinystories.py"), (folder, "evaluate.py")]
    return "\n".join(
        f"- {made_by(f'tinystories_standin/{name}.json', program)}" for name, program in files
    )


class StandIn:
    """What evaluate.py found of the plain pair on the stand-in, over seeds."""

    def __init__(self) -> None:
        self.runs = {
            name: report.standin_runs("seed{}", name) for name in ("vanilla", "matryoshka")
        }
        self.first = report.read("tinystories_standin/seed0.json")
        self.training = report.read("tinystories_standin/seed0_training.json")

    def judged_on(self) -> str:
        """What they were trained and judged on."""
        trained = self.training
        cache, ce = self.first["cache"], self.first["cross_entropy"]
        held_out = {True: "not trained on", False: "TRAINED ON", None: "perhaps trained on"}
        return (
            f"Trained on {trained['cache']['n_tokens']:,} activations, in "
            f"{trained['passes']:.1f} passes; judged on {cache['n_tokens']:,} "
            f"activations {held_out[cache['held_out']]}. "
            f"Cross-entropy of the model itself {ce['clean']:.3f} nats, with the mean in the "
            f"activations' place {ce['mean']:.3f}, on {ce['predictions']:,} predictions; with a "
            "reconstruction in their place, "
            + ", ".join(
                f"{np.mean([run['cross_entropy'] for run in runs]):.3f} ({NAMES[name]})"
                for name, runs in self.runs.items()
            )
            + "."
        )

    def better(self) -> str:
        """In how many seeds Matryoshka reconstructs better."""
        pairs = list(zip(*(self.runs[name] for name in self.runs), strict=True))
        n = sum(ours["fvu"] < vanilla["fvu"] for vanilla, ours in pairs)
        return f"The Matryoshka SAE has the lower FVU in **{n} of {len(pairs)}** seeds."

    def by_prefix(self) -> str:
        """FVU from the first latents alone, for some of the prefixes evaluated."""
        prefixes = self.runs["vanilla"][0]["fvu_by_prefix"]["prefix"]
        shown = [i for i, m in enumerate(prefixes) if i % 2 == 0 or m == prefixes[-1]]
        rows = [
            [NAMES[name], *(report.spread([r["fvu_by_prefix"]["fvu"][i] for r in runs], 3)
                            for i in shown)]
            for name, runs in self.runs.items()
        ]  # fmt: skip
        return script.table(["FVU of the first", *(f"{prefixes[i]:,}" for i in shown)], rows)

    def fvu_curves(self) -> dict[str, dict[str, Any]]:
        """As `plots.fvu_by_prefix` wants them."""
        return {
            name: {
                "prefix": runs[0]["fvu_by_prefix"]["prefix"],
                "fvu": [run["fvu_by_prefix"]["fvu"] for run in runs],
            }
            for name, runs in self.runs.items()
        }

    def densities(self) -> dict[str, np.ndarray]:
        """As `plots.density_histograms` wants them."""
        n = self.first["cache"]["n_tokens"]
        return {name: np.array([r["fired"] for r in runs]) / n for name, runs in self.runs.items()}

    def concepts(self) -> str:
        """By concept: the detector's precision and recall, and what is absorbed, over seeds."""
        rows = []
        for i, concept in enumerate(self.runs["vanilla"][0]["concepts"]):
            row = [concept["concept"]]
            for key in ("precision", "recall", "absorption"):
                for runs in self.runs.values():
                    values = [run["concepts"][i][key] for run in runs]
                    known = [value for value in values if value is not None]
                    row.append(f"{100 * np.mean(known):.0f}%" if known else "-")
            rows.append(row)
        columns = [f"{what}, {sae}" for what in ("precision", "recall", "absorbed") for sae in "vM"]
        return script.table(["concept", *columns], rows)


# -------------------------------------------------------------------------------------- 4. speed


@_style
def speed(path: Path) -> None:
    """A step at full size by kind, and by the size of the dictionary, beside the products."""
    times = report.read("bench/step.json")["step"]
    growth = report.read("bench/growth.json")["growth"]
    shown = {name: t for name, t in times.items() if not name.startswith("of these")}
    yardstick = times["five dense products"]["median"]
    drawing = _figure(0.6 + 0.2 * len(shown))
    ax, right = drawing.subplots(
        1, 2, gridspec_kw={"left": 0.29, "right": 0.985, "top": 0.9, "bottom": 0.16,
                           "wspace": 0.24, "width_ratios": (1.35, 1)},
    )  # fmt: skip
    for row, (name, t) in enumerate(shown.items()):
        colour = COLOURS["vanilla" if "vanilla" in name else "matryoshka"]
        if name.endswith("five dense products"):
            colour = FAINT
        strength = 0.4 if name.startswith("the original") else 0.85
        ax.barh(row, t["median"] / yardstick, 0.62, color=colour, alpha=strength)
        ax.hlines(row, t["q1"] / yardstick, t["q3"] / yardstick, color=INK, linewidth=1.2)
        ax.annotate(
            f"{t['median']:.0f} ms", (max(t["q3"], t["median"]) / yardstick, row), (4, 0),
            textcoords="offset points", va="center", fontsize=7.5, color=INK,
        )  # fmt: skip
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(shown)), list(shown))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.2 * max(t["q3"] for t in shown.values()) / yardstick)
    ax.set_xlabel("time, in that of the products (line: quartiles)")
    ax.set_title("A step at 3,072 latents")

    end = " latents, five products"
    sizes = [int(name.removesuffix(end)) for name in growth if name.endswith(end)]
    for suffix, label, colour, alpha in (
        (end, "products", FAINT, 1),
        (" latents", "10 prefixes", COLOURS["matryoshka"], 0.85),
        (" latents, bfloat16", "in bfloat16", COLOURS["matryoshka"], 0.5),
    ):
        medians = [growth[f"{n}{suffix}"]["median"] for n in sizes]
        right.plot(sizes, medians, "o-", color=colour, alpha=alpha, markersize=4, linewidth=1.8)
        right.annotate(
            label, (sizes[2], medians[2]), (5, -12) if "bfloat16" in suffix else (-4, 6),
            textcoords="offset points", ha="left" if "bfloat16" in suffix else "right",
            fontsize=7.5, color=colour,
        )  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=6.5)
    right.minorticks_off()
    right.grid(True)
    right.set_xlabel("latents")
    right.set_ylabel("ms a step (log scale)", labelpad=1)
    right.set_title("By size, at L0 30")
    _write(path, drawing)


# --------------------------------------------------------------------------------- 5. beyond it

TREES = [
    f"trees/{name}_{every}.json"
    for name in ("three_levels", "uneven", "graded", "crowded")
    for every in (0, 100)
]
