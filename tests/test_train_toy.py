"""The script itself: a short run end to end, its files, its refusals, its repeatability."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_commands import ROOT, blank_figures, cli, figures, short_run_in, undrawn_cli

import train_toy
from matryoshka import metrics, toy_report, toy_workers
from matryoshka.errors import UserError
from matryoshka.kinds import KINDS
from matryoshka.toy_stack import REFITS
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import SAE
from toy_model import ToyData
from train_toy import Config


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(train_toy, "draw", blank_figures)


# ---------------------------------------------------------------------------------------- settings


def test_the_defaults_are_the_write_ups():
    """Other numbers here would be another experiment under the same name."""
    assert dataclasses.asdict(Config()) == {
        "n_steps": 40_000,
        "target_l0": 1.2338,
        "n_prefixes": 10,
        "prefixes": "sampled",
        "widths": (),
        "width_weights": (),
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
        "auxiliary": "none",
        "auxiliary_weight": 1 / 32,
        "dead_after": 250_000,
        "resample_every": 0,
        "bandwidth": 0.001,
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
        "unhedged": 0.0,
    }
    filled_in = train_toy.checked(Config(), train_toy.load_tree("tree.json"))
    assert filled_in.n_latents == 20
    assert toy_workers.SEEDS_A_STACK == 10


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train_toy.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
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
    "auxiliary_weight": 0.5,
    "dead_after": 77,
    "resample_every": 2,
    "bandwidth": 0.5,
    "gradient": "dense",
}
# bfloat16 takes more latents, the auxiliary loss another activation; the others have tests below
NOT_HERE = {"matmul_dtype", "auxiliary", "widths", "width_weights", "unhedged"}


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
    assert OTHERS.keys() == names - NOT_HERE
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


def test_both_saes_are_trained_unhedged(tmp_path):
    trainer = watched_run(tmp_path, "--steps", 2, "--unhedged", 0.5, "--seeds", 1)
    assert [config.unhedged for config in trainer.configs] == [0.5, 0.5]
    sae = SAE.load(tmp_path / "matryoshka_seed0.safetensors")
    assert sae.about["unhedged"] == 0.5


def test_widths_are_the_matryoshka_saes(tmp_path):
    trainer = watched_run(
        tmp_path, "--steps", 2, "--widths", 5, 20, "--width-weights", 3, 1, "--seeds", 1
    )
    assert [config.widths for config in trainer.configs] == [(5.0, 20.0), ()]
    assert [config.width_weights for config in trainer.configs] == [(3.0, 1.0), ()]
    sae = SAE.load(tmp_path / "matryoshka_seed0.safetensors")
    assert (sae.about["widths"], sae.about["width_weights"]) == ([5, 20], [3, 1])


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
    monkeypatch.setattr(train_toy, "draw", toy_report.draw)
    monkeypatch.setitem(KINDS, "narrow", {"n_prefixes": 2})
    results = short_run_in(tmp_path, saes=tuple(names), seeds=2, refit=True)
    expected = [name + how for how in ("", *REFITS) for name in names]
    for seed in (0, 1):
        assert [run["sae"] for run in results["runs"] if run["seed"] == seed] == expected
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * len(expected)
    assert len(list(tmp_path.glob("*.png"))) == 5


# ---------------------------------------------------------------------------------------- a run


@contextlib.contextmanager
def open_files(limit):
    """How many files this process and those that it starts may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out, env = tmp_path_factory.mktemp("toy"), os.environ | {"COLUMNS": "80"}
    args = ["--steps", 100, "--batch-size", 50, "--n-eval", 5_000, "--seeds", 3, "--workers", 2]
    with open_files(80):  # 18 SAEs of five tensors: one from another process is copied
        result = cli(*args, "--refit", "--seed", 5, "--out", out, env=env)
    assert result.returncode == 0, result.stderr
    return out, result, json.loads((out / "results.json").read_text())


