"""The tables of README.md and docs/, each a function of files in results/ and of nothing else."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from matryoshka.command_line import table
from matryoshka.errors import UserError
from studies import ablate_toy, bench

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
THRESHOLDS = ("0.9", "0.95", "0.99")  # cosines over which a feature is clean
REFITS = ("", ", refit", ", refit both")  # what follows an SAE's name where it was refitted

Results = dict[str, Any]
Run = dict[str, Any]


# --------------------------------------------------------------------------------------- reading


def read(name: str) -> Results:
    """A file of results/, as `studies.keep` writes it. Raises `UserError` where there is none."""
    path = RESULTS / name
    if not path.exists():
        raise UserError(f"results/{name} is not there: the command that makes it is in docs/")
    results: Results = json.loads(path.read_text())
    return results


def runs_of(results: Results, sae: str) -> list[Run]:
    """The runs of one kind of SAE, in the order of the file: by seed."""
    return [run for run in results["runs"] if run["sae"] == sae]


def standin_runs(sae: str, recipe: str, refit: str = "") -> list[Run]:
    """What evaluate.py found of one kind of SAE on the stand-in, by seed."""
    pattern = re.compile(f"{recipe}_seed\\d+{refit}")
    runs = runs_of(read("standin/evaluation.json"), sae)
    return sorted(
        (run for run in runs if pattern.fullmatch(run["source"])), key=lambda run: run["source"]
    )


def where(name: str) -> str:
    """On what a file of results/ was made: device, CPU, versions, commit."""
    seen = dict.fromkeys(_place(source) for source in read(name)["sources"])
    return "; ".join(seen)


def _place(source: dict[str, Any]) -> str:
    environment = source["environment"]
    parts = [environment.get("cpu"), environment["device"].split(",")[0]]
    parts.append(f"{environment['threads']} thread" + "s" * (environment["threads"] > 1))
    parts.append(f"torch {environment['torch']}")
    commit = environment.get("commit")
    parts.append(f"commit {commit[:7]}" + "+changes" * ("+" in commit) if commit else None)
    return ", ".join(part for part in parts if part)


# -------------------------------------------------------------------------------------- counting


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def share(count: int, n: int) -> str:
    """A count over seeds with its exact 95% interval (Clopper and Pearson): 88 of 100 (80-94%)."""
    low, high = scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact")
    return f"{count} of {n} ({100 * low:.0f}-{100 * high:.0f}%)"


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


# --------------------------------------------------------------------------------------- the toy


def toy() -> str:
    """The write-up's table over the hundred seeds, at three thresholds."""
    results = read("toy/sampled.json")
    rows = []
    for sae, expected in (("matryoshka", 20), ("vanilla", 11)):
        runs = runs_of(results, sae)
        count = sum(run["clean_features"] == expected for run in runs)
        fvu, l0 = (spread([run[key] for run in runs], digits) for key, digits in FVU_AND_L0)
        rows.append(
            [sae, fvu, l0, f"{expected}/20 in {share(count, len(runs))}", *mean_clean(runs)]
        )
    rows.append(["as reported, matryoshka", "0.021", "1.13", "20/20 in 1 of 1", "20", "", ""])
    rows.append(["as reported, vanilla", "0.000", "0.86", "11/20 in 1 of 1", "11", "", ""])
    headers = [f"{len(runs)} seeds", "FVU", "L0", "clean at 0.9", *(f"> {t}" for t in THRESHOLDS)]
    return table(headers, rows)


FVU_AND_L0 = (("fvu", 4), ("l0", 3))

RECIPES = {
    "sampled prefixes (the paper)": "sampled",
    "with restarts": "restarts",
    "with restarts, seeds not looked at before": "restarts_unseen",
    "expected prefixes": "expected",
}


