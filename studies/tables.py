"""The tables of README.md and docs/ by name; makes those about speed and synthetic models."""

from collections.abc import Callable

from matryoshka.command_line import table
from matryoshka.errors import UserError
from studies import bench
from studies import synth as synth_study
from studies.kept_results import RESULTS, ROOT, Run, kinds_of, read, runs_of, where
from studies.standin_tables import (
    FRONTIER,
    ON_GPU,
    concepts,
    frontier,
    saelens,
    signs,
    standin,
    standin_short,
    standin_variants,
)
from studies.toy_tables import (
    RECIPES,
    TREES,
    at_the_truth,
    defects,
    edges,
    recipes,
    refitted,
    toy,
    trees,
    unhedged,
    unhedged_short,
)

# What the pages and the notebook import from here.
__all__ = ["RECIPES", "RESULTS", "ROOT", "TABLES", "TREES", "kinds_of", "named", "read", "runs_of"]

# --------------------------------------------------------------- synthetic models of known features


LONG = ("synth/mini_4096.json", "synth/mini_4096_saelens.json")  # four times mini's own steps
LONG_LRS = ("synth/mini_4096_lr0.001.json", "synth/mini_4096_lr0.01.json")  # ours at other rates


def synth() -> str:
    """The SAEs on the synthetic model `mini` after 4,096 steps: ours, then SAELens's."""
    return synth_study.summary(*map(read, LONG))


def synth_short() -> str:
    """The same after mini's own 1,024 steps."""
    return synth_study.summary(read("synth/mini.json"), read("synth/mini_saelens.json"))


def synth_lrs() -> str:
    """Every SAE that was trained at several learning rates, with the first seed."""
    files = (*LONG, *LONG_LRS)
    runs = [run for file in files for run in read(file)["runs"] if run["seed"] == 0]
    by_name: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["lr"]):
        by_name.setdefault(run["sae"], []).append(run)
    names = [name for name in kinds_of({"runs": runs}) if len(by_name[name]) > 1]
    shown = [run for name in names for run in by_name[name]]
    return table(synth_study.HEADERS, synth_study.rows_of(shown))


# ------------------------------------------------------------------------------------------ speed


def bench_table(part: str, file: str = "") -> str:
    """The table that studies.bench prints for a part, from results/bench/`file` or /`part`.json."""
    return bench.show(read(f"bench/{file or part}.json")["sources"][0][part])


def step() -> str:
    """A step at full size on a CPU, as a multiple of its five dense products."""
    return bench_table("step")


def step_xeon() -> str:
    """A step at full size on a CPU that has instructions for bfloat16."""
    return bench_table("step", "step_xeon")


def step_gpu() -> str:
    """A step at full size on a GPU."""
    return bench_table("step", "step_gpu")


def growth() -> str:
    """A step by the number of latents, against the dense products of that size, and by L0."""
    times = read("bench/growth.json")["sources"][0]["growth"]
    rows = []
    for name in times:
        if "," in name:  # it is shown as a column of another name's row
            continue
        columns = [times.get(name + more) for more in ("", ", bfloat16", ", five products")]
        medians = [column and column["median"] for column in columns]
        shown = ["-" if ms is None else f"{ms:.0f}" for ms in medians]
        rows.append([name, *shown, f"{medians[0] / medians[2]:.2f}" if medians[2] else "-"])
    headers = ["", "step, ms", "in bfloat16, ms", "five products, ms", "step / products"]
    return table(headers, rows)


def data() -> str:
    """Caching against the bare forward pass, and a batch read from disk."""
    return bench_table("data")


def browsing() -> str:
    """Browsing: a pass that collects against one that only encodes, and the page."""
    rows = []
    for made in read("bench/browse.json")["sources"]:
        size, passes, page = made["config"], made.get("passes", {}), made.get("page", {})
        cells = [
            f"{passes['ratio']:.2f}" if passes else "-",
            *(f"{page[name]:{form}}" if name in page else "-" for name, form in OF_A_PAGE.items()),
            made["peak_memory"],
        ]
        name = f"{size['n_latents']:,} latents of width {size['d_model']}"
        threads = f"{made['environment']['threads']}"
        rows.append([name, f"{size['tokens']:,}", threads, *cells])
    headers = ["", "tokens", "threads", "collect / encode", "page, MB", "first view, s"]
    return table([*headers, "a latent, s", "peak memory"], rows)


OF_A_PAGE = {"megabytes": ".0f", "first view": ".2f", "a latent": ".3f"}


OF_RECIPES = tuple(f"toy/{file}.json" for file in RECIPES.values())

# By the name of a table in the pages: the function that makes it, and the files that it shows.
TABLES: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "toy": (toy, ("toy/sampled.json",)),
    "recipes": (recipes, (*OF_RECIPES, "bench/toy.json")),
    "refit": (refitted, OF_RECIPES),
    "trees": (trees, ("trees/*_0.json", "trees/*_100.json")),
    "unhedged_short": (unhedged_short, ("toy/unhedged.json", "trees/*_unhedged.json")),
    "unhedged": (unhedged, ("toy/unhedged.json", "trees/*_unhedged.json")),
    "edges": (
        edges,
        ("toy/sampled.json", "toy/unhedged.json", "trees/*_0.json", "trees/*_unhedged.json"),
    ),
    "true_solution": (at_the_truth, ("trees/true_solution.json",)),
    "defects": (defects, ("ablation/ablation.json",)),
    "standin": (standin, ("standin/evaluation.json",)),
    "frontier": (
        frontier,
        ("standin/frontier.json", "standin/saelens.json"),
    ),
    "saelens": (saelens, ("standin/saelens.json",)),
    "signs": (signs, (FRONTIER, "standin/signs.json", "standin/repeats.json")),
    "standin_variants": (standin_variants, (FRONTIER, ON_GPU)),
    "standin_short": (standin_short, ("standin/evaluation.json",)),
    "concepts": (concepts, ("standin/evaluation.json",)),
    "synth": (synth, LONG),
    "synth_short": (synth_short, ("synth/mini.json", "synth/mini_saelens.json")),
    "synth_lrs": (synth_lrs, (*LONG, *LONG_LRS)),
    "bench": (step, ("bench/step.json",)),
    "bench_xeon": (step_xeon, ("bench/step_xeon.json",)),
    "bench_gpu": (step_gpu, ("bench/step_gpu.json",)),
    "growth": (growth, ("bench/growth.json",)),
    "data": (data, ("bench/data.json",)),
    "browsing": (browsing, ("bench/browse.json",)),
}


def named(name: str) -> str:
    """The table `name`, and under it where its figures were made.

    Raises `UserError` for an unknown name, or if a file of results/ lacks something that it shows.
    """
    if name not in TABLES:
        raise UserError(f"there is no table {name}, only {', '.join(TABLES)}")
    make, files = TABLES[name]
    made_from = ", ".join(f"`results/{file}`" for file in files)
    try:
        return f"{make()}\n\n<sub>{made_from}: {where(*files)}</sub>"
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{made_from} lacks what table {name} shows ({error!r}): was a file edited, or kept by "
            "another version?"
        ) from error
