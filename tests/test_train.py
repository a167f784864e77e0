"""train.py: what it writes, what it completes, what it refuses, and what it needs."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_factory import write_dataset, write_model
from training_cases import (
    D_MODEL,
    N_TOKENS,
    ROOT,
    WRITTEN,
    argv_for,
    config_for,
    contents,
    cut,
    records_of,
    refused,
    resumed,
    write_cache,
)

import cache_activations
import train
import train_tinystories
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import finish, write_shard
from matryoshka.errors import UserError
from matryoshka.metrics import fvu
from matryoshka.saved_runs import METRICS, training_curves
from matryoshka.training import Training
from matryoshka.training import train as train_steps
from sae import SAE
from train import run
from train_tinystories import Config

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
def from_the_shell(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, subprocess.CompletedProcess[str]]:
    """A run by its command, on a cache that `cache_activations` made of a generated model."""
    folder = tmp_path_factory.mktemp("shell")
    write_model(folder / "model.pt", d_model=16, d_mlp=24)
    write_dataset(folder, 100, seq=32)
    cache_activations.run(
        cache_activations.Config(
            model=str(folder / "model.pt"),
            dataset=str(folder),
            layer=1,
            out=str(folder / "cache"),
            device="cpu",
        )
    )
    config = config_for(folder / "cache", folder / "out")
    return config, shell(config)


def shell(config: Config) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_tinystories.py"), *argv_for(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.processes
def test_a_run_end_to_end(
    from_the_shell: tuple[Config, subprocess.CompletedProcess[str]],
) -> None:
    config, done = from_the_shell
    assert done.returncode == 0, done.stderr
    out = Path(config.out)
    made = {*WRITTEN, "checkpoint.safetensors", "results.json"}
    assert set(contents(out)) == made, "no more, no less, and nothing half written"

    results = json.loads((out / "results.json").read_text())
    assert results["config"] == config.as_json()
    assert results["environment"]["torch"] == torch.__version__
    assert results["cache"]["make"]["layer"] == 1
    assert results["passes"] == round(50 * 128 / results["cache"]["n_tokens"], 3)
    assert 0 <= results["waited_for_data"] <= results["seconds"]
    assert results["seconds"] > 0
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [("matryoshka", 0), ("vanilla", 0)]
    for result in results["runs"]:
        assert 0 < result["training_fvu"] < 1.5
        assert result["final_l0"] > 0
        assert result["dead_share"] is None, "50 steps are too few to know"
        sae = SAE.load(out / f"{result['sae']}.safetensors")
        assert (sae.d_model, sae.n_latents) == (16, 20)
        assert sae.about["name"] == result["sae"]
        assert sae.about["dead_share"] == result["dead_share"]
        assert sae.about["n_prefixes"] == (3 if result["sae"] == "matryoshka" else 1)
        assert str(out.parent) not in str(sae.about), "no path of a machine"
        assert sae.about["model"] == "model.pt"
        assert sae.about["dataset"] == out.parent.name
        assert sae.about["torch"] == torch.__version__

    records = records_of(out)
    assert [(r["step"], r["sae"]) for r in records] == [
        (step, name) for step in range(1, 51) for name in ("matryoshka", "vanilla")
    ]
    fields = {"step", "sae", "loss", "fvu", "l0", "dead_share", "sparsity_weight"}
    assert all(set(record) == fields for record in records)
    steps, curves = training_curves(out / METRICS)
    assert steps == list(range(1, 51))
    assert len(curves["vanilla"]["fvu"]) == 50

    lines = done.stdout.splitlines()
    assert "batch FVU" in lines[0]
    for line, result in zip(lines[2:4], results["runs"], strict=True):
        assert line.split()[1] == result["sae"]
        assert f"{result['training_fvu']:.4f}" in line
        assert f"{result['final_l0']:.2f}" in line
        assert line.split()[-2] == "-"
    assert "-: the run was shorter" in lines[-3]
    assert "waiting for data" in lines[-2]
    assert f"evaluate.py --run {out}" in lines[-1]
    bar = [line for line in done.stderr.splitlines() if "100%" in line][-1]
    assert len(bar) <= 80
    for figure in ("matryoshka FVU", "vanilla FVU", "L0"):
        assert figure in bar


@pytest.mark.processes
def test_the_same_command_again_is_refused_and_nothing_touched(
    from_the_shell: tuple[Config, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, _ = from_the_shell
    before = contents(Path(config.out))
    assert "holds a run: add --resume" in refused(config, capsys)
    assert contents(Path(config.out)) == before


def test_results_alone_are_a_run_too(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run whose checkpoint was deleted, to save room, is not written over."""
    config = config_for(cache, tmp_path / "out", n_steps=2)
    run(config)
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    before = contents(tmp_path / "out")
    assert "holds a run" in refused(config, capsys)
    assert contents(tmp_path / "out") == before


