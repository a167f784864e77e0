"""The tables that evaluate.py prints."""

from collections.abc import Mapping
from typing import Any

from matryoshka.command_line import table
from matryoshka.frontier import frontier_table, is_frontier, lines_of
from matryoshka.reconstruction import OUTLIER

NOTABLE_CHANGE = 0.1  # relative change of FVU without outliers from which on it is printed
HELD_OUT = {True: "not trained on", False: "TRAINED ON", None: "whether trained on is not known"}


def report(results: Mapping[str, Any]) -> str:
    """All that evaluate.py prints: the tables of concepts and of the frontier, if there are any,
    and the summary."""
    concepts = concept_table(results)
    if "absorption" in results["left_out"]:
        concepts = f"No absorption: {results['left_out']['absorption']}."
    elif n_left_out := results["concepts"]["words_left_out"]:
        n_words = results["concepts"]["words"]
        concepts += (
            f"\n\nLeft out, because they are not a single token: {n_left_out:,} of {n_words:,} "
            "words."
        )
    runs = results["runs"]
    frontier = f"\n\n{frontier_table(lines_of(runs))}" if is_frontier(runs) else ""
    return f"{concepts}{frontier}\n\n{summary(results)}"


def summary(results: Mapping[str, Any]) -> str:
    """The write-up's table, with a row for each SAE, and what it was measured on."""
    cache = results["cache"]
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
    tokens = f"tokens of {cache['make']['split']}" if "split" in cache["make"] else "activations"
    return (
        f"{table(headers, rows)}\n\n"
        f"{cache['n_tokens']:,} {tokens}, {HELD_OUT[cache['held_out']]}. {loss_line(results)}\n"
        f"{norm_line(results)}{threshold_line(results)}"
    )


def threshold_line(results: Mapping[str, Any]) -> str:
    """The k of the BatchTopK SAEs, whose L0 follows from their threshold; "" if there are none."""
    asked = [
        f"{run.get('target_l0', 0):g} {run['sae']}"
        for run in results["runs"]
        if run.get("activation") == "batchtopk"
    ]
    if not asked:
        return ""
    return f"\nBatchTopK's L0 is measured at its saved threshold; k was {', '.join(asked)}."


def loss_line(results: Mapping[str, Any]) -> str:
    """The cross-entropies, or why there are none."""
    losses = results["cross_entropy"]
    if losses is None:
        return f"No cross-entropy: {results['left_out']['cross_entropy']}."
    by_sae = ", ".join(f"{run['cross_entropy']:.3f} {run['sae']}" for run in results["runs"])
    line = (
        f"Cross-entropy on {losses['predictions']:,} predictions: {losses['clean']:.3f} nats "
        f"clean, {losses['mean']:.3f} with the mean, {by_sae}."
    )
    if losses["mean"] > losses["clean"]:
        return line
    return f"{line} The mean does not raise the loss, so that there is none to recover."


def norm_line(results: Mapping[str, Any]) -> str:
    """How widely the activations' norms spread and, if outliers decide FVU, FVU without them."""
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
        f"TOKENS, whose norm is over {OUTLIER:g} times the median. Without them: {without}."
    )


def _outliers_matter(run: Mapping[str, Any]) -> bool:
    """Whether an SAE's FVU without outliers is notably different, or not defined."""
    without = run["fvu_without_outliers"]
    return without is None or abs(without - run["fvu"]) > NOTABLE_CHANGE * run["fvu"]


def concept_table(results: Mapping[str, Any]) -> str:
    """For each concept and SAE: how good the detector is, what it misses, what is absorbed."""
    rows = [
        [
            concept["concept"],
            run["sae"],
            concept["tokens"],
            *(_percent(concept[key]) for key in ("precision", "recall", "miss_rate", "absorption")),
            concept["specific_latents"],
        ]
        for concepts in zip(*(run["concepts"] for run in results["runs"]), strict=True)
        for run, concept in zip(results["runs"], concepts, strict=True)
    ]
    headers = ["concept", "SAE", "tokens", "precision", "recall", "missed", "absorbed", "specific"]
    return table(headers, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _fvu(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
