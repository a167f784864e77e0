"""The tables of the toy: each a function of files in results/ and of nothing else."""

from collections.abc import Sequence

import numpy as np

from matryoshka import toy_stack
from matryoshka.command_line import table
from matryoshka.kinds import KINDS
from matryoshka.toy_report import EDGES, is_whole_tree, share
from studies import ablate_toy, true_solution
from studies.kept_results import Results, Run, kinds_of, read, runs_of, spread

THRESHOLDS = tuple(map(str, toy_stack.THRESHOLDS))  # cosines over which a feature is clean
REFITS = ("", *toy_stack.REFITS)  # what follows an SAE's name: as trained, then where refitted
FVU_AND_L0 = (("fvu", 4), ("l0", 3))  # with digits


def complete_seeds(results: Results, sae: str = "matryoshka") -> set[int]:
    """The seeds whose SAE had every feature clean as trained."""
    runs = runs_of(results, sae)
    return {run["seed"] for run in runs if run["clean_features"] == run["n_features"]}


def median_steps(runs: Sequence[Run], threshold: str) -> float:
    """Steps until all features stay clean: the median over the seeds where they come to."""
    steps = [run["steps_to"][threshold] for run in runs]
    return float(np.median([step for step in steps if step is not None]))


def mean_clean(runs: Sequence[Run]) -> list[str]:
    """Clean features at each threshold, the mean over seeds."""
    return [f"{np.mean([run['clean_at'][t] for run in runs]):.2f}" for t in THRESHOLDS]


# What the write-up reports of one seed each: FVU, L0, and how many of the 20 features are clean.
AS_REPORTED = {"matryoshka": ("0.021", "1.13", 20), "vanilla": ("0.000", "0.86", 11)}


def toy() -> str:
    """The write-up's table over the hundred seeds, at three thresholds, and as it is there."""
    results = read("toy/sampled.json")
    rows = [_toy_row(sae, runs_of(results, sae)) for sae in kinds_of(results)]
    for sae, (fvu, l0, clean) in AS_REPORTED.items():
        rows.append([f"as reported, {sae}", fvu, l0, f"{clean}/20 in 1 of 1", str(clean), "", ""])
    n_seeds = len({run["seed"] for run in results["runs"]})
    headers = [f"{n_seeds} seeds", "FVU", "L0", "as many clean as reported"]
    return table([*headers, *(f"clean > {t}" for t in THRESHOLDS)], rows)


def _toy_row(sae: str, runs: Sequence[Run]) -> list[str]:
    fvu, l0 = (spread([run[key] for run in runs], digits) for key, digits in FVU_AND_L0)
    reported = AS_REPORTED[sae][2]
    count = sum(run["clean_features"] == reported for run in runs)
    return [sae, fvu, l0, f"{reported}/20 in {share(count, len(runs))}", *mean_clean(runs)]


RECIPES = {
    "sampled prefixes (the paper)": "sampled",
    "with restarts": "restarts",
    "with restarts, seeds not looked at before": "restarts_unseen",
    "expected prefixes": "expected",
}


def recipes() -> str:
    """Success over seeds by recipe: what is trained differently, and what it does how soon."""
    headers = ["", "seeds", "20/20", "median FVU", "worst", "median L0", "steps to 20/20", "s"]
    rows = [[name, *_recipe_row(file)] for name, file in RECIPES.items()]
    return table([*headers, "steps, refit"], rows)


def _recipe_row(file: str) -> list[str]:
    results, times = read(f"toy/{file}.json"), read("bench/toy.json")["sources"][0]["toy"]
    runs, refitted = (runs_of(results, f"matryoshka{how}") for how in REFITS[:2])
    seeds, fvu = ([run[key] for run in runs] for key in ("seed", "fvu"))
    steps = median_steps(runs, "0.9")
    ms = times["of matryoshka" + ", expected prefixes" * (file == "expected")]["median"]
    return [
        f"{min(seeds)} to {max(seeds)}",
        share(len(complete_seeds(results)), len(runs)),
        f"{np.median(fvu):.4f}",
        f"{max(fvu):.4f}",
        f"{np.median([run['l0'] for run in runs]):.3f}",
        f"{steps:,.0f}",
        f"{steps * ms / 1e3:.1f}",
        f"{median_steps(refitted, '0.9'):,.0f}",
    ]


def refitted() -> str:
    """Before and after the refits, by recipe, over all seeds and over those that had 20/20."""
    rows = []
    for recipe, file, sae in (
        ("sampled", "sampled", "matryoshka"),
        ("expected", "expected", "matryoshka"),
        ("restarts", "restarts", "matryoshka"),
        ("restarts, unseen seeds", "restarts_unseen", "matryoshka"),
        ("vanilla", "sampled", "vanilla"),
    ):
        results = read(f"toy/{file}.json")
        complete = complete_seeds(results)
        for how in REFITS:
            rows.append([recipe + how, *_refit_row(runs_of(results, sae + how), complete)])
    headers = ["", "FVU", "worst FVU*", *(f"clean > {t}" for t in THRESHOLDS)]
    more = [*(f"all 20 > {t}*" for t in THRESHOLDS[1:]), "worst cosine*", "absorption"]
    return table([*headers, *more], rows)


def _refit_row(runs: Sequence[Run], complete: set[int]) -> list[str]:
    successes = [run for run in runs if run["seed"] in complete]
    absorbed = [a for run in runs for a in run["absorption"] if a is not None]
    counts = [sum(r["clean_at"][t] == 20 for r in successes) for t in THRESHOLDS[1:]]
    return [
        f"{np.mean([run['fvu'] for run in runs]):.4f}",
        f"{max(run['fvu'] for run in successes):.4f}",
        *mean_clean(runs),
        *(share(count, len(successes)) for count in counts),
        f"{min(min(run['best_cosine']) for run in successes):.3f}",
        f"{np.mean(absorbed):.3f}",
    ]


