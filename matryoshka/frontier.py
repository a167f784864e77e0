"""The frontier of SAEs of several sparsities: the scores of each kind of SAE at each L0.

A point is the result of one SAE in evaluation.json. It has l0 and fvu; other scores may be None. A
line is all points of one kind, size and activation function.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matryoshka.command_line import table

Lines = Mapping[str, Sequence[Mapping[str, Any]]]


def lines_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The lines by name, such as "matryoshka, relu", each with its points sorted by L0.

    The name has the kind and the activation function, and between them the number of latents, if
    SAEs differ in it. SAEs that were not trained for an L0 are left out.
    """
    runs = [run for run in runs if run.get("target_l0") is not None]
    several = len({run.get("n_latents") for run in runs}) > 1
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        size = f", {run['n_latents']:,} latents" if several and run.get("n_latents") else ""
        name = f"{run.get('kind') or run['sae']}{size}, {run.get('activation', 'relu')}"
        lines.setdefault(name, []).append(run)
    return {name: sorted(points, key=lambda run: run["l0"]) for name, points in lines.items()}


def is_frontier(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some kind was trained at more than one L0."""
    targets = [{run.get("target_l0") for run in points} for points in lines_of(runs).values()]
    return any(len(of_kind) > 1 for of_kind in targets)


def frontier_table(lines: Lines) -> str:
    """A table of each line's mean scores at each target L0; "-" for a score that no SAE has."""
    headers = ["SAE", "asked L0", "L0", "FVU", "dead", "loss recovered", "highest cosine"]
    forms = {"l0": ".2f", "fvu": ".4f", "dead_share": ".1%", "loss_recovered": ".1%"}
    forms |= {"mean_highest_cosine": ".3f", "absorption": ".1%"}
    rows = [
        [name, f"{target:g}", *(_cell(points, key, form) for key, form in forms.items())]
        for name, of_kind in lines.items()
        for target, points in by_target(of_kind).items()
    ]
    return table([*headers, "absorption"], rows)


def _cell(points: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    value = mean(points, key)
    return "-" if math.isnan(value) else f"{value:{form}}"


def by_target(points: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """The points of one line by target L0, in rising order."""
    targets = sorted({run["target_l0"] for run in points})
    return {target: [run for run in points if run["target_l0"] == target] for target in targets}


def mean(points: Sequence[Mapping[str, Any]], key: str) -> float:
    """The mean of the score `key` over the points that have it; NaN if none has it."""
    values = [run[key] for run in points if run.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")