def recipes() -> str:
    """Success over seeds by recipe: what is trained differently, and what it does how soon."""
    times = read("bench/toy.json")["sources"][0]["toy"]
    rows = []
    for name, file in RECIPES.items():
        results = read(f"toy/{file}.json")
        runs, refitted = (runs_of(results, f"matryoshka{how}") for how in ("", ", refit"))
        seeds = [run["seed"] for run in runs]
        steps = median_steps(runs, "0.9")
        expected = ", expected prefixes" if file == "expected" else ""
        ms = times[f"of matryoshka{expected}"]["median"]
        rows.append(
            [
                name,
                f"{min(seeds)} to {max(seeds)}",
                share(len(complete_seeds(results)), len(runs)),
                f"{np.median([run['fvu'] for run in runs]):.4f}",
                f"{max(run['fvu'] for run in runs):.4f}",
                f"{np.median([run['l0'] for run in runs]):.3f}",
                f"{steps:,.0f}",
                f"{steps * ms / 1e3:.1f}",
                f"{median_steps(refitted, '0.9'):,.0f}",
            ]
        )
    headers = ["", "seeds", "20/20", "median FVU", "worst", "median L0", "steps to 20/20", "s"]
    return table([*headers, "steps, refit"], rows)


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
        *(f"{count} of {len(successes)}" for count in counts),
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
    rows = []
    for name, title in TREES.items():
        for every, recipe in ((0, ""), (100, ", restarts")):
            results = read(f"trees/{name}_{every}.json")
            pairs = [
                [runs_of(results, sae + how) for sae in ("vanilla", "matryoshka")] for how in REFITS
            ]
            clean = [_of_pair(pair, "clean_features", 1) for pair in pairs]
            fvu = [_of_pair(pair, "fvu", 4) for pair in pairs]
            count = f"{len(complete_seeds(results))} of {len(pairs[0][1])}"
            rows.append([title + recipe, *clean, count, *fvu])
    stages = ("as trained", "refit", "refit both")
    clean_headers = [f"clean, {stage}" for stage in stages]
    headers = ["vanilla / Matryoshka", *clean_headers, "all 20", *(f"FVU, {s}" for s in stages)]
    return table(headers, rows)


def _of_pair(pair: Sequence[Sequence[Run]], key: str, digits: int) -> str:
    """The means over seeds of two kinds of SAE: "8.0 / 6.0"."""
    return " / ".join(f"{np.mean([run[key] for run in runs]):.{digits}f}" for runs in pair)


def defects() -> str:
    """The original's defects, put back one by one."""
    return ablate_toy.summary(read("ablation/ablation.json")["sources"][0])


# --------------------------------------------------------------------------- the language model

STANDIN = {
    "matryoshka": ("matryoshka", "sampled", ""),
    "vanilla": ("vanilla", "sampled", ""),
    "matryoshka, refit": ("matryoshka", "sampled", "/refit"),
    "vanilla, refit": ("vanilla", "sampled", "/refit"),
    "expected prefixes": ("matryoshka", "expected", ""),
    "expected prefixes, refit": ("matryoshka", "expected", "/refit"),
    "matryoshka, refit both": ("matryoshka", "sampled", "/refit_both"),
    "matryoshka, bfloat16": ("matryoshka", "bfloat16", ""),
    "vanilla, bfloat16": ("vanilla", "bfloat16", ""),
    "matryoshka, bfloat16, dense": ("matryoshka", "bfloat16_dense", ""),
    "vanilla, bfloat16, dense": ("vanilla", "bfloat16_dense", ""),
}


def standin() -> str:
    """The stand-in language model: held-out figures over seeds, before and after the refit."""
    return _standin(list(STANDIN))


def standin_short() -> str:
    """As `standin`, of what is trained as the write-up has it."""
    return _standin(list(STANDIN)[:4])


