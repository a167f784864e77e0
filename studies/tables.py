"""The tables of README.md and docs/, each a function of files in results/ and of nothing else."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka import toy_stack
from matryoshka.command_line import table
from matryoshka.errors import UserError
from matryoshka.toy_report import EDGES, is_whole_tree, share
from studies import ablate_toy, bench
from studies import synth as synth_study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
THRESHOLDS = tuple(map(str, toy_stack.THRESHOLDS))  # cosines over which a feature is clean
REFITS = ("", *toy_stack.REFITS)  # what follows an SAE's name: as trained, then where refitted
FVU_AND_L0 = (("fvu", 4), ("l0", 3))  # with digits

Results = dict[str, Any]
Run = dict[str, Any]


# --------------------------------------------------------------------------------------- reading


def read(name: str) -> Results:
    """A file of results/, as `studies.keep` writes it: "sources" and "runs", lists of objects.

    Raises `UserError` where there is none, and where it is damaged or something else.
    """
    path = RESULTS / name
    if not path.exists():
        raise UserError(f"results/{name} is not there: the command that makes it is in docs/")
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        entries = [*results["sources"], *results["runs"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        entries = []
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"results/{name} is damaged: it should have sources and runs, as python -m "
            "studies.keep writes them"
        )
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


def standin_by_kind() -> dict[str, list[Run]]:
    """The stand-in's runs of each kind of SAE that is trained as the write-up has it."""
    kinds = kinds_of(read("standin/evaluation.json"))
    return {sae: standin_runs(sae, "sampled") for sae in kinds}


def kinds_of(results: Results) -> list[str]:
    """The kinds of SAE that were trained, in the order of the file; not what was refitted."""
    return [sae for sae in dict.fromkeys(run["sae"] for run in results["runs"]) if "," not in sae]


def where(*patterns: str) -> str:
    """On what files of results/ were made: CPU, threads, versions, commit.

    patterns: of their names, such as "toy/*.json". Raises `UserError` where there is no such file.
    """
    seen: dict[str, None] = {}
    for pattern in patterns:
        names = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.glob(pattern))
        for name in names or [pattern]:
            seen |= dict.fromkeys(_place(source) for source in read(name)["sources"])
    return "; ".join(seen)


def _place(source: dict[str, Any]) -> str:
    environment = source["environment"]
    on_cpu = environment["device"].startswith("cpu")
    parts = [(environment.get("cpu") or "CPU") if on_cpu else environment["device"]]
    parts.append(f"{environment['threads']} thread" + "s" * (environment["threads"] > 1))
    parts.append(f"torch {environment['torch']}")
    commit = environment.get("commit")
    if commit:
        parts.append(f"commit {commit[:7]}" + "+changes" * ("+" in commit))
    return ", ".join(parts)


# -------------------------------------------------------------------------------------- counting


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def percent(share: float, digits: int) -> str:
    """A share in percent; "-" where it is NaN."""
    return "-" if np.isnan(share) else f"{100 * share:.{digits}f}%"


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
    means = (
        np.mean([run["clean_features"] for run in runs_of(others, sae)])
        for sae in ("matryoshka", "vanilla")
    )
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
    """The true tree's edges that the forests of latents have: the paper's tree, then harder ones.
    "-" where the file was kept before they were counted."""
    files = {"the paper's tree": "toy/sampled", "the same, restarts": "toy/restarts"}
    files |= {title: f"trees/{name}_0" for name, title in TREES.items()}
    files |= {f"{title}, restarts": f"trees/{name}_100" for name, title in TREES.items()}
    rows = []
    for title, file in files.items():
        results = read(f"{file}.json")
        for how in (REFITS[0], REFITS[-1]):
            of_kind = [runs_of(results, sae + how) for sae in kinds_of(results)]
            rows.append([title + how, *(cell for runs in of_kind for cell in _edge_cells(runs))])
    shown = [column for sae in ("matryoshka", "vanilla") for column in (sae, "whole tree")]
    return table([f"edges {' / '.join(EDGES)}, mean a seed", *shown], rows)


def _edge_cells(runs: Sequence[Run]) -> list[str]:
    """ "9.0 / 0.0 / 0.0", and in how many seeds the forest is the tree."""
    counted = [run["edges"] for run in runs if "edges" in run]
    if not counted:
        return ["-", "-"]
    means = [f"{np.mean([edges[what] for edges in counted]):.1f}" for what in EDGES]
    return [" / ".join(means), share(sum(map(is_whole_tree, runs)), len(counted))]


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
    by_title = {title: standin_runs(*STANDIN[title]) for title in titles}
    n_seeds = max(map(len, by_title.values()))
    headers = [f"stand-in, {n_seeds} seeds", "FVU", "L0", "dead", "loss recovered"]
    rows = [[title, *_standin_row(runs)] for title, runs in by_title.items()]
    return table([*headers, "highest cosine", "absorption"], rows)


def _standin_row(runs: Sequence[Run]) -> list[str]:
    fvu, l0 = (spread([run[key] for run in runs], n) for key, n in (("fvu", 4), ("l0", 2)))
    cosine = spread([run["mean_highest_cosine"] for run in runs], 3)
    dead, recovered, absorbed = (
        f"{100 * np.mean([run[key] for run in runs]):.1f}%"
        for key in ("dead_share", "loss_recovered", "absorption")
    )
    return [fvu, l0, dead, recovered, cosine, absorbed]