def test_refit_and_expected_prefixes(cache: Path, tmp_path: Path) -> None:
    """--refit writes SAEs that fire as the trained ones do and reconstruct better; --prefixes
    expected trains another Matryoshka SAE and the same vanilla one."""
    run(config_for(cache, tmp_path / "sampled", refit=True))
    run(config_for(cache, tmp_path / "expected", prefixes="expected"))
    x = ActivationCache(cache).acts(0, N_TOKENS).float()
    for name in ("matryoshka", "vanilla"):
        sae, fitted = (
            SAE.load(tmp_path / "sampled" / folder / f"{name}.safetensors")
            for folder in (".", "refit")
        )
        assert torch.equal(sae.encode(x), fitted.encode(x))
        assert fvu(x, fitted(x)) < fvu(x, sae(x))
        other = SAE.load(tmp_path / "expected" / f"{name}.safetensors")
        assert torch.equal(other.W_dec, sae.W_dec) == (name == "vanilla")
    assert not (tmp_path / "expected" / "refit").exists()


def test_a_finished_run_is_returned_without_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(cache, tmp_path)
    results = run(config)
    before = contents(tmp_path)

    def never(*args: object) -> None:
        raise AssertionError("a finished run needs no step, and no look at every byte of the cache")

    monkeypatch.setattr(Training, "step", never)
    monkeypatch.setattr(ActivationCache, "verify", never)
    assert run(resumed(config)) == results
    train_tinystories.main(argv_for(resumed(config)))
    assert "vanilla" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_files_are_recorded_as_they_are(cache: Path, tmp_path: Path) -> None:
    """evaluate.py knows by this which SAEs are of the run, and what was trained on."""
    results = run(config_for(cache, tmp_path, refit=True, tokens=2_000))
    for result in results["runs"]:
        for key, folder in (("file_sha256", "."), ("refit_file_sha256", "refit")):
            data = (tmp_path / folder / f"{result['sae']}.safetensors").read_bytes()
            assert result[key] == hashlib.sha256(data).hexdigest()
    made = ActivationCache(cache)
    sizes = [shard.n_tokens for shard in made.shards]
    assert sizes[0] < 2_000 < sizes[0] + sizes[1], "the third shard and the fourth are not used"
    assert results["cache"]["acts_sha256"] == [s.acts_sha256 for s in made.shards[:2]]


@pytest.mark.parametrize("damage", ["lost", "cut", "of another run"])
def test_a_lost_sae_is_written_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config = config_for(cache, tmp_path / "out")
    results = run(config)
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "vanilla.safetensors"
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        cut(path)
    else:
        run(config_for(cache, tmp_path / "other", seed=1))
        shutil.copy(tmp_path / "other" / "vanilla.safetensors", path)
    monkeypatch.setattr(Training, "step", None)
    assert run(resumed(config)) == results
    assert contents(tmp_path / "out") == before


def test_a_finished_run_is_refitted_when_asked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run(config_for(cache, tmp_path / "at once", refit=True))
    config = config_for(cache, tmp_path / "later")
    run(config)
    before = contents(tmp_path / "later")
    monkeypatch.setattr(Training, "step", None)
    with_refit = dataclasses.replace(resumed(config), refit=True)
    results = run(with_refit)
    assert results["config"]["refit"]
    assert results["runs"] == at_once["runs"]
    after = contents(tmp_path / "later")
    assert set(after) - set(before) == {"refit/matryoshka.safetensors", "refit/vanilla.safetensors"}
    assert all(after[name] == before[name] for name in before if name != "results.json")
    monkeypatch.setattr(train, "refit_decoder", None)
    assert run(with_refit) == results, "and is then finished"


