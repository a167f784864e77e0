"""The results notebook: it runs, and what is committed is what results/ give now."""

import base64
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure

from matryoshka.command_line import parse
from studies import kept_results, tables, toy_tables

sys.path.insert(0, str(tables.ROOT / "notebooks"))

import figures
import language_model
import make_results
import showing

COMMITTED = nbformat.read(make_results.NOTEBOOK, as_version=4)
AGAIN = "python notebooks/make_results.py"


def outputs(notebook) -> list:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def markdown(notebook) -> list[str]:
    """Every Markdown output: tables, and sentences with numbers in them."""
    return [o["data"]["text/markdown"] for o in outputs(notebook) if "text/markdown" in o["data"]]


def pictures(notebook) -> list[bytes]:
    found = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o["data"]]
    return [base64.b64decode(picture) for picture in found]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The committed notebook, run in a copy of what it needs."""
    copy = tmp_path_factory.mktemp("repository")
    for file in (*tables.ROOT.glob("*.py"), *tables.ROOT.glob("*.json")):
        shutil.copy(file, copy)
    for folder in ("notebooks", "results", "matryoshka", "studies"):
        shutil.copytree(tables.ROOT / folder, copy / folder)
    return make_results.executed(COMMITTED, copy / "notebooks")


def test_the_committed_cells_are_the_source():
    source = make_results.unexecuted(make_results.SOURCE.read_text())
    assert [(c["cell_type"], c["source"]) for c in COMMITTED["cells"]] == [
        (c["cell_type"], c["source"]) for c in source["cells"]
    ], f"results.py was changed: {AGAIN}"


@pytest.mark.processes
def test_the_committed_outputs_are_those_of_a_run_from_top_to_bottom(executed):
    assert markdown(executed) == markdown(COMMITTED), f"results/ has changed: {AGAIN}"
    assert len(pictures(executed)) == len(pictures(COMMITTED)) > 0


@pytest.mark.parametrize("name", sorted(set(tables.TABLES) - {"standin_short", "unhedged_short"}))
def test_every_table_is_there(name):
    table, _ = tables.TABLES[name]
    assert any(table() in shown for shown in markdown(COMMITTED)), AGAIN


def test_a_changed_result_would_be_seen(tmp_path, monkeypatch):
    results = tables.read("toy/sampled.json")
    results["runs"][0]["fvu"] += 0.5
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "sampled.json").write_text(json.dumps(results))
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)
    assert not any(tables.toy() in shown for shown in markdown(COMMITTED))


def test_figures_are_pictures_and_the_file_is_small():
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(COMMITTED))
    assert make_results.NOTEBOOK.stat().st_size < 1_000_000


def test_nothing_of_the_machine_is_in_it():
    assert {output["output_type"] for output in outputs(COMMITTED)} == {"display_data"}
    text = "\n".join([*markdown(COMMITTED), *(cell["source"] for cell in COMMITTED["cells"])])
    text += json.dumps(COMMITTED["metadata"])
    assert not re.search(
        r"(?<![\w.])/(tmp|home|root|usr|work|Users)/|site-packages|Traceback", text
    )


FILES = [
    *(f"toy/{file}.json" for file in tables.RECIPES.values()),
    *(f"trees/{name}_{every}.json" for name in tables.TREES for every in (0, 100)),
    "ablation/ablation.json",
    language_model.TRAINING,
]


def program_of(name):
    programs = {"ablation": "-m studies.ablate_toy", "standin": "train_tinystories.py"}
    return programs.get(name.split("/")[0], "train_toy.py")


@pytest.mark.parametrize("name", FILES)
def test_each_command_shown_gives_the_settings_of_its_file(name):
    """Those that have a meaning today, but for where files are and who shares the work."""
    program = program_of(name)
    checked = 0
    for source in tables.read(name)["sources"]:
        shown = showing.command(source["config"], program)
        assert any(f"- `{shown}`" in text for text in markdown(COMMITTED)), AGAIN
        flags = shlex.split(shown.removeprefix(f"python {program}"))
        config = vars(parse(showing.CONFIGS[program], "", flags))
        assert (tables.ROOT / config.get("tree", "tree.json")).is_file(), shown
        recorded = showing.with_todays_names(source["config"], program)
        for key in recorded.keys() & config.keys() - showing.NOT_SHOWN - {"n_latents"}:
            assert showing.list_of(config[key]) == recorded[key], (name, key)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("name", FILES)
def test_no_recorded_setting_is_forgotten(name):
    """A setting without a name today would be left out of the command in silence."""
    program = program_of(name)
    for source in tables.read(name)["sources"]:
        recorded = showing.with_todays_names(source["config"], program)
        assert recorded.keys() <= showing.CONFIGS[program].__dataclass_fields__.keys()


def test_flags_are_written_as_the_command_line_takes_them():
    assert showing.flag("refit", True) == "--refit"
    assert showing.flag("refit", False) == "--no-refit"
    assert showing.flag("target_l0", 1.5) == "--target-l0 1.5"
    assert showing.flag("restart_window", [0.25, 0.75]) == "--restart-window 0.25 0.75"


def test_what_is_missing_is_said_in_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)
    for shown in (
        showing.or_absence(tables.toy),
        showing.made_by("toy/sampled.json", "train_toy.py"),
        showing.measured_by("step"),
    ):
        assert re.match(r"\*results/\S+ is not there", shown)


def test_stand_in_tables_are_the_evaluations_numbers():
    stand_in = language_model.StandIn()
    lines = stand_in.by_prefix().splitlines()[2:]
    for line, runs in zip(lines, stand_in.runs.values(), strict=True):
        assert line.rstrip(" |").endswith(kept_results.spread([run["fvu"] for run in runs], 3))
    n_kinds = len(stand_in.runs)
    for concept, line in enumerate(stand_in.concepts().splitlines()[2:]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for runs, cell in zip(stand_in.runs.values(), cells[-n_kinds:], strict=True):
            rates = [run["concepts"][concept]["absorption"] for run in runs]
            known = [rate for rate in rates if rate is not None]
            assert cell == (f"{100 * sum(known) / len(known):.0f}%" if known else "-")
    seeds = zip(*stand_in.runs.values(), strict=True)
    best = [min(runs, key=lambda run: run["fvu"])["sae"] for runs in seeds]
    for sae in best:
        assert f"{sae} in **{best.count(sae)} of {len(best)}**" in stand_in.better()


def test_predicted_cosines_are_those_of_the_text():
    text = Path(make_results.SOURCE).read_text()
    for cosine in (figures.ABSORBED, figures.HEDGED_PARENT, figures.HEDGED_CHILD):
        assert f"{cosine:.3f}" in text


# ------------------------------------------------------------------------------------- the figures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a figure and returns it: drawn(figures.speed) -> matplotlib's Figure."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "write", lambda path, figure: kept.append(figure))

    def draw(function, *args):
        function(tmp_path / "figure.png", *args)
        kept[-1].canvas.draw()
        return kept[-1]

    return draw


def test_no_line_runs_through_the_labels_of_the_speed_figure(drawn):
    axes = drawn(figures.speed).axes[0]
    times = [text for text in axes.texts if text.get_text().endswith(" ms")]
    assert len(times) > 4
    (line,) = (line for line in axes.lines if line.get_linestyle() == ":")
    for text in times:  # drawn later than the line, on white
        assert text.get_zorder() > line.get_zorder()
        assert text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1)


def test_logarithmic_axes_have_labelled_ticks(drawn):
    toy = tables.read("toy/sampled.json")
    for figure in (drawn(figures.speed), drawn(figures.cosines, toy)):
        axes = [ax for ax in figure.axes if ax.get_yscale() == "log"]
        assert axes
        for ax in axes:
            low, high = ax.get_ylim()
            assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 3


def test_no_line_of_the_thresholds_figure_hides_another(drawn):
    """A panel a stage: its curves are apart somewhere in the middle of what is drawn."""
    toy = tables.read("toy/sampled.json")
    panels = drawn(figures.clean_by_threshold, toy).axes
    assert len(panels) == len(toy_tables.REFITS)
    for panel in panels:
        curves = [line.get_ydata() for line in panel.lines if len(line.get_ydata()) > 2]
        assert len(curves) == len(tables.kinds_of(toy))
        for i, one in enumerate(curves):
            assert all(abs(one - other).max() > 1 for other in curves[:i])


def test_curves_are_what_the_cosines_say(drawn):
    toy = tables.read("toy/sampled.json")
    for panel, how in zip(
        drawn(figures.clean_by_threshold, toy).axes, toy_tables.REFITS, strict=True
    ):
        for line, sae in zip(panel.lines, figures.kinds_in(toy), strict=False):
            runs = tables.runs_of(toy, sae + how)
            at = abs(line.get_xdata() - 0.95).argmin()
            clean = [run["clean_at"]["0.95"] for run in runs]
            assert line.get_ydata()[at] == pytest.approx(sum(clean) / len(clean), abs=0.3)


def test_figures_take_whatever_kinds_there_are(drawn):
    toy = tables.read("toy/sampled.json")
    renamed = [run | {"sae": run["sae"].replace("vanilla", "another")} for run in toy["runs"]]
    third = [run | {"sae": "a third"} for run in tables.runs_of(toy, "vanilla")]
    refits = [run | {"sae": f"a third{how}"} for run in third for how in toy_tables.REFITS]
    results = toy | {"runs": renamed + refits}
    assert len(drawn(figures.cosines, results).axes) == 3 * 3
    (legend,) = drawn(figures.clean_by_threshold, results).legends
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == 3
