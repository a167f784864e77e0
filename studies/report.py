"""The tables of README.md, from results/ and nothing else.

    python report.py            prints every table
    python report.py --write    puts each between its markers in README.md; draws figures

A table stands between `<!-- table NAME -->` and `<!-- end -->`. A test compares the README with
what this prints, so that no number in a table is typed by hand.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.command_line import main_guard, parse, setting, table
from matryoshka.errors import UserError
from matryoshka.files import write_atomically

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """Whether README.md is written."""

    write: bool = setting(False, "put the tables into README.md")


def read(name: str) -> dict[str, Any]:
    """A JSON file of results/. Raises `UserError` where it is not there."""
    path = RESULTS / name
    if not path.exists():
        raise UserError(f"results/{name} is not there: the command that makes it is in README.md")
    return json.loads(path.read_text())


def runs_of(results: dict[str, Any], sae: str) -> list[dict[str, Any]]:
    """The runs of one kind of SAE, by seed."""
    return [run for run in results["runs"] if run["sae"] == sae]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def clean_counts(runs: Sequence[dict[str, Any]]) -> str:
    """How many seeds have how many clean features: "20/20 in 86, 19/20 in 7"."""
    clean, n_seeds = np.unique([run["clean_features"] for run in runs], return_counts=True)
    n = runs[0]["n_features"]
    return ", ".join(f"{c}/{n} in {k}" for c, k in zip(clean[::-1], n_seeds[::-1], strict=True))


def toy() -> str:
    """The write-up's table over the hundred seeds."""
    results = read("toy/results.json")
    rows = []
    for sae in ("matryoshka", "vanilla"):
        runs = runs_of(results, sae)
        rows.append(
            [
                sae,
                spread([run["fvu"] for run in runs], 4),
                f"{np.median([run['fvu'] for run in runs]):.4f}",
                spread([run["l0"] for run in runs], 3),
                clean_counts(runs),
            ]
        )
    return table(["100 seeds", "FVU", "median", "L0", "clean features"], rows)


RECIPES = {
    "sampled prefixes (the paper)": "toy",
    "with restarts": "toy_restarts",
    "with restarts, seeds not looked at before": "toy_restarts_unseen",
    "expected prefixes": "toy_expected",
}
THRESHOLDS = ("0.9", "0.95", "0.99")


def recipes() -> str:
    """Success over seeds by recipe: what is trained differently, and what it does how soon."""
    a_step = {
        prefixes: read("bench/toy.json")["toy"][f"of matryoshka{prefixes}"]["median"] / 1e3
        for prefixes in ("", ", expected prefixes")
    }
    rows = []
    for name, folder in RECIPES.items():
        results = read(f"{folder}/results.json")
        runs = runs_of(results, "matryoshka")
        seeds = [run["seed"] for run in runs]
        n = runs[0]["n_features"]
        steps = median_steps(runs, "0.9")
        seconds = a_step[", expected prefixes" if name.startswith("expected") else ""]
        rows.append(
            [
                name,
                f"{min(seeds)} to {max(seeds)}",
                f"{sum(run['clean_features'] == n for run in runs)} of {len(runs)}",
                f"{np.median([run['fvu'] for run in runs]):.4f}",
                f"{max(run['fvu'] for run in runs):.4f}",
                f"{np.median([run['l0'] for run in runs]):.3f}",
                f"{steps:,.0f}",
                f"{steps * seconds:.1f}",
                f"{median_steps(runs_of(results, 'matryoshka, refit'), '0.9'):,.0f}",
            ]
        )
    headers = ["", "seeds", "20/20", "median FVU", "worst", "median L0", "steps to 20/20", "s"]
    return table([*headers, "steps, refit"], rows)


def median_steps(runs: Sequence[dict[str, Any]], threshold: str) -> float:
    """Steps until all features stay clean: the median over the seeds where they come to."""
    steps = [run["steps_to"][threshold] for run in runs]
    return float(np.median([step for step in steps if step is not None]))


