"""Copies the results of runs into one small file of results/, a line for each run.

    python -m studies.keep --runs runs/toy --file results.json --to results/toy/sampled.json
    python -m studies.keep --runs runs/standin/seed0 runs/standin/seed1 --file evaluation.json \\
        --to results/standin/evaluation.json

A kept file has two lists. `sources` has an item for each file that was read: what it holds besides
its runs, and the name of its folder. `runs` has an item for each run, with the name of its folder
as `source`. Paths are reduced to their last part, so that none of this machine is kept.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.command_line import main_guard, parse, setting
from matryoshka.errors import UserError
from matryoshka.files import make_folder, without_paths, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which files are kept, and in which file."""

    runs: tuple[str, ...] = setting(help="folders of runs")
    file: str = setting("results.json", "which file of each folder")
    to: str = setting(help="the file to write, in results/")


def keep(folders: Sequence[Path], file: str) -> dict[str, Any]:
    """What is kept of the file `file` in each of `folders`.

    Raises `UserError` if one is missing or is not a JSON object, and for the folders that
    `short_names` refuses.
    """
    names = short_names([folder.resolve() for folder in folders])
    sources, runs = [], []
    for name, folder in zip(names, folders, strict=True):
        content = results_in(folder / file)
        of_file = content.pop("runs", [])
        sources.append({"source": name, **without_paths(content)})
        runs += [{"source": name, **without_paths(run)} for run in of_file]
    return {"sources": sources, "runs": runs}


def results_in(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises `UserError` if it does not."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be kept: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be kept: it must hold an object, not a list or a value")
    return dict(content)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Absolute paths as names: each relative to the folder that holds all of them.

    Raises `UserError` if two are the same, or if that folder is the system's root: the names would
    be paths of this machine.
    """
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"--runs names {folder} twice")
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    if len(shared.parts) == 1 < len(folders):
        raise UserError("--runs: the folders must lie in one, such as runs/")
    return [str(folder.relative_to(shared)) for folder in folders]


def run(config: Config) -> dict[str, Any]:
    """Writes the kept file; returns what it holds. Raises `UserError`."""
    kept = keep([Path(folder) for folder in config.runs], config.file)
    target = Path(config.to)
    make_folder(target.parent, "--to")
    write_json(target, kept)
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__, argv)
        kept = run(config)
        print(f"{config.to}: runs {len(kept['runs'])}, from files {len(kept['sources'])}")


if __name__ == "__main__":
    main()
