"""The folder of train_toy.py: whose it is, and what is in it whatever stops the script."""

import dataclasses
import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from toy_commands import (
    SHORT,
    blank_figures,
    figures,
    is_running,
    short_run_in,
    started,
    wait_for_training,
)

import train_toy
from matryoshka.errors import Interrupted, UserError
from matryoshka.files import one_writer
from matryoshka.trainer import Trainer
from sae import SAE
from train_toy import Config


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(train_toy, "draw", blank_figures)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, which nobody may change."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "draw", blank_figures)
        short_run_in(out)
    return out


def test_the_same_settings_run_again_and_say_so(tmp_path, capsys):
    first = short_run_in(tmp_path)
    capsys.readouterr()
    again = short_run_in(tmp_path, workers=2)  # which changes no figure
    assert capsys.readouterr().err.startswith(f"{tmp_path} holds a run of these settings")
    assert figures(first) == figures(again)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_steps": 31}, "holds a run with --n-steps 30, not --n-steps 31"),
        ({"seeds": 2}, "holds a run with --seeds 1, not --seeds 2"),
        ({"betas": (0.5, 0.9)}, "holds a run with --betas 0.5 0.9375, not --betas 0.5 0.9"),
        ({"refit": True}, "holds a run with --refit False, not --refit True"),
    ],
)
def test_a_run_of_other_settings_is_not_overwritten(finished, settings, said):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(UserError, match=f"{said}: choose another --out, or add --overwrite"):
        short_run_in(finished, **settings)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_overwrite_leaves_nothing_of_the_run_that_was_there(tmp_path):
    short_run_in(tmp_path, seeds=3, refit=True)
    assert (tmp_path / "seeds.png").exists()
    (tmp_path / "notes.txt").write_text("mine")
    short_run_in(tmp_path, seeds=1, seed=7, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "notes.txt",
        "results.json",
        "matryoshka_seed7.safetensors",
        "vanilla_seed7.safetensors",
        "activations.png",
        "curves.png",
        "decoder_cosines.png",
        "encoder_cosines.png",
    }


@pytest.mark.parametrize("content", ["precious", "{}", "[1]", '{"config": 3}', "\x00"])
def test_a_results_file_of_something_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json was not written by this script: choose"):
        short_run_in(tmp_path)
    assert (tmp_path / "results.json").read_text() == content
    short_run_in(tmp_path, overwrite=True)


def test_the_results_of_an_earlier_version_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"config": {"steps": 40000}}')
    with pytest.raises(UserError, match="holds a run of an earlier version, not --n-steps 30"):
        short_run_in(tmp_path)


def test_saes_of_an_unknown_run_are_not_overwritten(tmp_path):
    (tmp_path / "matryoshka_seed0.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"holds SAEs, and no results\.json that says what they"):
        short_run_in(tmp_path)
    assert (tmp_path / "matryoshka_seed0.safetensors").read_text() == "precious"


def test_a_folder_has_one_writer(tmp_path):
    with one_writer(tmp_path), pytest.raises(UserError, match="another process is writing there"):
        short_run_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "name", ["results.json", "vanilla_seed1.safetensors", "activations.png", "seeds.png"]
)
def test_a_folder_in_the_place_of_a_file_is_named_before_training(tmp_path, name):
    (tmp_path / name).mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{name} is a folder"):
            train_toy.run(Config(out=str(tmp_path), seeds=2, overwrite=overwrite))  # in full


