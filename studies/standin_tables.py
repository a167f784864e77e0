"""The tables of the stand-in language model: each a function of files in results/ and of nothing
else."""

import re
from collections.abc import Sequence

import numpy as np

from matryoshka.command_line import table
from studies.kept_results import Run, kinds_of, percent, read, runs_of, spread

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
