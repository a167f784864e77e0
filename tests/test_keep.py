"""What is worth keeping of runs: everything, but for the machine's paths and a count a latent."""

import json

import pytest

from matryoshka import files
from matryoshka.errors import UserError
from studies import keep


def run_folder(path, content, file="results.json"):
    path.mkdir(parents=True)
    (path / file).write_text(json.dumps(content))
    return path


def test_a_file_is_kept_whole(tmp_path):
    runs = [{"sae": "a", "seed": 0, "fvu": 0.1}, {"sae": "b", "seed": 0, "fvu": [0.25, None]}]
    content = {"config": {"lr": 0.03}, "environment": {"torch": "2"}, "seconds": 1.5}
    folder = run_folder(tmp_path / "toy", {**content, "runs": runs})
    kept = keep.keep([folder], "results.json")
    assert kept["sources"] == [{"source": "toy", **content}]
    assert kept["runs"] == [{"source": "toy", **run} for run in runs]


def test_several_files_keep_their_order_and_are_told_apart(tmp_path):
    names = ["b_seed0", "a_seed1", "a_seed1/refit"]
    folders = []
    for name in names:
        runs = [{"sae": sae, "fvu": 0.5} for sae in "xy"]
        folders.append(run_folder(tmp_path / "runs" / name, {"at": name[:7], "runs": runs}))
    kept = keep.keep(folders, "results.json")
    assert [source["source"] for source in kept["sources"]] == names
    assert [run["source"] for run in kept["runs"]] == [name for name in names for _ in range(2)]
    assert [source["at"] for source in kept["sources"]] == [name[:7] for name in names]


def test_a_folder_has_the_same_name_however_it_is_spelled(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "runs" / "toy", {"runs": [{"sae": "a"}]})
    monkeypatch.chdir(folder)
    for spelled in (folder, folder / ".", keep.Path(), keep.Path("../toy")):
        assert keep.keep([spelled], "results.json")["runs"][0]["source"] == "toy"


def test_no_path_of_the_machine_is_kept(tmp_path):
    content = {
        "config": {"out": str(tmp_path / "deep" / "toy"), "cache": "~/cache/train", "n": 3},
        "of": ["../there/x.pt", {"file": "a/b/c.safetensors"}, "./d"],
        "runs": [{"sae": "a", "file": str(tmp_path / "sae.safetensors")}],
    }
    kept = keep.keep([run_folder(tmp_path / "deep" / "toy", content)], "results.json")
    assert kept["sources"][0]["config"] == {"out": "toy", "cache": "train", "n": 3}
    assert kept["sources"][0]["of"] == ["x.pt", {"file": "c.safetensors"}, "d"]
    assert kept["runs"][0]["file"] == "sae.safetensors"
    assert str(tmp_path) not in json.dumps(kept)


@pytest.mark.parametrize("text", ["noanabeshima/tiny_model", "a sentence / with / slashes", "l1"])
def test_what_is_no_path_stays(text):
    assert files.without_paths({"x": [text]}) == {"x": [text]}


def test_the_command_writes_a_line_a_run(tmp_path, capsys):
    runs = [{"sae": "a", "best_cosine": [0.5] * 20, "seed": seed} for seed in range(5)]
    folder = run_folder(tmp_path / "toy", {"seconds": 1, "runs": runs}, "evaluation.json")
    target = tmp_path / "results" / "toy" / "kept.json"
    keep.main(["--runs", str(folder), "--file", "evaluation.json", "--to", str(target)])
    assert len(target.read_text().splitlines()) == 5 + 7  # braces, and the heads of two lists
    assert json.loads(target.read_text()) == keep.keep([folder], "evaluation.json")
    assert "runs 5, from files 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "cannot be kept"), ("[]", "must hold an object")],
)
def test_what_holds_no_results_is_refused_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "toy").mkdir()
    if content is not None:
        (tmp_path / "toy" / "results.json").write_text(content)
    target = tmp_path / "kept.json"
    with pytest.raises(SystemExit) as stop:
        keep.main(["--runs", str(tmp_path / "toy"), "--to", str(target)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert "results.json" in error
    assert len(error.splitlines()) == 1
    assert not target.exists()


def test_a_folder_named_twice_is_refused(tmp_path):
    folder = run_folder(tmp_path / "toy", {"runs": []})
    with pytest.raises(UserError, match="twice"):
        keep.keep([folder, folder / "."], "results.json")


def test_folders_that_share_nothing_are_refused():
    with pytest.raises(UserError, match="must lie in one"):
        keep.short_names([keep.Path("/a/toy"), keep.Path("/b/toy")])
