"""The script itself: a short run end to end, its files, its refusals, its repeatability."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_toy
from matryoshka import metrics
from matryoshka.errors import Interrupted, UserError
from matryoshka.files import one_writer
from matryoshka.kinds import KINDS
from matryoshka.toy_stack import REFITS
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE
from toy_model import ToyData
from train_toy import Config

ROOT = Path(__file__).parents[1]
SHORT: dict[str, Any] = {"n_steps": 120, "batch_size": 50, "n_eval": 2_000, "workers": 1}


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "train_toy.py"), *map(str, args)]


def cli(*args: object, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*args), cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs
    )


@contextlib.contextmanager
def started(*args: object) -> Iterator["subprocess.Popen[str]"]:
    """The script in a group of processes of its own, of which none outlives the test."""
    process = subprocess.Popen(
        command(*args), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until_training(process: "subprocess.Popen[str]") -> None:
    """Reads stderr until the bar shows that every SAE is trained."""
    assert process.stderr is not None
    seen = ""
    while seen.count("FVU") < 2:
        character = process.stderr.read(1)
        assert character, f"it ended: {seen}"
        seen += character


def short_run_in(out: Path, **settings: Any) -> dict[str, Any]:
    return train_toy.run(Config(out=str(out), **(SHORT | settings)))


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must repeat: everything but the time and where it was written."""
    return [dict(run) for run in results["runs"]]


# ---------------------------------------------------------------------------------------- settings


def test_the_defaults_are_the_write_ups():
    """Other numbers here would be another experiment under the same name."""
    assert dataclasses.asdict(Config()) == {
        "n_steps": 40_000,
        "target_l0": 1.2338,
        "n_prefixes": 10,
        "prefixes": "sampled",
        "sparsity": "l1",
        "sparsity_weight": 0.2,
        "sparsity_warmup": 0.2,
        "l0_control": "original",
        "lr": 0.03,
        "lr_warmup_steps": 100,
        "lr_decay": 0.2,
        "lr_end": 0.1,
        "betas": (0.5, 0.9375),
        "max_grad_norm": 1.0,
        "norm_decay": 0.99,
        "order_decay": 0.95,
        "restart_every": 0,
        "restart_window": (0.2, 0.8),
        "gradient": "auto",
        "matmul_dtype": "float32",
        "seeds": 1,
        "seed": 0,
        "saes": ("matryoshka", "vanilla"),
        "batch_size": 200,
        "n_latents": 0,
        "d_model": 20,
        "tree": "tree.json",
        "refit": False,
        "threshold": 0.9,
        "n_eval": 50_000,
        "out": "runs/toy",
        "overwrite": False,
        "device": "cpu",
        "workers": 0,
    }
    filled_in = train_toy.check(Config(), train_toy.load_tree("tree.json"))
    assert filled_in.n_latents == 20
    assert train_toy.SEEDS_A_STACK == 10


