"""What evaluate.py prints of its results: an SAE a row, a concept and SAE a row."""

from collections.abc import Mapping
from typing import Any

from matryoshka.command_line import table
from matryoshka.reconstruction import OUTLIER

NOTABLE_CHANGE = 0.1  # of FVU without outliers, as a share of FVU, above which it is printed
HELD_OUT = {True: "not trained on", False: "TRAINED ON", None: "whether trained on is not known"}


def summary(results: Mapping[str, Any]) -> str:
    """The write-up's table, an SAE a row, and what it was measured on."""
    cache, losses = results["cache"], results["cross_entropy"]
    rows = [
        [
            run["sae"],
            f"{run['fvu']:.4f}",
            f"{run['l0']:.2f}",
            f"{run['dead_share']:.1%}",
            _percent(run["loss_recovered"]),
            f"{run['mean_highest_cosine']:.3f}",
            _percent(run["absorption"]),
        ]
        for run in results["runs"]
    ]
    headers = ["SAE", "FVU", "L0", "dead", "loss recovered", "highest cosine", "absorption"]
    by_sae = ", ".join(f"{run['cross_entropy']:.3f} {run['sae']}" for run in results["runs"])
    return (
        f"{table(headers, rows)}\n\n"
        f"{cache['n_tokens']:,} tokens of {cache['make']['split']}, {HELD_OUT[cache['held_out']]}. "
        f"Cross-entropy on {losses['predictions']:,} predictions: {losses['clean']:.3f} nats "
        f"clean, {losses['mean']:.3f} with the mean, {by_sae}.\n{norm_line(results)}"
    )


def norm_line(results: Mapping[str, Any]) -> str:
    """How the activations' norms spread and, where outliers decide FVU, FVU without them."""
    norms = results["norms"]
    if norms["p99_9_over_median"] is None:
        return "The median of the activations' norms is 0."
    line = (
        f"Norms: the 99.9th percentile is {norms['p99_9_over_median']:.2f} times the median, the "
        f"largest {norms['max_over_median']:.2f} times."
    )
    if not (norms["outliers"] and any(map(_outliers_matter, results["runs"]))):
        return line
    without = ", ".join(
        f"{_fvu(run['fvu_without_outliers'])} {run['sae']}" for run in results["runs"]
    )
    return (
        f"{line}\nFVU IS DECIDED BY {norms['outliers']:,} OF {results['cache']['n_tokens']:,} "
        f"TOKENS, of over {OUTLIER:g} times the median norm. Without them: {without}."
    )


def _outliers_matter(run: Mapping[str, Any]) -> bool:
    """Whether an SAE's FVU without outliers is another."""
    without = run["fvu_without_outliers"]
    return without is None or abs(without - run["fvu"]) > NOTABLE_CHANGE * run["fvu"]


def concept_table(results: Mapping[str, Any]) -> str:
    """A concept and SAE a row: how good its detector is, what it misses, what is absorbed."""
    rows = [
        [
            of["concept"],
            run["sae"],
            of["tokens"],
            *(_percent(of[key]) for key in ("precision", "recall", "miss_rate", "absorption")),
            of["specific_latents"],
        ]
        for concepts in zip(*(run["concepts"] for run in results["runs"]), strict=True)
        for run, of in zip(results["runs"], concepts, strict=True)
    ]
    headers = ["concept", "SAE", "tokens", "precision", "recall", "missed", "absorbed", "specific"]
    return table(headers, rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _fvu(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