def test_a_finished_run_without_its_checkpoint_is_returned_or_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint may have been deleted to save room. Nothing is trained over what is left."""
    config = config_for(cache, tmp_path)
    results = run(config)
    (tmp_path / "checkpoint.safetensors").unlink()
    before = contents(tmp_path)
    assert run(resumed(config)) == results
    other = dataclasses.replace(resumed(config), lr=1e-3)
    assert "results.json is from a run with --lr 0.003, not 0.001" in refused(other, capsys)
    refit = dataclasses.replace(resumed(config), refit=True)
    said = refused(refit, capsys)
    assert "without its checkpoint" in said
    assert "refit/vanilla.safetensors" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["results.json", "matryoshka.safetensors", "refit"])
def test_a_folder_where_a_result_should_be_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Made while training went on, so that it is met at the end; then nothing is lost."""
    config = config_for(cache, tmp_path, refit=True)
    make = Path.write_text if name == "refit" else Path.mkdir
    args = ("a file",) if name == "refit" else ()
    real = train_steps

    def train_then_block(*every: Any) -> None:
        real(*every)
        make(tmp_path / name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train", train_then_block)
        with pytest.raises(UserError, match=f"{tmp_path / name} "):
            run(config)
    (tmp_path / name).unlink() if name == "refit" else (tmp_path / name).rmdir()
    run(resumed(config))
    assert (tmp_path / "results.json").exists()


def test_a_useless_run_is_an_error_once_everything_is_written(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for resume in (False, True):
        config = config_for(cache, tmp_path, lr=100.0, resume=resume)
        with pytest.raises(SystemExit) as stopped:
            train_tinystories.main(argv_for(config))
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert "at the end of training" in printed.out
        assert "reconstructs worse than the activations' mean does" in printed.err
        assert f"error: an SAE in {tmp_path} is of no use" in printed.err.splitlines()[-1]
        assert (tmp_path / "results.json").exists()


def test_a_missed_target_is_a_warning(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tinystories.main(argv_for(config_for(cache, tmp_path, n_steps=20, target_l0=1.0)))
    assert "warning: the vanilla SAE missed its target: L0" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.usefixtures("no_steps")
def test_activations_that_are_all_the_same_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    n = 300
    make = {
        "format": 1,
        "tokens": n,
        "dtype": "float32",
        "d_model": D_MODEL,
        "rows_per_shard": 3,
    }
    tokens = np.stack([np.arange(n), np.arange(n) // 100, np.arange(n) % 100], 1).astype("<i4")
    (tmp_path / "cache").mkdir()
    acts = torch.full((n, D_MODEL), value)
    write_shard(tmp_path / "cache", acts, tokens, (0, 3), make)
    finish(tmp_path / "cache", 3)
    said = refused(config_for(tmp_path / "cache", tmp_path / "out"), capsys)
    assert "its activations are all the same: nothing to explain" in said
    assert contents(tmp_path / "out") == {}


LARGE = {"matmul_dtype": "bfloat16", "n_latents": 300}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_l0": 21.0}, "--target-l0 21.0 is more than there are latents: 20"),
        ({"target_l0": 0.0}, "--target-l0 is 0.0"),
        ({"target_l0": float("nan")}, "--target-l0 is nan"),
        ({"n_prefixes": 21}, "--n-prefixes 21 is more than there are latents: 20"),
        ({"n_prefixes": 0}, "--n-prefixes is 0"),
        ({"n_latents": 0}, "--n-latents is 0"),
        ({"n_steps": 0}, "--n-steps is 0"),
        ({"n_steps": -5}, "--n-steps is -5"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"recipe": "paper"}, "--recipe paper has only"),
        ({"batch_size": 60, **LARGE}, "--matmul-dtype bfloat16: --batch-size is 60"),
        ({"matmul_dtype": "bfloat16"}, "--n-latents 20: --matmul-dtype bfloat16"),
        (LARGE, f"the activations' number of dimensions is {D_MODEL}, not a multiple of 8"),
        ({"batch_size": N_TOKENS + 1}, f"holds {N_TOKENS} activations: too few for --batch-size"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": -1e-3}, "--lr is -0.001"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"sparsity_weight": 0.0}, "--sparsity-weight is 0.0"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds is -1.0"),
        ({"lr": float("inf")}, "--lr is inf: it must be a finite number"),
        ({"sparsity_weight": float("inf")}, "--sparsity-weight is inf: it must be a finite number"),
        ({"target_l0": float("inf")}, "--target-l0 is inf: it must be a finite number"),
        ({"n_steps": 2**63}, f"--n-steps is {2**63}: it must be below 2^63"),
        ({"seed": 2**63}, f"--seed is {2**63}: it must be below 2^63"),
        ({"n_latents": 2**61}, "takes more memory than there is"),
        (
            {"n_latents": 10**12},
            "--n-latents 1000000000000 with --batch-size 128 takes more memory",
        ),
        ({"seed": -1}, "--seed is -1"),
        ({"cache": "nowhere"}, "nowhere holds no finished cache"),
        ({"device": "cuda:99"}, "--device cuda:99 is not there"),
        ({"device": "toaster"}, "--device toaster is not there"),
        ({"out": "/dev/null/x"}, "--out /dev/null/x cannot be written"),
        ({"out": __file__}, "test_train.py cannot be written"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.usefixtures("no_steps")
def test_bad_input_is_one_line_and_touches_nothing(
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    named: str,
    resume: bool,
) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    config = config_for(cache, tmp_path, resume=resume)
    assert named in refused(dataclasses.replace(config, **settings), capsys)
    assert contents(tmp_path) == {"metrics.jsonl": b"precious"}


def test_where_a_model_lies_is_left_out_and_its_owner_on_the_hub_is_not() -> None:
    assert train.without_path("/home/me/model.pt") == "model.pt"
    assert train.without_path("~/me/data/") == "data"
    assert train.without_path("./model.pt") == "model.pt"
    assert train.without_path("noanabeshima/tiny_model") == "noanabeshima/tiny_model"
    assert train.without_path(None) is None
