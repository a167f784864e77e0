"""A training's folder: whose it is, what is in it, and whether that is all."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from training_cases import (
    N_TOKENS,
    config_for,
    contents,
    empty,
    kill,
    refused,
    resumed,
    write_cache,
)

from matryoshka import run_folder
from matryoshka.errors import UserError
from matryoshka.files import one_writer
from matryoshka.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", N_TOKENS)


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("nothing is to be trained here")

    monkeypatch.setattr(Training, "step", never)


@pytest.fixture(scope="module")
def unfinished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, killed after its second checkpoint."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    kill(config_for(cache, out), "step", 40)
    return out


@pytest.fixture
def stopped_run(unfinished: Path, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    shutil.copytree(unfinished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.usefixtures("no_steps")
def test_one_folder_has_one_run_at_a_time(
    cache: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(stopped_run)
    with one_writer(stopped_run):
        said = refused(resumed(config_for(cache, stopped_run)), capsys)
    assert f"--out {stopped_run}: another process is writing there" in said
    assert contents(stopped_run) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"saes": ("vanilla",)}, "--saes matryoshka vanilla, not vanilla"),
        ({"n_latents": 21}, "--n-latents 20, not 21"),
        ({"n_prefixes": 4}, "--n-prefixes 3, not 4"),
        ({"target_l0": 4.0}, "--target-l0 3.0, not 4.0"),
        ({"lr": 1e-3}, "--lr 0.003, not 0.001"),
        ({"n_steps": 60}, "--n-steps 50, not 60"),
        ({"batch_size": 64}, "--batch-size 128, not 64"),
        ({"sparsity": "log"}, "--sparsity l1, not log"),
        ({"sparsity_weight": 1.0}, "--sparsity-weight 1.2, not 1.0"),
        ({"gradient": "dense"}, "--gradient auto, not dense"),
        ({"seed": 1}, "--seed 0, not 1"),
    ],
)
@pytest.mark.usefixtures("no_steps")
def test_a_checkpoint_of_other_settings_is_refused(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    named: str,
) -> None:
    before = contents(stopped_run)
    config = resumed(config_for(cache, stopped_run, **change))
    assert named in refused(config, capsys)
    assert contents(stopped_run) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(
    cache: Path, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped_run / "checkpoint.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    older = json.loads(metadata["config"])
    del older["matmul_dtype"], older["gradient"]
    metadata["config"] = json.dumps(older)
    safetensors.torch.save_file(tensors, path, metadata)
    said = refused(resumed(config_for(cache, stopped_run)), capsys)
    assert "earlier version, which had no --gradient" in said


@pytest.mark.parametrize("damage", [Path.unlink, empty])
@pytest.mark.usefixtures("no_steps")
def test_metrics_shorter_than_at_the_checkpoint_are_refused(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    damage(stopped_run / "metrics.jsonl")
    before = contents(stopped_run)
    assert "metrics.jsonl" in refused(resumed(config_for(cache, stopped_run)), capsys)
    assert contents(stopped_run) == before


LEFT_BEHIND = (
    *("checkpoint.safetensors", "results.json", "metrics.jsonl", "evaluation.json"),
    *("vanilla.safetensors", "of_my_own.safetensors", "refit"),
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.usefixtures("no_steps")
def test_what_another_run_left_is_not_taken_for_this_ones(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, resume: bool
) -> None:
    """An older vanilla.safetensors would be scored as this run's: the folder is refused."""
    if name == "refit":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    said = refused(config_for(cache, tmp_path, resume=resume), capsys)
    assert str(tmp_path) in said
    if name not in ("checkpoint.safetensors", "results.json"):
        assert f"holds {name}, of a run without a checkpoint: move these away" in said
    assert contents(tmp_path) == before


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def foreign(path: Path) -> None:
    """As long as it was, and another script's, or of another run."""
    text = json.dumps({"config": {"target_l0": 0}, "runs": [{"sae": "x", "best": 1}]})
    path.write_text((text + "\n") * 1_000)


def cut_short(path: Path) -> None:
    path.write_text('{"config": {"sa')


def a_list(path: Path) -> None:
    path.write_text("[1]")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" * 50_000)


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("results.json", [cut_short, a_list, foreign, binary, nested, a_folder]),
        ("metrics.jsonl", [foreign, binary, nested, a_folder, cut_short]),
        ("checkpoint.safetensors", [foreign, binary, a_folder]),
    ],
)
@pytest.mark.usefixtures("no_steps")
def test_a_file_that_is_not_the_runs_is_named(
    cache: Path,
    stopped_run: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damages: list[Callable[[Path], None]],
) -> None:
    for damage in damages:
        damage(stopped_run / name)
        before = contents(stopped_run)
        assert str(stopped_run / name) in refused(resumed(config_for(cache, stopped_run)), capsys)
        assert contents(stopped_run) == before
        if (stopped_run / name).is_dir():
            (stopped_run / name).rmdir()