def refitted() -> str:
    """Before and after the refits, by recipe, over all seeds and over those that had 20/20."""
    rows = []
    for recipe, folder, sae in (
        ("sampled", "toy", "matryoshka"),
        ("expected", "toy_expected", "matryoshka"),
        ("restarts", "toy_restarts", "matryoshka"),
        ("restarts, unseen seeds", "toy_restarts_unseen", "matryoshka"),
        ("vanilla", "toy", "vanilla"),
    ):
        results = read(f"{folder}/results.json")
        whole = whole_seeds(results)
        for how in ("", ", refit", ", refit both"):
            runs = runs_of(results, sae + how)
            successes = [run for run in runs if run["seed"] in whole]
            absorbed = [a for run in runs for a in run["absorption"] if a is not None]
            counts = [sum(r["clean_at"][t] == 20 for r in successes) for t in THRESHOLDS[1:]]
            rows.append(
                [
                    recipe + how,
                    f"{np.mean([run['fvu'] for run in runs]):.4f}",
                    f"{max(run['fvu'] for run in successes):.4f}",
                    *(f"{np.mean([r['clean_at'][t] for r in runs]):.2f}" for t in THRESHOLDS),
                    *(f"{count} of {len(successes)}" for count in counts),
                    f"{min(min(run['best_cosine']) for run in successes):.3f}",
                    f"{np.mean(absorbed):.3f}",
                ]
            )
    headers = ["", "FVU", "worst FVU*", *(f"clean > {t}" for t in THRESHOLDS)]
    more = [*(f"all 20 > {t}*" for t in THRESHOLDS[1:]), "worst cosine*", "absorption"]
    return table([*headers, *more], rows)


def whole_seeds(results: dict[str, Any]) -> set[int]:
    """The seeds whose Matryoshka SAE had every feature clean before any refit."""
    runs = runs_of(results, "matryoshka")
    return {run["seed"] for run in runs if run["clean_features"] == run["n_features"]}


def refit_figure(path: Path) -> None:
    """The toy's best cosines before and after the refits, in the seeds that had 20/20."""
    import plots

    import train_toy

    results = read("toy/results.json")
    whole = whole_seeds(results)
    stages = {"as trained": "", "decoder\nrefitted": ", refit", "both\nrefitted": ", refit both"}
    best = {
        stage: [
            run["best_cosine"]
            for run in runs_of(results, f"matryoshka{how}")
            if run["seed"] in whole
        ]
        for stage, how in stages.items()
    }
    plots.refit_cosines(path, best, train_toy.load_tree(results["config"]["tree"]))


def defects() -> str:
    """The original's defects, put back one by one."""
    import ablate_toy

    return ablate_toy.table(read("toy_ablation/ablation.json"))


def trees() -> str:
    """Harder trees than the paper's: with and without restarts, and with the refit."""
    rows = []
    for name, title in (
        ("three_levels", "three levels deep"),
        ("uneven", "uneven children"),
        ("graded", "not binary"),
        ("crowded", "20 features in 14 dimensions"),
    ):
        for every, recipe in ((0, ""), (100, ", restarts")):
            results = read(f"trees/{name}_{every}.json")
            all_runs = [
                runs_of(results, sae + how)
                for how in ("", ", refit", ", refit both")
                for sae in ("vanilla", "matryoshka")
            ]
            ours = all_runs[1]
            clean = [f"{np.mean([r['clean_features'] for r in runs]):.1f}" for runs in all_runs]
            fvu = [f"{np.mean([r['fvu'] for r in runs]):.4f}" for runs in all_runs]
            n_whole = sum(r["clean_features"] == r["n_features"] for r in ours)
            whole = f"{n_whole} of {len(ours)}"
            rows.append([title + recipe, *pairs(clean), whole, *pairs(fvu)])
    stages = ("as trained", "refit", "refit both")
    clean_headers = [f"clean, {stage}" for stage in stages]
    return table(
        ["vanilla / Matryoshka", *clean_headers, "all 20", *(f"FVU, {s}" for s in stages)], rows
    )


def pairs(values: Sequence[str]) -> list[str]:
    """Two and two: "8.0 / 6.0"."""
    return [f"{a} / {b}" for a, b in zip(values[::2], values[1::2], strict=True)]


STANDIN = (
    ("matryoshka", "seed{}", "matryoshka"),
    ("vanilla", "seed{}", "vanilla"),
    ("matryoshka, refit", "seed{}_refit", "matryoshka"),
    ("vanilla, refit", "seed{}_refit", "vanilla"),
    ("expected prefixes", "expected_seed{}", "matryoshka"),
    ("expected prefixes, refit", "expected_seed{}_refit", "matryoshka"),
    ("matryoshka, refit both", "seed{}_refit_both", "matryoshka"),
    ("matryoshka, bfloat16", "bfloat16_seed{}", "matryoshka"),
    ("vanilla, bfloat16", "bfloat16_seed{}", "vanilla"),
    ("matryoshka, bfloat16, dense", "bfloat16_dense_seed{}", "matryoshka"),
    ("vanilla, bfloat16, dense", "bfloat16_dense_seed{}", "vanilla"),
)
STANDIN_SEEDS = 3


