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

import report
import script

sys.path.insert(0, str(report.ROOT / "notebooks"))

import make_results
import parts

COMMITTED = nbformat.read(make_results.NOTEBOOK, as_version=4)


def outputs(notebook) -> list:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def tables(notebook) -> list[str]:
    """Every Markdown output: tables, and sentences with numbers in them."""
    return [o["data"]["text/markdown"] for o in outputs(notebook) if "text/markdown" in o["data"]]


def pictures(notebook) -> list[bytes]:
    found = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o["data"]]
    return [base64.b64decode(picture) for picture in found]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The committed notebook, run in a copy of what it needs."""
    copy = tmp_path_factory.mktemp("repository")
    for file in (*report.ROOT.glob("*.py"), *report.ROOT.glob("*.json")):
        shutil.copy(file, copy)
    for folder in ("notebooks", "results", "trees"):
        shutil.copytree(report.ROOT / folder, copy / folder)
    return make_results.executed(COMMITTED, copy / "notebooks")


def test_the_committed_cells_are_the_source():
    source = make_results.unexecuted(make_results.SOURCE.read_text())
    assert [(c["cell_type"], c["source"]) for c in COMMITTED["cells"]] == [
        (c["cell_type"], c["source"]) for c in source["cells"]
    ], "results.py was changed: python notebooks/make_results.py"


def test_the_committed_outputs_are_those_of_a_run_from_top_to_bottom(executed):
    assert tables(executed) == tables(COMMITTED), (
        "results/ has changed: python notebooks/make_results.py"
    )
    assert len(pictures(executed)) == len(pictures(COMMITTED)) > 0


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_of_report_is_there(name):
    assert any(report.TABLES[name]() in shown for shown in tables(COMMITTED))


def test_a_changed_result_would_be_seen(tmp_path, monkeypatch):
    results = report.read("toy/results.json")
    results["runs"][0]["fvu"] += 0.5
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert not any(report.toy() in shown for shown in tables(COMMITTED))


def test_figures_are_pictures_and_the_file_is_small():
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(COMMITTED))
    assert make_results.NOTEBOOK.stat().st_size < 1_000_000


def test_nothing_of_the_machine_is_in_it():
    assert {output["output_type"] for output in outputs(COMMITTED)} == {"display_data"}
    text = "\n".join([*tables(COMMITTED), *(cell["source"] for cell in COMMITTED["cells"])])
    text += json.dumps(COMMITTED["metadata"])
    assert not re.search(
        r"(?<![\w.])/(tmp|home|root|usr|work|Users)/|site-packages|Traceback", text
    )


def test_each_command_shown_gives_the_settings_of_its_file():
    shown = set(
        re.findall(r"`results/(\S+)`: `python (\S+\.py)(.*?)`", "\n".join(tables(COMMITTED)))
    )
    checked = 0
    for name, program, flags in shown:
        if program in parts.CONFIGS:
            config = vars(script.parse(parts.CONFIGS[program], "", shlex.split(flags)))
            recorded = report.read(name)["config"]
            for key in set(recorded) - parts.NOT_SHOWN - {"n_latents"}:
                assert config[key] == recorded[key], (name, key)
            checked += 1
    assert checked >= 10


def test_stand_in_tables_are_the_evaluations_numbers():
    stand_in = parts.StandIn()
    lines = stand_in.by_prefix().splitlines()[2:]
    for line, runs in zip(lines, stand_in.runs.values(), strict=True):
        assert line.rstrip(" |").endswith(report.spread([run["fvu"] for run in runs], 3))
    for concept, line in enumerate(stand_in.concepts().splitlines()[2:]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for runs, cell in zip(stand_in.runs.values(), cells[-2:], strict=True):
            rates = [run["concepts"][concept]["absorption"] for run in runs]
            known = [rate for rate in rates if rate is not None]
            assert cell == (f"{100 * sum(known) / len(known):.0f}%" if known else "-")


def test_predicted_cosines_are_those_of_the_text():
    text = Path(make_results.SOURCE).read_text()
    for cosine in (parts.ABSORBED, parts.HEDGED_PARENT, parts.HEDGED_CHILD):
        assert f"{cosine:.3f}" in text
