"""Makes the tables of README.md and docs/, and the figures of results/, from the files of results/.

    python -m studies.report            print every table
    python -m studies.report --write    write each table between its markers, and draw the figures

A table stands between `<!-- table NAME -->` and `<!-- end -->`. A test compares the pages with what
this makes, so no number in a table is typed by hand.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_toy
from matryoshka import frontier_plot, plots
from matryoshka.command_line import main_guard, parse, setting
from matryoshka.files import write_atomically
from studies.kept_results import RESULTS, ROOT, read, runs_of
from studies.standin_tables import frontier_lines, standin_by_kind
from studies.tables import TABLES, named
from studies.toy_tables import REFITS, complete_seeds


@dataclasses.dataclass(frozen=True)
class Config:
    """Whether the pages and figures are written."""

    write: bool = setting(False, "put the tables into README.md and docs/, and draw the figures")


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """`text` with every marked table made anew. Raises `UserError` for an unknown name."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{named(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def draw_refits(path: Path) -> None:
    """Draws the toy's best cosines before and after refits, for seeds with all features clean."""
    results = read("toy/sampled.json")
    complete = complete_seeds(results)
    titles = ("as trained", "decoder\nrefitted", "both\nrefitted")
    best = {
        title: [
            run["best_cosine"]
            for run in runs_of(results, f"matryoshka{how}")
            if run["seed"] in complete
        ]
        for title, how in zip(titles, REFITS, strict=True)
    }
    tree = train_toy.load_tree(results["sources"][0]["config"]["tree"])
    plots.refit_cosines(path, best, tree)


def fvu_curves() -> dict[str, dict[str, Any]]:
    """The stand-in SAEs' FVU by prefix for all seeds, in the form of `plots.fvu_by_prefix`."""
    return {
        sae: {
            "prefix": runs[0]["fvu_by_prefix"]["prefix"],
            "fvu": [run["fvu_by_prefix"]["fvu"] for run in runs],
        }
        for sae, runs in standin_by_kind().items()
    }


def density_histograms() -> dict[str, list[dict[str, Any]]]:
    """How often the stand-in SAEs' latents fire, in the form of `plots.density_histograms`."""
    return {
        sae: [run["density_histogram"] for run in runs] for sae, runs in standin_by_kind().items()
    }


def write() -> None:
    """Draws the figures, and writes every table between its markers."""
    plots.fvu_by_prefix(RESULTS / "standin" / "fvu_by_prefix.png", fvu_curves())
    plots.density_histograms(RESULTS / "standin" / "densities.png", density_histograms())
    frontier_plot.draw(RESULTS / "standin" / "frontier.png", frontier_lines())
    draw_refits(RESULTS / "toy" / "refit_cosines.png")
    for page in pages():
        text = with_tables(page.read_text(encoding="utf-8"))
        write_atomically(page, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__ or "", argv)
        if config.write:
            write()
        for name in TABLES:
            print(f"{name}\n{named(name)}\n")


if __name__ == "__main__":
    main()
