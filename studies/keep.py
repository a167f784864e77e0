"""What is worth keeping of runs: one small file in results/, a line a run, no machine's path.

    python -m studies.keep --runs runs/toy --file results.json --to results/toy/sampled.json
    python -m studies.keep --runs runs/standin/seed0 runs/standin/seed1 --file evaluation.json \\
        --to results/standin/evaluation.json

A kept file has two lists. `sources` has an item a file that was read: what it says of itself but
for its runs, and the folder it was in. `runs` has an item a run, with the name of its folder as
`source`. Paths are reduced to their last part.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka.command_line import main_guard, parse, setting
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which files are kept, and where."""

    runs: tuple[str, ...] = setting(help="folders of runs")
    file: str = setting("results.json", "which file of each")
    to: str = setting(help="the file to write, in results/")


def without_paths(value: Any) -> Any:
    """`value` with every string that is a path reduced to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_path(value):
        return Path(value).name
    return value


def is_path(text: str) -> bool:
    """Whether `text` leads somewhere on this machine: a hub's name, owner/name, does not."""
    return text.startswith(("/", "~", "./", "../")) or (text.count("/") > 1 and " " not in text)


def density_histogram(fired: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """How often latents fire, by tenths of a power of ten, from how many tokens each fired on."""
    edges = [tenth / 10 for tenth in range(-80, 1)]
    counts = [0] * (len(edges) - 1)
    for n in fired:
        if n:
            place = math.floor((math.log10(n / n_tokens) - edges[0]) * 10)
            counts[min(max(place, 0), len(counts) - 1)] += 1
    return {"log10_edges": edges, "counts": counts, "never": sum(n == 0 for n in fired)}


def kept_run(run: dict[str, Any], name: str, n_tokens: int | None) -> dict[str, Any]:
    """A run as it is kept: older evaluations had a count a latent in place of a histogram."""
    run = {"source": name, **run}
    fired = run.pop("fired", None)
    if fired is not None and n_tokens:
        run["density_histogram"] = density_histogram(fired, n_tokens)
    return without_paths(run)


def keep(folders: Sequence[Path], file: str) -> dict[str, Any]:
    """What is kept of `file` in each of `folders`. Raises `UserError` where one is not there."""
    shared = Path(*common_parts(folders))
    sources, runs = [], []
    for folder in folders:
        try:
            content = json.loads((folder / file).read_text())
            of_file = content.pop("runs", [])
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / file} cannot be kept: {error}") from None
        name = str(folder.relative_to(shared)) if len(folders) > 1 else folder.name
        n_tokens = content.get("cache", {}).get("n_tokens")
        sources.append({"source": name, **without_paths(content)})
        runs += [kept_run(run, name, n_tokens) for run in of_file]
    return {"sources": sources, "runs": runs}


def common_parts(folders: Sequence[Path]) -> list[str]:
    """The parts that all paths begin with, less the last of each."""
    parts = [folder.parts[:-1] for folder in folders]
    shared = []
    for at in zip(*parts, strict=False):
        if len(set(at)) > 1:
            break
        shared.append(at[0])
    return shared


def run(config: Config) -> dict[str, Any]:
    """Writes the file; returns what it holds."""
    kept = keep([Path(folder) for folder in config.runs], config.file)
    target = Path(config.to)
    make_folder(target.parent, "--to")
    write_json(target, kept)
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__, argv)
        kept = run(config)
        print(f"{config.to}: {len(kept['sources'])} files, {len(kept['runs'])} runs")


if __name__ == "__main__":
    main()
