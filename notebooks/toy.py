"""Sentences of the notebook on the toy, made from results/."""

from typing import Any

import scipy.stats

from studies import tables, toy_tables


def failures(results: dict[str, Any]) -> str:
    """How many Matryoshka seeds fall short, and how their FVU stands apart."""
    runs = tables.runs_of(results, "matryoshka")
    complete = toy_tables.complete_seeds(results)
    whole = [run["fvu"] for run in runs if run["seed"] in complete]
    short = [run["fvu"] for run in runs if run["seed"] not in complete]
    kinds = runs[0]["lost"]
    lost = ", ".join(f"{kind} {sum(run['lost'][kind] for run in runs)}" for kind in kinds)
    found = (
        f"**{len(short)} of {len(runs)}** Matryoshka seeds recover fewer than all features. Lost "
        f"features by kind, over all seeds: {lost}."
    )
    if not short or not whole:
        return found
    return (
        f"{found} The FVU of these seeds is {min(short):.4f} to {max(short):.4f}, that of the "
        f"others {min(whole):.4f} to {max(whole):.4f}."
    )


def told_apart() -> str:
    """Whether the ablation's seeds tell the original's three defects together from none of them."""
    (source,) = tables.read("ablation/ablation.json")["sources"]
    n = source["config"]["seeds"]
    counts = [
        source["variants"][name]["matryoshka"]["clean_features"].get("20", 0)
        for name in ("none", "all")
    ]
    p = scipy.stats.fisher_exact([[k, n - k] for k in counts]).pvalue
    return (
        f"{counts[0]} of {n} seeds have 20/20 with none of the defects, and {counts[1]} with all "
        f"three. Fisher's exact test, two-sided, gives p = {p:.2f}."
    )