def standin_runs(folder: str, sae: str) -> list[dict[str, Any]]:
    """What evaluate.py found for one kind of SAE on the stand-in, by seed."""
    return [
        run
        for seed in range(STANDIN_SEEDS)
        for run in runs_of(read(f"tinystories_standin/{folder.format(seed)}.json"), sae)
    ]


def standin() -> str:
    """The stand-in language model: held-out figures over seeds, before and after the refit."""
    rows = []
    for title, folder, sae in STANDIN:
        runs = standin_runs(folder, sae)
        rows.append(
            [
                title,
                spread([run["fvu"] for run in runs], 4),
                spread([run["l0"] for run in runs], 2),
                *(
                    f"{100 * np.mean([run[key] for run in runs]):.1f}%"
                    for key in ("dead_share", "loss_recovered")
                ),
                spread([run["mean_highest_cosine"] for run in runs], 3),
                f"{100 * np.mean([run['absorption'] for run in runs]):.1f}%",
            ]
        )
    headers = ["stand-in, 3 seeds", "FVU", "L0", "dead", "loss recovered", "highest cosine"]
    return table([*headers, "absorption"], rows)


def draw_standin() -> None:
    """The stand-in's figures over its seeds, into results/tinystories_standin/."""
    import plots

    runs = {sae: standin_runs("seed{}", sae) for sae in ("vanilla", "matryoshka")}
    n_tokens = read("tinystories_standin/seed0.json")["cache"]["n_tokens"]
    curves = {
        sae: {
            "prefix": own[0]["fvu_by_prefix"]["prefix"],
            "fvu": [run["fvu_by_prefix"]["fvu"] for run in own],
        }
        for sae, own in runs.items()
    }
    plots.fvu_by_prefix(RESULTS / "tinystories_standin" / "fvu_by_prefix.png", curves)
    densities = {
        sae: np.array([run["fired"] for run in own]) / n_tokens for sae, own in runs.items()
    }
    plots.density_histograms(RESULTS / "tinystories_standin" / "densities.png", densities)


def bench() -> str:
    """A step at full size on a CPU, as a multiple of its five dense products."""
    import bench as bench_script

    return bench_script.show(read("bench/step.json")["step"])


def growth() -> str:
    """A step by the size of the dictionary, against the dense products of that size, and by L0."""
    times = read("bench/growth.json")["growth"]

    def of(name: str) -> float | None:
        return times[name]["median"] if name in times else None

    rows = []
    for name in times:
        if "," in name:  # a column of another's row
            continue
        step, rounded, dense = of(name), of(f"{name}, bfloat16"), of(f"{name}, five products")
        assert step is not None
        ms = ["-" if value is None else f"{value:.0f}" for value in (step, rounded, dense)]
        rows.append([name, *ms, f"{step / dense:.2f}" if dense else "-"])
    headers = ["", "step, ms", "in bfloat16, ms", "five products, ms", "step / products"]
    return table(headers, rows)


def data() -> str:
    """Caching against the bare forward pass, and a streamed batch."""
    import bench as bench_script

    return bench_script.show(read("bench/data.json")["data"])


TABLES: dict[str, Callable[[], str]] = {
    "toy": toy,
    "recipes": recipes,
    "refit": refitted,
    "trees": trees,
    "standin": standin,
    "defects": defects,
    "bench": bench,
    "growth": growth,
    "data": data,
}


def with_tables(text: str) -> str:
    """`text` with every marked table made anew. Raises `UserError` for a name that is none."""

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in TABLES:
            raise UserError(f"README.md: there is no table {name}, only {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__, argv)
        readme = ROOT / "README.md"
        if config.write:
            draw_standin()
            refit_figure(RESULTS / "toy" / "refit_cosines.png")
            text = with_tables(readme.read_text())
            write_atomically(readme, lambda part: part.write_text(text))
        for name, make in TABLES.items():
            print(f"{name}\n{make()}\n")


if __name__ == "__main__":
    main()
