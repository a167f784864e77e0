"""The tables of the stand-in language model: each a function of files in results/ and of nothing
else."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from matryoshka.command_line import table
from matryoshka.frontier import Lines, frontier_table, lines_of, mean
from matryoshka.kinds import KINDS
from studies.kept_results import Run, kinds_of, percent, read, runs_of, spread

EVALUATION = "standin/evaluation.json"
FRONTIER = "standin/frontier.json"
ON_GPU = "standin/gpu.json"
STANDIN = {
    "matryoshka": ("matryoshka", "sampled", ""),
    "vanilla": ("vanilla", "sampled", ""),
    "matryoshka, refit": ("matryoshka", "sampled", "/refit"),
    "vanilla, refit": ("vanilla", "sampled", "/refit"),
    "matryoshka, refit both": ("matryoshka", "sampled", "/refit_both"),
}
# All made on a GPU: an SAE's name, the folder of its runs without the seed, and the kept file.
VARIANTS = {
    "matryoshka": ("matryoshka_l0_20", "relu", "", FRONTIER),
    "vanilla": ("vanilla_l0_20", "relu", "", FRONTIER),
    "matryoshka, bfloat16": ("matryoshka", "bfloat16", "", ON_GPU),
    "vanilla, bfloat16": ("vanilla", "bfloat16", "", ON_GPU),
    "matryoshka, bfloat16, refit": ("matryoshka", "bfloat16", "/refit", ON_GPU),
    "expected prefixes": ("matryoshka", "expected", "", ON_GPU),
    "expected prefixes, refit": ("matryoshka", "expected", "/refit", ON_GPU),
}

# What sparsity is charged by: the folder of the runs, what their SAEs' names end with, the file.
SIGNS = {
    "L1, as the write-up has it": ("relu", "_l0_20", FRONTIER),
    "a logarithm of the same": ("log", "", "standin/signs.json"),
    "L0 itself, by BatchTopK": ("batchtopk", "_l0_20", FRONTIER),
}


def standin_runs(sae: str, recipe: str, refit: str = "", file: str = EVALUATION) -> list[Run]:
    """What evaluate.py found of one kind of SAE on the stand-in, by seed."""
    pattern = re.compile(f"{recipe}_seed\\d+{refit}")
    runs = runs_of(read(file), sae)
    return sorted(
        (run for run in runs if pattern.fullmatch(run["source"])), key=lambda run: run["source"]
    )


def standin_by_kind() -> dict[str, list[Run]]:
    """The stand-in's runs of each kind of SAE that is trained as the write-up has it."""
    kinds = kinds_of(read(EVALUATION))
    return {sae: standin_runs(sae, "sampled") for sae in kinds}


def standin() -> str:
    """The stand-in language model: held-out figures over seeds, before and after the refit."""
    return _standin({title: standin_runs(*of_title) for title, of_title in STANDIN.items()})


def standin_short() -> str:
    """As `standin`, without the refit of both halves."""
    return _standin({title: standin_runs(*STANDIN[title]) for title in list(STANDIN)[:4]})


def standin_variants() -> str:
    """Expected prefixes and products in bfloat16, beside what they vary, all on a GPU."""
    return _standin({title: standin_runs(*of) for title, of in VARIANTS.items()})


def _standin(by_title: Mapping[str, Sequence[Run]]) -> str:
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


def frontier_lines() -> Lines:
    """SAEs of several L0s by kind: BatchTopK, unhedged, the write-up's, and SAELens's own."""
    runs = [
        run | {"kind": "unhedged"} if run["source"].startswith("unhedged") else run
        for run in read(FRONTIER)["runs"]
    ]
    return lines_of([*runs, *saelens_best()])


def saelens_best() -> list[Run]:
    """Of each kind that SAELens trained, the learning rate with the lowest FVU."""
    theirs = read("standin/saelens.json")
    config = theirs["sources"][0]["config"]
    like_ours = {"n_latents": config["n_latents"], "target_l0": config["k"]}
    like_ours |= {"activation": "batchtopk"}
    names = {"matryoshka_batchtopk": "SAELens's matryoshka", "batchtopk": "SAELens's vanilla"}
    return [
        min(runs_of(theirs, sae), key=lambda run: run["fvu"]) | like_ours | {"kind": kind}
        for sae, kind in names.items()
    ]


def saelens() -> str:
    """SAELens's SAEs at each learning rate, and where they were trained."""
    theirs = read("standin/saelens.json")
    device = {s["source"]: s["environment"]["device"].split(",")[0] for s in theirs["sources"]}
    rows = [
        [
            run["sae"],
            f"{run['lr']:g}",
            f"{run['fvu']:.4f}",
            f"{run['l0']:.2f}",
            percent(run["dead_share"], 1),
            device[run["source"]],
        ]
        for run in sorted(theirs["runs"], key=lambda run: (run["sae"], run["lr"]))
    ]
    return table(["SAELens", "lr", "FVU", "L0", "dead", "on"], rows)


def frontier() -> str:
    """What each kind reaches at each L0, means over its seeds."""
    return frontier_table(frontier_lines())


def signs() -> str:
    """Matryoshka and vanilla where sparsity is charged for in other ways: FVU, and repeats."""
    counted = read("standin/repeats.json")["runs"]
    share = {(run["run"], run["sae"]): run["share"] for run in counted}
    rows = []
    for title, (recipe, end, file) in SIGNS.items():
        columns = []
        for kind in KINDS:
            runs = standin_runs(kind + end, recipe, file=file)
            repeats = float(np.mean([share[run["source"], run["sae"]] for run in runs]))
            fvu, l0, dead = (mean(runs, key) for key in ("fvu", "l0", "dead_share"))
            columns.append([f"{fvu:.4f}", f"{l0:.1f}", f"{dead:.0%}", f"{repeats:.1%}"])
        rows.append([title, *(" / ".join(of_both) for of_both in zip(*columns, strict=True))])
    headers = [" / ".join(KINDS), "FVU", "L0", "dead", "repeats, of all firings"]
    return table(headers, rows)


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
