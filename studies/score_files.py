"""Scores files of SAEs one after another, and writes the scores in the form of a kept results file.

`studies.keep` says what that form is: "sources" and "runs", lists of objects.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.files import make_folder, write_json
from matryoshka.saved_runs import load_sae
from sae import SAE


def load_saes(paths: Sequence[str]) -> dict[str, SAE]:
    """The SAEs of `paths`, on the CPU. Raises `UserError` where one cannot be read."""
    return {path: load_sae(Path(path), torch.device("cpu"))[0] for path in paths}


def score_files(
    saes: Mapping[str, SAE],
    score: Callable[[SAE], dict[str, float]],
    source: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Scores each of `saes`, by path, and writes the results to `out` after each one.

    source: what the results say about how they were made; its "source" names the study. A run has
    this name, the SAE's folder and file name, and the figures that `score` returns.
    """
    make_folder(out.parent)
    results: dict[str, Any] = {"sources": [source], "runs": []}
    for path, sae in saes.items():
        file = Path(path).resolve()
        about = {"source": source["source"], "run": file.parent.name, "sae": file.stem}
        results["runs"].append(about | score(sae))
        write_json(out, results)
    return results