@pytest.mark.processes
def test_a_run_end_to_end(short_run):
    out, result, results = short_run
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [
        (name + how, seed) for seed in (5, 6, 7) for how in ("", *REFITS) for name in KINDS
    ]
    for run in results["runs"]:
        assert len(run["best_cosine"]) == run["n_features"] == 20
        assert run["clean_features"] == sum(c > 0.9 for c in run["best_cosine"])
        assert sum(run["lost"].values()) == 20 - run["clean_features"]
        assert 0 < run["fvu"] < 1
        assert run["l0"] > 0
    assert results["config"]["n_steps"] == 100
    assert results["seconds"] > 0
    assert results["environment"]["torch"] == torch.__version__
    for figure in ("activations", "decoder_cosines", "encoder_cosines", "curves", "seeds"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
    assert "3 seeds" in result.stdout
    assert {path.name for path in out.glob(".*")} == {".lock"}, "a file was left half written"


@pytest.mark.processes
def test_all_that_is_printed_fits_in_80_columns_and_names_every_sae(short_run):
    _, result, _ = short_run
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80  # the last names the folder
    bars = result.stderr.replace("\n", "\r").split("\r")
    assert max(map(len, bars)) <= 80
    assert any("matryoshka L0" in bar and "vanilla L0" in bar for bar in bars)
    assert bars[-2].startswith("100%")


@pytest.mark.processes
def test_the_figures_are_those_of_the_saved_saes(short_run):
    out, _, results = short_run
    data = ToyData(train_toy.load_tree("tree.json"), 20)
    for run in results["runs"]:
        sae = SAE.load(out / train_toy.file_name(run["sae"], run["seed"]))
        features, x = data.held_out(run["seed"], 5_000)
        assert metrics.fvu(x, sae(x)).item() == pytest.approx(run["fvu"], rel=1e-5)
        directions = data.directions(run["seed"])
        unit = torch.nn.functional.normalize
        cosines = unit(sae.W_dec, dim=1) @ unit(directions, dim=1).T
        np.testing.assert_allclose(cosines.amax(0).detach(), run["best_cosine"], atol=1e-5)
        assert features.shape == (5_000, 20)


@pytest.mark.processes
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
        "n_steps": 100,
        "batch_size": 50,
    }


def test_the_same_seed_gives_the_same_figures(tmp_path):
    first, second = (short_run_in(tmp_path / name, seeds=2, n_steps=120) for name in "ab")
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
    results = short_run_in(tmp_path, refit=True, sparsity_weight=1000.0, n_steps=400, n_eval=500)
    assert min(run["l0"] for run in results["runs"]) == 0
    assert max(run["dead_share"] for run in results["runs"]) == 1


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
    assert train_toy.checked(Config(n_eval=27_000), tree)
    with pytest.raises(UserError, match=r"--n-eval 28000 takes at least 0\.0202 GB .* 0\.02 GB"):
        train_toy.checked(Config(n_eval=28_000), tree)
    with pytest.raises(UserError, match=r"--n-eval 10000 takes at least 0\.0216 GB"):
        train_toy.checked(Config(n_eval=10_000, seeds=9, workers=3), tree)
    with pytest.raises(UserError, match=r"--batch-size 3000 takes at least 0\.024 GB"):
        train_toy.checked(Config(batch_size=3_000, n_eval=1_000, workers=1), tree)
    with pytest.raises(UserError, match=r"--n-latents 13000 takes at least 0\.0208 GB"):
        train_toy.checked(Config(n_latents=13_000, n_eval=1_000, workers=1), tree)
    with pytest.raises(UserError, match=r"--seeds 4000 takes at least 0\.0256 GB"):
        train_toy.checked(Config(seeds=4_000, n_eval=1_000, workers=1), tree)


def test_training_that_diverges_stops_with_the_last_good_metrics(tmp_path):
    with pytest.raises(
        UserError, match=r"step \d+: the matryoshka SAE of seed 0 has an FVU of .* a lower --lr"
    ):
        short_run_in(tmp_path, n_steps=200, lr=1e30)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# -------------------------------------------------------------------------------- reproducibility


@pytest.mark.processes
@pytest.mark.parametrize("older", ["SSE4_2", pytest.param("AVX2", marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_which_kernels_the_cpu_would_choose(tmp_path, older):
    # The limit is what MKL would see on an older CPU; without `fix_kernels` the bits differ.
    found = []
    for limit in ("", older):
        environment = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR",)}
        out = tmp_path / (limit or "none")
        args = ["--steps", 30, "--n-eval", 500, "--refit", "--out", out]
        result = undrawn_cli(*args, env=environment | {"MKL_ENABLE_INSTRUCTIONS": limit})
        assert result.returncode == 0, result.stderr
        found.append(figures(json.loads((out / "results.json").read_text())))
    assert found[0] == found[1]


def test_the_tree_beside_the_script_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_toy.load_tree("tree.json").n_features == 20
    shutil.copy(ROOT / "studies" / "trees" / "uneven.json", "tree.json")
    other = train_toy.load_tree("tree.json").marginals
    assert not torch.equal(other, train_toy.load_tree(str(ROOT / "tree.json")).marginals)
