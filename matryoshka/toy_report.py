"""The tables and the figures that the toy's script ends with."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka.command_line import narrow_table
from matryoshka.toy_progress import Progress
from matryoshka.toy_stack import (
    FEATURE_KINDS,
    N_REFERENCE,
    THRESHOLDS,
    StackResult,
    matched_views,
)

if TYPE_CHECKING:  # for annotations only, because these scripts import this module
    from toy_model import ToyData
    from train_toy import Config

N_DRAWN = 200  # held-out samples in the figure of activations
N_COUNTS = 3  # numbers of clean features in a cell of the table
EDGES = ("found", "wrong", "missing")  # the counts of `hierarchy.tree_edges`
FIGURES = ("activations.png", "decoder_cosines.png", "encoder_cosines.png", "curves.png")
SEEDS_FIGURE = "seeds.png"  # drawn if there are several seeds


def summary(results: Mapping[str, Any]) -> str:
    """The tables of a run, in 80 columns; a row is an SAE.

    The first is the write-up's, the second has the mean numbers of features that a seed found and
    lost, and the third has the tree's edges.
    """
    threshold = results["config"]["threshold"]
    n_seeds = len({run["seed"] for run in results["runs"]})
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else f"seed {results['runs'][0]['seed']}"
    n_features = results["runs"][0]["n_features"]
    headers = [seeds, "FVU", "L0", f"clean > {threshold:g} of {n_features}"]
    mean_headers = ["mean a seed", *(f"clean > {t:g}" for t in THRESHOLDS)]
    mean_headers += [*(f"{kind} lost" for kind in FEATURE_KINDS), "absorption"]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        by_name.setdefault(run["sae"], []).append(run)
    rows = [
        [name, _spread(runs, "fvu", 4), _spread(runs, "l0", 3), _counts(runs)]
        for name, runs in by_name.items()
    ]
    means = [[name, *_means(runs)] for name, runs in by_name.items()]
    edge_headers = ["tree edges, mean a seed", *EDGES, "the whole tree, none wrong"]
    edges = [[name, *_edges(runs)] for name, runs in by_name.items()]
    tables = ((headers, rows), (mean_headers, means), (edge_headers, edges))
    return "\n\n".join(narrow_table(*of) for of in tables)


def _spread(runs: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    """The mean of `key` over seeds; with several seeds, also its standard deviation."""
    values = np.array([run[key] for run in runs])
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def _counts(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many seeds have how many clean features: "20 in 88, 16 in 12"."""
    counts = Counter(run["clean_features"] for run in runs)
    if len(runs) == 1:
        return str(*counts)
    shown = sorted(dict(counts.most_common(N_COUNTS)), reverse=True)
    words = [f"{clean} in {counts[clean]}" for clean in shown]
    n_others = len(runs) - sum(counts[clean] for clean in shown)
    return ", ".join(words + [f"others in {n_others}"] * (n_others > 0))


def _means(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The second table's cells: clean features, lost features by kind, and absorption."""
    clean = [np.mean([run["clean_at"][str(t)] for run in runs]) for t in THRESHOLDS]
    lost = [np.mean([run["lost"][kind] for run in runs]) for kind in FEATURE_KINDS]
    rates = [rate for run in runs for rate in run["absorption"] if rate is not None]
    absorption = f"{np.mean(rates):.3f}" if rates else "-"
    return [*(f"{value:.2f}" for value in (*clean, *lost)), absorption]


def _edges(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The third table's cells: mean counts of edges, and how many seeds have the whole tree."""
    counts = [run["edges"] for run in runs]
    whole = sum(is_whole_tree(run) for run in runs)
    means = [f"{np.mean([count[what] for count in counts]):.2f}" for what in EDGES]
    return [*means, f"{whole} of {len(runs)}"]


def is_whole_tree(run: Mapping[str, Any]) -> bool:
    """Whether an SAE's forest has every edge of the true tree, and no other."""
    return bool(run["edges"]["wrong"] == run["edges"]["missing"] == 0)


def share(count: int, n: int) -> str:
    """A count of seeds with its exact 95% interval (Clopper and Pearson): 88 of 100 (80-94%)."""
    from scipy.special import betaincinv  # imported here because workers do not need it

    low = betaincinv(count, n - count + 1, 0.025) if count else 0.0
    high = betaincinv(count + 1, n - count, 0.975) if count < n else 1.0
    return f"{count} of {n} ({100 * low:.0f}-{100 * high:.0f}%)"


def figures_of(n_seeds: int) -> list[str]:
    """The names of the files that `draw` writes."""
    return [*FIGURES, *[SEEDS_FIGURE] * (n_seeds > 1)]


def draw(config: "Config", data: "ToyData", finished: Sequence[StackResult]) -> None:
    """Draws the figures: activations and cosines of the first seed, curves and features of all."""
    from matryoshka import (  # imported here: it takes a second, and workers draw none
        heatmaps,
        plots,
    )

    activations, of_decoder, of_encoder, curves = (Path(config.out) / name for name in FIGURES)
    first = finished[0]
    seed = first.runs[0]["seed"]
    features, x = (samples[:N_DRAWN] for samples in data.held_out(seed, N_REFERENCE))
    views = {name: matched_views(data, first.sae(name), seed, x) for name in config.saes}
    acts, decoder, encoder = ({name: view[i] for name, view in views.items()} for i in range(3))
    heatmaps.toy_activations(activations, features, acts, data.tree)
    heatmaps.toy_cosines(of_decoder, decoder, data.tree, "decoder")
    heatmaps.toy_cosines(of_encoder, encoder, data.tree, "encoder")
    plots.training_curves(
        curves,
        first.curves["step"],
        _curves_by_name(config.saes, finished),
        config.target_l0,
        data.tree.expected_l0,
    )
    if config.seeds > 1:
        runs = [run for one in finished for run in one.runs if run["sae"] in config.saes]
        plots.toy_seeds(Path(config.out) / SEEDS_FIGURE, runs, data.tree, config.threshold)


def _curves_by_name(
    names: Sequence[str], finished: Iterable[StackResult]
) -> dict[str, dict[str, np.ndarray]]:
    """For each SAE, its curves, each [n_seeds, n_records]."""
    parts = [
        {what: np.split(one.curves[what], len(names), axis=1) for what in Progress.FIGURES}
        for one in finished
    ]
    return {
        name: {
            what: np.concatenate([part[what][k] for part in parts], axis=1).T for what in parts[0]
        }
        for k, name in enumerate(names)
    }