def test_a_full_disk_is_one_line_after_the_results_were_printed(tmp_path, monkeypatch, capsys):
    def full(self: SAE, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SAE, "save", full)
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(["--steps=20", "--n-eval=500", f"--out={tmp_path}", "--workers=1"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "| matryoshka |" in printed.out
    last = printed.err.splitlines()[-1]
    assert last == (
        f"error: cannot write {tmp_path}/.new/matryoshka_seed0.safetensors "
        "(No space left on device)"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_the_earlier_run_whole(tmp_path, monkeypatch, overwrite):
    short_run_in(tmp_path, seeds=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, value: object) -> None:
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr(train_toy, "write_json", full)  # the last file
    with pytest.raises(UserError, match="cannot write"):
        short_run_in(tmp_path, seeds=1 if overwrite else 2, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_is_half_in_place_has_every_sae_and_no_results(tmp_path, monkeypatch):
    """For results.json would be of other SAEs than those beside it."""
    short_run_in(tmp_path, seeds=2)
    saes = {path.name for path in tmp_path.glob("*.safetensors")}
    replace, moved = os.replace, []

    def second_move_fails(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path:
            moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_move_fails)
    with pytest.raises(KeyboardInterrupt):
        short_run_in(tmp_path, seeds=2)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == saes
    assert not (tmp_path / "results.json").exists()


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "vanilla_seed9.safetensors").write_text("half")
    short_run_in(tmp_path)
    assert not (tmp_path / ".new").exists()
    assert not (tmp_path / "vanilla_seed9.safetensors").exists()


# ---------------------------------------------------------------------------------- interruptions


def test_ctrl_c_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    """The first stack is done when the interrupt comes; its SAEs and figures are written."""
    train_stacks = train_toy.train_stacks

    def interrupted(config, *rest):
        yield from train_stacks(dataclasses.replace(config, seeds=2), *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_toy, "train_stacks", interrupted)
    flags = {"seeds": 4, "out": tmp_path, **SHORT}
    with pytest.raises(SystemExit) as stopped:
        train_toy.main([f"--{k.replace('_', '-')}={v}" for k, v in flags.items()])
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert f"interrupted: 2 of 4 seeds are finished, in {tmp_path}" in printed.err
    assert not printed.out
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


TRAIN_STACKS = train_toy.train_stacks


def first_stack_then(stop: BaseException, seeds: int = 1):
    """`train_stacks` that is stopped when the first of its seeds are done."""

    def stopped(config, *rest):
        yield from TRAIN_STACKS(dataclasses.replace(config, seeds=seeds), *rest)
        raise stop

    return stopped


def test_ctrl_c_keeps_an_earlier_run_that_has_more(tmp_path, monkeypatch):
    short_run_in(tmp_path, seeds=3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(train_toy, "train_stacks", first_stack_then(KeyboardInterrupt()))
    said = "1 of 3 seeds are finished; the earlier run, which has more, is still in"
    with pytest.raises(Interrupted, match=said):
        short_run_in(tmp_path, seeds=3)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(Interrupted, match="1 of 3 seeds are finished, in"):
        short_run_in(tmp_path, seeds=3, overwrite=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_interrupted_run_takes_the_place_of_one_that_has_fewer(tmp_path, monkeypatch):
    for seeds in (1, 2, 2):
        stopped = first_stack_then(KeyboardInterrupt(), seeds)
        monkeypatch.setattr(train_toy, "train_stacks", stopped)
        with pytest.raises(Interrupted, match=f"{seeds} of 3 seeds are finished, in"):
            short_run_in(tmp_path, seeds=3)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2 * seeds


def test_a_stack_that_fails_does_not_take_the_finished_ones_away(tmp_path, monkeypatch):
    error = UserError("step 7: no number")
    monkeypatch.setattr(train_toy, "train_stacks", first_stack_then(error))
    with pytest.raises(UserError, match=r"step 7: no number \(1 of 3 seeds are finished, in"):
        short_run_in(tmp_path, seeds=3)
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2


class Killed(Trainer):
    """Whose process is killed, as one is that takes too much memory."""

    def step(self, x):
        os._exit(9)


@pytest.mark.processes
def test_a_worker_that_is_killed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a worker process was killed, .* try fewer --workers"):
        train_toy.run(Config(out=str(tmp_path), **{**SHORT, "seeds": 2, "workers": 2}), Killed)


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


FOR_EVER = ("--workers", 2, "--steps", 10**9)  # the first figures come in an hour


@pytest.mark.processes
@pytest.mark.parametrize("seeds", [1, 2])
def test_ctrl_c_stops_every_process_at_once(tmp_path, notes, seeds):
    out = tmp_path / "out"
    with started(notes, *FOR_EVER, "--seeds", seeds, "--out", out) as process:
        wait_for_training(process, notes, seeds)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted: 0 of" in err
    assert "Traceback" not in err
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to look into")
def test_workers_end_with_a_parent_that_is_killed(tmp_path, notes):
    with started(notes, *FOR_EVER, "--seeds", 2, "--out", tmp_path / "out") as process:
        workers = wait_for_training(process, notes, 2)
        assert all(map(is_running, workers))
        process.kill()
        deadline = time.monotonic() + 300
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