def _standin(titles: Sequence[str]) -> str:
    rows = []
    for title in titles:
        runs = standin_runs(*STANDIN[title])
        fvu, l0 = (spread([run[key] for run in runs], n) for key, n in (("fvu", 4), ("l0", 2)))
        cosine = spread([run["mean_highest_cosine"] for run in runs], 3)
        dead, recovered, absorbed = (
            f"{100 * np.mean([run[key] for run in runs]):.1f}%"
            for key in ("dead_share", "loss_recovered", "absorption")
        )
        rows.append([title, fvu, l0, dead, recovered, cosine, absorbed])
    headers = [f"stand-in, {len(runs)} seeds", "FVU", "L0", "dead", "loss recovered"]
    return table([*headers, "highest cosine", "absorption"], rows)


def concepts() -> str:
    """Absorption by concept, the mean over seeds, and the share of an SAE's total it makes."""
    by_sae = {sae: standin_runs(sae, "sampled") for sae in ("matryoshka", "vanilla")}
    absorbed = {
        sae: np.array([[c["absorption"] or 0.0 for c in run["concepts"]] for run in runs])
        for sae, runs in by_sae.items()
    }  # [n_seeds, n_concepts] each
    first = by_sae["matryoshka"][0]["concepts"]
    rows = []
    for i, concept in enumerate(first):
        cells = []
        for of_sae in absorbed.values():
            cells.append(f"{100 * of_sae[:, i].mean():.1f}%")
            cells.append(f"{100 * of_sae[:, i].sum() / max(of_sae.sum(), 1e-9):.0f}%")
        by_seed = " / ".join(f"{100 * a:.0f}%" for a in absorbed["matryoshka"][:, i])
        vanilla = " / ".join(f"{100 * a:.0f}%" for a in absorbed["vanilla"][:, i])
        rows.append([concept["concept"], concept["tokens"], *cells, by_seed, vanilla])
    headers = ["concept", "tokens", "matryoshka", "of its total", "vanilla", "of its total"]
    return table([*headers, "matryoshka, by seed", "vanilla, by seed"], rows)


# ------------------------------------------------------------------------------------------ speed


def step() -> str:
    """A step at full size on a CPU, as a multiple of its five dense products."""
    return bench.show(read("bench/step.json")["sources"][0]["step"])


def growth() -> str:
    """A step by the size of the dictionary, against the dense products of that size, and by L0."""
    times = read("bench/growth.json")["sources"][0]["growth"]
    rows = []
    for name in times:
        if "," in name:  # a column of another's row
            continue
        columns = [times.get(name + more) for more in ("", ", bfloat16", ", five products")]
        medians = [column and column["median"] for column in columns]
        shown = ["-" if ms is None else f"{ms:.0f}" for ms in medians]
        rows.append([name, *shown, f"{medians[0] / medians[2]:.2f}" if medians[2] else "-"])
    headers = ["", "step, ms", "in bfloat16, ms", "five products, ms", "step / products"]
    return table(headers, rows)


def data() -> str:
    """Caching against the bare forward pass, and a streamed batch."""
    return bench.show(read("bench/data.json")["sources"][0]["data"])


# By the name that a page calls a table by: the function, and the file of results/ that it shows.
TABLES: dict[str, tuple[Callable[[], str], str]] = {
    "toy": (toy, "toy/sampled.json"),
    "recipes": (recipes, "toy/sampled.json"),
    "refit": (refitted, "toy/sampled.json"),
    "trees": (trees, "trees/three_levels_0.json"),
    "defects": (defects, "ablation/ablation.json"),
    "standin": (standin, "standin/evaluation.json"),
    "standin_short": (standin_short, "standin/evaluation.json"),
    "concepts": (concepts, "standin/evaluation.json"),
    "bench": (step, "bench/step.json"),
    "growth": (growth, "bench/growth.json"),
    "data": (data, "bench/data.json"),
}


def named(name: str) -> str:
    """The table `name`, and under it where its figures were made. Raises `UserError` for none."""
    if name not in TABLES:
        raise UserError(f"there is no table {name}, only {', '.join(TABLES)}")
    make, file = TABLES[name]
    return f"{make()}\n\n<sub>results/{file}: {where(file)}</sub>"