def test_help_names_every_flag_with_its_default():
    text = " ".join(cli("--help").stdout.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "--n-steps, --steps" in text or "--n-steps INT, --steps INT" in text
    for default in ("40000", "1.2338", "200", "0.03", "runs/toy"):
        assert f"(default: {default})" in text


OTHERS: dict[str, Any] = {
    "n_steps": 3,
    "target_l0": 2.5,
    "n_prefixes": 4,
    "prefixes": "expected",
    "sparsity": "log",
    "sparsity_weight": 0.05,
    "sparsity_warmup": 0.5,
    "l0_control": "steady",
    "lr": 0.01,
    "lr_warmup_steps": 7,
    "lr_decay": 0.3,
    "lr_end": 0.2,
    "betas": (0.9, 0.99),
    "max_grad_norm": 2.0,
    "norm_decay": 0.9,
    "order_decay": 0.85,
    "restart_every": 1,
    "restart_window": (0.1, 0.9),
    "gradient": "dense",
}


class Watched(Trainer):
    """A trainer that notes what it is made of, and what it is stepped on."""

    made: "list[Watched]" = []  # noqa: RUF012

    def __init__(self, saes: Any, configs: Any, seeds: Any):
        super().__init__(saes, configs, seeds)
        self.start, self.batches = saes, list[torch.Tensor]()
        Watched.made.append(self)

    def step(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.batches.append(x)
        return super().step(x)


def watched_run(tmp_path: Path, *flags: object) -> Watched:
    Watched.made.clear()
    words = ["--out", tmp_path, "--n-eval", 500, "--workers", 1, *flags]
    train_toy.run(train_toy.parse(Config, "", list(map(str, words))), Watched)
    (trainer,) = Watched.made
    return trainer


def test_every_setting_of_the_trainer_reaches_it(tmp_path):
    names = {field.name for field in dataclasses.fields(TrainerConfig)}
    assert OTHERS.keys() == names - {"matmul_dtype"}  # bfloat16 takes more latents
    flags: list[object] = []
    for name, value in OTHERS.items():
        assert value != getattr(Config(), name)
        flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    trainer = watched_run(tmp_path, *flags, "--seeds", 2, "--seed", 7, "--batch-size", 16)
    assert len(trainer.configs) == 4
    for name, value in OTHERS.items():
        reached = [getattr(config, name) for config in trainer.configs]
        assert reached == ([4, 4, 1, 1] if name == "n_prefixes" else [value] * 4), name
    assert trainer.seeds == [7, 8, 7, 8]
    assert [x.shape for x in trainer.batches] == [(4, 16, 20)] * 3
    for sae, seed in zip(trainer.start, trainer.seeds, strict=True):
        assert torch.equal(sae.W_enc, SAE(20, 20, seed).W_enc)


def test_the_prefixes_are_the_matryoshka_saes(tmp_path):
    trainer = watched_run(tmp_path, "--steps", 2, "--n-prefixes", 6)
    results = json.loads((tmp_path / "results.json").read_text())
    by_name = dict(zip((run["sae"] for run in results["runs"]), trainer.configs, strict=True))
    assert {name: config.n_prefixes for name, config in by_name.items()} == {
        "matryoshka": 6,
        "vanilla": 1,
    }
    for name, n_prefixes in (("matryoshka", 6), ("vanilla", 1)):
        assert SAE.load(tmp_path / f"{name}_seed0.safetensors").about["n_prefixes"] == n_prefixes


def test_both_saes_see_the_same_new_batch_each_step(tmp_path):
    trainer = watched_run(tmp_path, "--steps", 4, "--seeds", 2)
    for x in trainer.batches:
        assert torch.equal(x[:2], x[2:])
        assert not torch.equal(x[0], x[1])
    assert not torch.equal(trainer.batches[0], trainer.batches[1])


def test_sizes_and_thresholds_reach_the_result(tmp_path):
    settings = {"n_latents": 23, "d_model": 19, "threshold": 0.3, "n_eval": 777}
    results = short_run_in(tmp_path, **settings)
    for run in results["runs"]:
        sae = SAE.load(tmp_path / f"{run['sae']}_seed0.safetensors")
        assert (sae.n_latents, sae.d_model) == (23, 19)
        assert run["clean_features"] == sum(c > 0.3 for c in run["best_cosine"])
    assert {name: results["config"][name] for name in settings} == settings


@pytest.mark.parametrize("names", [["vanilla"], ["vanilla", "matryoshka", "narrow"]])
def test_any_number_of_kinds_is_trained_and_drawn(tmp_path, monkeypatch, names):
    monkeypatch.setitem(KINDS, "narrow", {"n_prefixes": 2})
    results = short_run_in(tmp_path, saes=tuple(names), seeds=2, refit=True)
    expected = [name + how for how in ("", *REFITS) for name in names]
    for seed in (0, 1):
        assert [run["sae"] for run in results["runs"] if run["seed"] == seed] == expected
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * len(expected)
    assert len(list(tmp_path.glob("*.png"))) == 5


# ---------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    args = ["--steps", 400, "--batch-size", 50, "--n-eval", 20_000, "--seeds", 3, "--workers", 2]
    result = cli(*args, "--seed", 5, "--out", out, env=os.environ | {"COLUMNS": "80"})
    assert result.returncode == 0, result.stderr
    return out, result, json.loads((out / "results.json").read_text())


def test_a_run_end_to_end(short_run):
    out, result, results = short_run
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [
        (name, seed) for seed in (5, 6, 7) for name in KINDS
    ]
    for run in results["runs"]:
        assert len(run["best_cosine"]) == run["n_features"] == 20
        assert run["clean_features"] == sum(c > 0.9 for c in run["best_cosine"])
        assert sum(run["lost"].values()) == 20 - run["clean_features"]
        assert 0 < run["fvu"] < 1
        assert run["l0"] > 0
    assert results["config"]["n_steps"] == 400
    assert results["seconds"] > 0
    assert results["environment"]["torch"] == torch.__version__
    for figure in ("activations", "decoder_cosines", "encoder_cosines", "curves", "seeds"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
    assert "3 seeds" in result.stdout
    assert {path.name for path in out.glob(".*")} == {".lock"}, "a file was left half written"


def test_all_that_is_printed_fits_in_80_columns_and_names_every_sae(short_run):
    _, result, _ = short_run
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80  # the last names the folder
    bars = result.stderr.replace("\n", "\r").split("\r")
    assert max(map(len, bars)) <= 80
    assert any("matryoshka L0" in bar and "vanilla L0" in bar for bar in bars)
    assert bars[-2].startswith("100%")


def test_the_figures_are_those_of_the_saved_saes(short_run):
    out, _, results = short_run
    data = ToyData(train_toy.load_tree("tree.json"), 20)
    for run in results["runs"]:
        sae = SAE.load(out / f"{run['sae']}_seed{run['seed']}.safetensors")
        features, x = data.held_out(run["seed"], 20_000)
        assert metrics.fvu(x, sae(x)).item() == pytest.approx(run["fvu"], rel=1e-5)
        directions = data.directions(run["seed"])
        unit = torch.nn.functional.normalize
        cosines = unit(sae.W_dec, dim=1) @ unit(directions, dim=1).T
        np.testing.assert_allclose(cosines.amax(0).detach(), run["best_cosine"], atol=1e-5)
        assert features.shape == (20_000, 20)


def test_an_saes_file_says_how_it_was_trained(short_run):
    out, _, _ = short_run
    assert SAE.load(out / "vanilla_seed6.safetensors").about == {
        "name": "vanilla",
        "seed": 6,
        "dataset": "tree.json",
        "n_prefixes": 1,
        "prefixes": "sampled",
        "sparsity": "l1",
        "target_l0": 1.2338,
        "lr": 0.03,
        "n_steps": 400,
        "batch_size": 50,
    }


def test_the_same_seed_gives_the_same_figures(tmp_path):
    first, second = (short_run_in(tmp_path / name, seeds=2) for name in "ab")
    assert figures(first) == figures(second)


def test_refit_adds_two_of_each_sae(tmp_path):
    results = short_run_in(tmp_path, refit=True)
    names = [f"{sae}{how}" for how in ("", ", refit", ", refit both") for sae in KINDS]
    assert [run["sae"] for run in results["runs"]] == names
    for run in results["runs"]:
        sae = SAE.load(tmp_path / train_toy.file_name(run["sae"], 0))
        assert sae.about["name"] == run["sae"]
        followed = not run["sae"].endswith("both")
        assert (run.get("steps_to") == {"0.9": None, "0.95": None, "0.99": None}) == followed
    fvu = {run["sae"]: run["fvu"] for run in results["runs"]}
    for name in KINDS:
        assert fvu[f"{name}, refit"] < fvu[name]


def test_an_saes_file_is_called_by_its_name_and_seed():
    assert train_toy.file_name("matryoshka", 3) == "matryoshka_seed3.safetensors"
    both = train_toy.file_name("matryoshka, refit both", 0)
    assert both == "matryoshka_refit_both_seed0.safetensors"


def test_refit_of_saes_that_are_dead_does_not_end_the_run(tmp_path):
    results = short_run_in(tmp_path, refit=True, sparsity_weight=1000.0, n_steps=400)
    assert min(run["l0"] for run in results["runs"]) == 0
    assert max(run["dead_share"] for run in results["runs"]) == 1


def test_many_seeds_need_no_more_open_files_than_one(tmp_path):
    """A tensor handed over by another process is an open file, unless it is copied."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        args = ["--seeds", 4, "--workers", 2, "--refit", "--steps", 5, "--n-eval", 500]
        result = cli(*args, "--out", tmp_path)  # 24 SAEs of five tensors
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == 24


# ---------------------------------------------------------------------------- one folder, one run


def test_the_same_settings_run_again_and_say_so(tmp_path, capsys):
    first = short_run_in(tmp_path)
    capsys.readouterr()
    again = short_run_in(tmp_path, workers=2)  # which changes no figure
    assert capsys.readouterr().err.startswith(f"{tmp_path} holds a run of these settings")
    assert figures(first) == figures(again)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_steps": 121}, "holds a run with --n-steps 120, not --n-steps 121"),
        ({"seeds": 2}, "holds a run with --seeds 1, not --seeds 2"),
        ({"betas": (0.5, 0.9)}, "holds a run with --betas 0.5 0.9375, not --betas 0.5 0.9"),
        ({"refit": True}, "holds a run with --refit False, not --refit True"),
    ],
)
def test_a_run_of_other_settings_is_not_overwritten(tmp_path, settings, said):
    short_run_in(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{said}: choose another --out, or add --overwrite"):
        short_run_in(tmp_path, **settings)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


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
    with pytest.raises(UserError, match=r"results\.json is no results of this script: choose"):
        short_run_in(tmp_path)
    assert (tmp_path / "results.json").read_text() == content
    short_run_in(tmp_path, overwrite=True)


def test_the_results_of_an_earlier_version_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"config": {"steps": 40000}}')
    with pytest.raises(UserError, match="holds a run of an earlier version, not --n-steps 120"):
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


# -------------------------------------------------------------------------------------- refusals

BAD_TREES = {
    "{": "not JSON",
    '{"active_prob": 1, "children": [{"active_prob": 1.3}]}': "children[0].active_prob",
    '{"active_prob": 1, "colour": 2}': "colour",
    '{"children": []}': "active_prob",
    '{"active_prob": 1, "is_read_out": false}': "read",
}
BAD_FLAGS = {
    "--steps 0": "--n-steps",
    "--step 5": "--step",
    "--seeds -1": "--seeds",
    "--seed -1": "--seed",
    "--batch-size 0": "--batch-size",
    "--n-prefixes 21": "--n-prefixes 21",
    "--n-latents -1": "--n-latents",
    "--workers -2": "--workers",
    "--saes topk": "topk",
    "--saes vanilla vanilla": "twice",
    "--tree nowhere.json": "nowhere.json",
    "--tree studies": "studies: cannot be read: Is a directory",
    "--device cuda:99": "--device cuda:99",
    "--device toaster": "--device toaster",
    "--lr nan": "--lr",
    "--lr inf": "--lr",
    "--sparsity-weight inf": "--sparsity-weight",
    "--target-l0 inf": "--target-l0",
    "--target-l0 21": "--target-l0",
    "--betas 0.5 nan": "--betas",
    "--threshold nan": "--threshold must be between 0 and 1",
    "--threshold 1": "--threshold must be between 0 and 1",
    "--n-eval 1": "--n-eval must be at least 2",
    "--n-eval 0": "--n-eval",
    "--n-eval 1000000000000": "--n-eval 1000000000000 takes at least",
    "--n-latents 1000000000": "--n-latents 1000000000 takes at least",
    "--d-model 1000000000": "--d-model 1000000000 takes at least",
    "--batch-size 1000000000": "--batch-size 1000000000 takes at least",
    "--seeds 1000000000": "--seeds 1000000000 takes at least",
    "--seeds 1" + "0" * 400: "--seeds",
    "--matmul-dtype bfloat16": "bfloat16",
    "--out /dev/null/x": "--out /dev/null/x",
}


@pytest.mark.parametrize("bad", [*BAD_FLAGS, *BAD_TREES])
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, capsys, monkeypatch, bad):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("precious")
    if bad in BAD_TREES:
        (tmp_path / "tree.json").write_text(bad)
        flags, named = ["--tree", str(tmp_path / "tree.json")], BAD_TREES[bad]
    else:
        flags, named = bad.split(), BAD_FLAGS[bad]
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(["--out", str(out), "--overwrite", *flags])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert not printed.out
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "precious"


def test_what_the_memory_holds_is_not_refused(monkeypatch):
    tree = train_toy.load_tree("tree.json")
    monkeypatch.setattr(train_toy, "_memory", lambda: 20_000_000)
    assert train_toy.check(Config(n_eval=27_000), tree)
    with pytest.raises(UserError, match=r"--n-eval 28000 takes at least 0\.0202 GB .* 0\.02 GB"):
        train_toy.check(Config(n_eval=28_000), tree)
    with pytest.raises(UserError, match=r"--n-eval 10000 takes at least 0\.0216 GB"):
        train_toy.check(Config(n_eval=10_000, seeds=9, workers=3), tree)
    with pytest.raises(UserError, match=r"--batch-size 3000 takes at least 0\.024 GB"):
        train_toy.check(Config(batch_size=3_000, n_eval=1_000, workers=1), tree)
    with pytest.raises(UserError, match=r"--n-latents 13000 takes at least 0\.0208 GB"):
        train_toy.check(Config(n_latents=13_000, n_eval=1_000, workers=1), tree)
    with pytest.raises(UserError, match=r"--seeds 4000 takes at least 0\.0256 GB"):
        train_toy.check(Config(seeds=4_000, n_eval=1_000, workers=1), tree)


def test_bad_input_shows_no_traceback():
    result = cli("--steps", "0")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_training_that_diverges_stops_with_the_last_good_metrics(tmp_path):
    with pytest.raises(
        UserError, match=r"step \d+: the matryoshka SAE of seed 0 has an FVU of .* a lower --lr"
    ):
        short_run_in(tmp_path, n_steps=200, lr=1e30)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


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


def test_a_worker_that_is_killed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a worker process was killed, .* try fewer --workers"):
        train_toy.run(Config(out=str(tmp_path), **{**SHORT, "seeds": 2, "workers": 2}), Killed)


@pytest.mark.parametrize(("seeds", "steps"), [(1, 40_000), (2, 40_000), (2, 10**9)])
def test_ctrl_c_stops_every_process_at_once(tmp_path, seeds, steps):
    with started("--seeds", seeds, "--workers", 2, "--steps", steps, "--out", tmp_path) as process:
        if steps == 40_000:
            read_until_training(process)
        else:  # its first figures would come in an hour
            wait_for_children(process.pid, 2)
            time.sleep(5)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: 0 of" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def children(pid: int) -> list[int]:
    """The worker processes of a process; not multiprocessing's tracker of resources."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = {int(p): Path(f"/proc/{p}/cmdline").read_bytes() for p in found}
    return [p for p, line in words.items() if b"spawn_main" in line]


def wait_for_children(pid: int, n: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(children(pid)) < n:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return children(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to look into")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    with started("--seeds", 2, "--workers", 2, "--steps", 10**9, "--out", tmp_path) as process:
        workers = wait_for_children(process.pid, 2)
        time.sleep(5)  # until they train
        assert all(map(is_running, workers))
        process.kill()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)


# -------------------------------------------------------------------------------- reproducibility


def test_figures_do_not_depend_on_which_kernels_the_cpu_would_choose(tmp_path):
    # Each limit is what MKL would see on an older CPU; without `fix_kernels` the bits differ.
    found = []
    for limit in ("", "AVX2", "SSE4_2"):
        environment = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR",)}
        out = tmp_path / (limit or "none")
        args = ["--steps", 100, "--n-eval", 500, "--refit", "--out", out]
        result = cli(*args, env=environment | {"MKL_ENABLE_INSTRUCTIONS": limit})
        assert result.returncode == 0, result.stderr
        found.append(figures(json.loads((out / "results.json").read_text())))
    assert found[0] == found[1] == found[2]


def test_the_tree_beside_the_script_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_toy.load_tree("tree.json").n_features == 20
    shutil.copy(ROOT / "studies" / "trees" / "uneven.json", "tree.json")
    other = train_toy.load_tree("tree.json").marginals
    assert not torch.equal(other, train_toy.load_tree(str(ROOT / "tree.json")).marginals)