def concepts() -> str:
    """Absorption by concept: the mean over seeds, the share of the SAE's total that a concept
    makes, and each seed's; "-" where it is not known, since no latent detects the concept."""
    by_sae = standin_by_kind()
    absorbed = {
        sae: np.array([[c["absorption"] for c in run["concepts"]] for run in runs], dtype=float)
        for sae, runs in by_sae.items()
    }  # [n_seeds, n_concepts] each, NaN where it is not known
    rows = []
    for i, concept in enumerate(next(iter(by_sae.values()))[0]["concepts"]):
        means = [cell for rates in absorbed.values() for cell in _mean_and_share(rates, i)]
        by_seed = [" / ".join(percent(r, 0) for r in rates[:, i]) for rates in absorbed.values()]
        rows.append([concept["concept"], concept["tokens"], *means, *by_seed])
    headers = [column for sae in by_sae for column in (sae, "of its total")]
    return table(["concept", "tokens", *headers, *(f"{sae}, by seed" for sae in by_sae)], rows)


def _mean_and_share(rates: np.ndarray, concept: int) -> list[str]:
    """A concept's mean of `rates` [n_seeds, n_concepts], and what it makes of their sum."""
    known = rates[~np.isnan(rates[:, concept]), concept]
    total = np.nansum(rates)
    mean = known.mean() if known.size else np.nan
    return [percent(mean, 1), percent(known.sum() / total if total else 0.0, 0)]


# --------------------------------------------------------------- synthetic models of known features


def synth() -> str:
    """SAEs on the synthetic model `mini`: ours, then SAELens's on the same samples."""
    return synth_study.summary(read("synth/mini.json"), read("synth/mini_saelens.json"))


def synth_lrs() -> str:
    """SAELens's on the first seed, at every learning rate."""
    return table(synth_study.HEADERS, synth_study.rows_of(_first_seed("synth/mini_saelens.json")))


def _first_seed(name: str) -> list[Run]:
    runs = read(name)["runs"]
    return [run for run in runs if run["seed"] == runs[0]["seed"]]


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


def browsing() -> str:
    """What browsing costs: a pass that collects against one that only encodes, and the page."""
    rows = []
    for made in read("bench/browse.json")["sources"]:
        size, passes, page = made["config"], made.get("passes", {}), made.get("page", {})
        cells = [
            f"{passes['ratio']:.2f}" if passes else "-",
            *(f"{page[name]:{form}}" if name in page else "-" for name, form in OF_A_PAGE.items()),
            made["peak_memory"],
        ]
        name = f"{size['n_latents']:,} latents of width {size['d_model']}"
        threads = f"{made['environment']['threads']}"
        rows.append([name, f"{size['tokens']:,}", threads, *cells])
    headers = ["", "tokens", "threads", "collect / encode", "page, MB", "first view, s"]
    return table([*headers, "a latent, s", "peak memory"], rows)


OF_A_PAGE = {"megabytes": ".0f", "first view": ".2f", "a latent": ".3f"}


OF_RECIPES = tuple(f"toy/{file}.json" for file in RECIPES.values())

# By the name that a page calls a table by: the function, and the files of results/ that it shows.
TABLES: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "toy": (toy, ("toy/sampled.json",)),
    "recipes": (recipes, (*OF_RECIPES, "bench/toy.json")),
    "refit": (refitted, OF_RECIPES),
    "trees": (trees, ("trees/*_0.json", "trees/*_100.json")),
    "unhedged_short": (unhedged_short, ("toy/unhedged.json", "trees/*_unhedged.json")),
    "unhedged": (unhedged, ("toy/unhedged.json", "trees/*_unhedged.json")),
    "edges": (
        edges,
        ("toy/sampled.json", "toy/restarts.json", "trees/*_0.json", "trees/*_100.json"),
    ),
    "defects": (defects, ("ablation/ablation.json",)),
    "standin": (standin, ("standin/evaluation.json",)),
    "standin_short": (standin_short, ("standin/evaluation.json",)),
    "concepts": (concepts, ("standin/evaluation.json",)),
    "synth": (synth, ("synth/mini.json", "synth/mini_saelens.json")),
    "synth_lrs": (synth_lrs, ("synth/mini_saelens.json",)),
    "bench": (step, ("bench/step.json",)),
    "growth": (growth, ("bench/growth.json",)),
    "data": (data, ("bench/data.json",)),
    "browsing": (browsing, ("bench/browse.json",)),
}


def named(name: str) -> str:
    """The table `name`, and under it where its figures were made. Raises `UserError` for none, and
    where the files that it is made of lack something that it shows."""
    if name not in TABLES:
        raise UserError(f"there is no table {name}, only {', '.join(TABLES)}")
    make, files = TABLES[name]
    made_from = ", ".join(f"`results/{file}`" for file in files)
    try:
        return f"{make()}\n\n<sub>{made_from}: {where(*files)}</sub>"
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{made_from} lacks what table {name} shows ({error!r}): was a file edited, or kept by "
            "another version?"
        ) from error