TREES = {
    "three_levels": "three levels deep",
    "uneven": "uneven children",
    "graded": "not binary",
    "crowded": "20 features in 14 dimensions",
}


def trees() -> str:
    """Harder trees than the paper's: with and without restarts, and with the refits."""
    rows, kinds = [], list[str]()
    for name, title in TREES.items():
        for every, recipe in ((0, ""), (100, ", restarts")):
            results = read(f"trees/{name}_{every}.json")
            kinds = kinds_of(results)
            pairs = [[runs_of(results, sae + how) for sae in kinds] for how in REFITS]
            clean = [_of_pair(pair, "clean_features", 1) for pair in pairs]
            fvu = [_of_pair(pair, "fvu", 4) for pair in pairs]
            complete, n_seeds = complete_seeds(results), len(pairs[0][0])
            rows.append([title + recipe, *clean, share(len(complete), n_seeds), *fvu])
    stages = ("as trained", "refit", "refit both")
    clean_headers = [f"clean, {stage}" for stage in stages]
    headers = [" / ".join(kinds), *clean_headers, "all 20", *(f"FVU, {s}" for s in stages)]
    return table(headers, rows)


def unhedged() -> str:
    """What `--unhedged` recovers as trained, and what the write-up's training and vanilla do."""
    clean = [f"clean > {t}" for t in THRESHOLDS]
    headers = ["unhedged, as trained", "seeds", *clean, "all 20 > 0.99", "FVU", "absorption"]
    return table([*headers, "write-up's, clean > 0.9", "vanilla's"], _unhedged_rows())


def unhedged_short() -> str:
    """As `unhedged`, of the features that are clean at 0.99 and at the write-up's 0.9."""
    rows = [[row[i] for i in (0, 1, 2, 4, 5, 8, 9)] for row in _unhedged_rows()]
    headers = ["clean, as trained", "seeds", "> 0.9", "> 0.99", "all 20 > 0.99"]
    return table([*headers, "write-up's > 0.9", "vanilla's"], rows)


def _unhedged_rows() -> list[list[str]]:
    """A tree a row, with every column of `unhedged`."""
    files = {"the paper's tree": ("toy/unhedged", "toy/sampled")}
    files |= {title: (f"trees/{name}_unhedged", f"trees/{name}_0") for name, title in TREES.items()}
    return [[title, *_unhedged_row(*of_tree)] for title, of_tree in files.items()]


def _unhedged_row(file: str, usual: str) -> list[str]:
    runs, others = runs_of(read(f"{file}.json"), "matryoshka"), read(f"{usual}.json")
    seeds = [run["seed"] for run in runs]
    absorbed = [a for run in runs for a in run["absorption"] if a is not None]
    whole = sum(run["clean_at"]["0.99"] == run["n_features"] for run in runs)
    means = (np.mean([run["clean_features"] for run in runs_of(others, sae)]) for sae in KINDS)
    return [
        f"{min(seeds)} to {max(seeds)}",
        *mean_clean(runs),
        share(whole, len(runs)),
        f"{np.mean([run['fvu'] for run in runs]):.5f}",
        f"{np.mean(absorbed):.3f}",
        *(f"{mean:.1f}" for mean in means),
    ]


def _of_pair(pair: Sequence[Sequence[Run]], key: str, digits: int) -> str:
    """The means over seeds of two kinds of SAE: "8.0 / 6.0"."""
    return " / ".join(f"{np.mean([run[key] for run in runs]):.{digits}f}" for runs in pair)


def edges() -> str:
    """The true tree's edges that the forests of latents have: of the paper's tree, then of harder
    ones. Files that were kept before edges were counted are left out."""
    files = {"the paper's tree": "toy/sampled", "the same, restarts": "toy/restarts"}
    files |= {"the same, unhedged": "toy/unhedged"}
    for name, title in TREES.items():
        files |= {title: f"trees/{name}_0", f"{title}, restarts": f"trees/{name}_100"}
        files[f"{title}, unhedged"] = f"trees/{name}_unhedged"
    rows = []
    for title, file in files.items():
        results = read(f"{file}.json")
        for how in (REFITS[0], REFITS[-1]):
            cells = [_edge_cells(runs_of(results, sae + how)) for sae in KINDS]
            if any(cells):
                rows.append([title + how, *(cell for pair in cells for cell in pair or ["", ""])])
    shown = [column for sae in KINDS for column in (sae, "whole tree")]
    return table([f"edges {' / '.join(EDGES)}, mean a seed", *shown], rows)


def _edge_cells(runs: Sequence[Run]) -> list[str]:
    """ "9.0 / 0.0 / 0.0", and in how many seeds the forest is the tree; [] where not counted."""
    counted = [run["edges"] for run in runs if "edges" in run]
    if not counted:
        return []
    means = [f"{np.mean([edges[what] for edges in counted]):.1f}" for what in EDGES]
    return [" / ".join(means), share(sum(map(is_whole_tree, runs)), len(counted))]


def at_the_truth() -> str:
    """The loss where training ends and at the true dictionary, of features in few dimensions."""
    headers = ["20 features in 14 dimensions", "loss", "FVU", "L0", "clean > 0.9"]
    return table(headers, true_solution.summary(read("trees/true_solution.json")["runs"]))


def defects() -> str:
    """The original's defects, put back one by one."""
    return ablate_toy.summary(read("ablation/ablation.json")["sources"][0])
