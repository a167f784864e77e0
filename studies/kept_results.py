"""Reads the files of results/ that the tables are made from, and formats figures of their runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"

Results = dict[str, Any]
Run = dict[str, Any]


def read(name: str) -> Results:
    """Reads a file of results/ in the form that `studies.keep` writes.

    It has "sources" and "runs", lists of objects. Raises `UserError` if the file is missing or has
    another form.
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
    """The runs of one kind of SAE, in the order of the file, which is by seed."""
    return [run for run in results["runs"] if run["sae"] == sae]


def kinds_of(results: Results) -> list[str]:
    """The kinds of SAE that were trained, in the order of the file, without the refitted ones."""
    return [sae for sae in dict.fromkeys(run["sae"] for run in results["runs"]) if "," not in sae]


def where(*patterns: str) -> str:
    """Says where files of results/ were made: CPU or GPU, threads, version of torch, commit.

    patterns: names of files, such as "toy/*.json". Raises `UserError` if no file matches one.
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


def spread(values: Sequence[float], digits: int) -> str:
    """Formats the mean and the standard deviation (n - 1) over seeds; of one seed, the value."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def percent(share: float, digits: int) -> str:
    """Formats a share in percent; "-" if it is NaN."""
    return "-" if np.isnan(share) else f"{100 * share:.{digits}f}%"