def test_what_is_lacking_is_named(tmp_path: Path) -> None:
    """A file is lacking where it is not there, or is not the one that results.json has."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    runs = [
        {"sae": "a", "file_sha256": hashlib.sha256(b"a").hexdigest()},
        {"sae": "b", "file_sha256": hashlib.sha256(b"another").hexdigest()},
        {"sae": "c"},  # as an earlier version recorded it
        {"sae": "d", "file_sha256": "0"},
    ]
    missing = ["b.safetensors", "d.safetensors"]
    assert run_folder.lacking(tmp_path, {"runs": runs}, False) == missing
    both = {"sae": "a", "file_sha256": runs[0]["file_sha256"]}
    assert run_folder.lacking(tmp_path, {"runs": [both]}, True) == ["refit/a.safetensors"]
    (tmp_path / "refit").mkdir()
    (tmp_path / "refit" / "a.safetensors").write_text("refitted")
    assert run_folder.lacking(tmp_path, {"runs": [both]}, True) == []


def test_only_what_is_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "refit").mkdir()
    kept = ["a.safetensors", "checkpoint.safetensors", ".lock", ".other.safetensors.1.part"]
    gone = [
        *(".checkpoint.safetensors.x.safetensors", ".results.json.x.json"),
        *(".a.safetensors.7.part", "refit/.a.safetensors.7.part"),
    ]
    for name in (*kept, *gone):
        (tmp_path / name).write_text("")
    (tmp_path / ".a.safetensors.folder").mkdir()
    run_folder.clear_leftovers(tmp_path, ["a"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {*kept, "refit", ".a.safetensors.folder"}


@pytest.mark.parametrize("n_bytes", [0, 5, 10])
def test_metrics_are_cut_to_what_they_were(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("0123456789")
    run_folder.cut_metrics(path, n_bytes)
    assert path.read_text() == "0123456789"[:n_bytes]
    path.unlink()
    run_folder.cut_metrics(path, 0)
    assert path.read_text() == ""
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"cannot write {path}"):
        run_folder.cut_metrics(path, 0)


def test_the_first_setting_that_differs_is_named_as_the_command_line_has_it(
    tmp_path: Path,
) -> None:
    saved = {"out": "x", "n_latents": 3, "saes": ["a", "b"], "lr": 0.1}
    run_folder.require_same(saved | {"out": "y", "resume": True}, saved, tmp_path)
    with pytest.raises(UserError, match=r"with --saes a b, not b: ask for that"):
        run_folder.require_same(saved | {"saes": ["b"], "lr": 0.2}, saved, tmp_path)
    with pytest.raises(UserError, match=r"an earlier version, which had no --batch-size"):
        run_folder.require_same(saved | {"batch_size": 3}, saved, tmp_path)


def test_an_sae_of_any_name_makes_a_folder_taken(tmp_path: Path) -> None:
    for name in ("mine.safetensors", ".mine.safetensors.7.part", "notes.txt"):
        (tmp_path / name).write_text("")
    assert run_folder.files_of_runs(tmp_path) == ["mine.safetensors"]


def test_the_last_record_of_each_sae_is_found(tmp_path: Path) -> None:
    """Whatever their order, and of the first bytes alone where it is asked for; no SAE but the
    run's may have one."""
    path = tmp_path / "metrics.jsonl"
    records = [
        {"sae": name, "fvu": 0.5, "step": step}
        for name, step in (("a", 2), ("b", 2), ("b", 4), ("a", 4), ("a", 6))  # b is dropped
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines))
    assert run_folder.last_records(path, ["a", "b"]) == {"a": records[4], "b": records[2]}
    assert run_folder.last_records(path, ["a", "b", "c"]).keys() == {"a", "b"}
    n_bytes = sum(map(len, lines[:3]))
    assert run_folder.last_records(path, ["a", "b"], n_bytes) == {"a": records[0], "b": records[2]}
    assert run_folder.last_records(path, ["a", "b"], 0) == {}
    with pytest.raises(UserError, match="line 2 is of another SAE"):
        run_folder.last_records(path, ["a"])
    with pytest.raises(UserError, match="shorter than it was at the checkpoint"):
        run_folder.last_records(path, ["a", "b"], sum(map(len, lines)) + 1)
