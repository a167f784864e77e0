"""The synthetic models on Modal, tried without it: what it is asked for, and every body here."""

import ast
import json
import tomllib
from pathlib import Path

import modal
import pytest
from packaging.requirements import Requirement
from synth_factory import SIZE, write_samples

from matryoshka.errors import UserError
from matryoshka.modal_calls import here
from studies import modal_synth, synth_data, synth_peers

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


def begin_here(function, *args):
    """In place of a container: the body, now."""
    outcome = here(function, *args)
    return lambda: outcome


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A folder in the Volume's place, with the samples of a small `mini` on it."""
    monkeypatch.setitem(synth_data.SIZES, "mini", SIZE)
    monkeypatch.setattr(modal_synth, "ROOT", str(tmp_path / "volume"))
    write_samples(tmp_path / "volume" / "mini" / "data")
    return tmp_path / "volume"


def test_every_body_runs_and_the_results_are_those_of_all_seeds(volume, tmp_path, monkeypatch):
    peers = {"sources": [{"source": "synth_saelens"}], "runs": [{"sae": "any"}]}
    monkeypatch.setattr(synth_peers, "run", lambda config, on_done: peers | {"seeds": config.seeds})
    written = modal_synth.study("mini", 2, tmp_path / "out", begin_here)
    assert [path.name for path in written] == ["mini.json", "mini_saelens.json"]
    ours, theirs = (json.loads(path.read_text()) for path in written)
    assert [run["seed"] for run in ours["runs"]] == [0] * 12 + [1] * 12
    assert len(ours["sources"]) == 2
    assert theirs == peers


def test_a_part_that_fails_is_one_line_and_writes_nothing(volume, tmp_path):
    (volume / "mini" / "data" / "truth.safetensors").write_text("damaged")
    with pytest.raises(UserError, match="or damaged"):
        modal_synth.study("mini", 1, tmp_path / "out", begin_here)
    assert not (tmp_path / "out").exists()


def test_gpus_and_no_idle_containers():
    for function in (modal_synth.sample, modal_synth.train_ours, modal_synth.train_peers):
        assert isinstance(function, modal.Function)
    assert modal_synth.on_a_gpu["gpu"] == "H100"
    assert modal_synth.on_a_gpu["single_use_containers"]


def test_the_image_holds_every_module_that_is_imported():
    needed, todo = set(), ["studies.modal_synth"]
    while todo:
        tree = ast.parse((ROOT / f"{todo.pop().replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            new = {n for n in names if (ROOT / f"{n.replace('.', '/')}.py").exists()} - needed
            needed |= new
            todo += new
    assert {name.split(".")[0] for name in needed} <= {*modal_synth.MODULES, "toy_model"}


def test_versions_in_the_image_are_those_that_the_project_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["peers"]]
    allowed = {needed.name: needed.specifier for needed in map(Requirement, every)}
    for pin in map(Requirement, modal_synth.REQUIREMENTS):
        (version,) = [spec.version for spec in pin.specifier]
        assert version in allowed[pin.name], pin


def test_the_estimate_is_what_the_docstring_says():
    size = synth_data.SIZES["16k"]
    parts = modal_synth.estimate(
        size.n_steps, size.n_latents, size.d_model, size.batch_size, size.n_samples, seeds=3
    )
    assert round(parts["sampling"] + parts["ours"] + parts["saelens"]) == 9
    assert parts["sampling"] + max(parts["ours"] / 3, parts["saelens"]) == pytest.approx(3.5, 0.1)
    assert round(parts["bytes"] / 1e9) == 32
    for words in ("about\n9 hours", "3.5 hours from start to end", "32 GB"):
        assert words in modal_synth.__doc__
