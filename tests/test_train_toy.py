"""The script itself: a short run end to end, its files, its refusals, its repeatability."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train_toy
from sae import SAE
from script import UserError
from train_toy import Config

ROOT = Path(__file__).parents[1]
SHORT = {"steps": 120, "batch_size": 50, "n_eval": 2_000, "workers": 1}


def cli(*args, cwd=ROOT, **kwargs):
    command = [sys.executable, str(ROOT / "train_toy.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **kwargs)


def figures(results):
    """What must repeat: everything but the time and where it was written."""
    return [{k: v for k, v in run.items()} for run in results["runs"]]


def test_help_names_every_flag_with_its_default():
    text = " ".join(cli("--help").stdout.split())
    for flag in ("--seeds", "--seed", "--steps", "--batch-size", "--n-prefixes", "--target-l0"):
        assert flag in text
    for flag in ("--lr", "--tree", "--out", "--device"):
        assert flag in text
    for default in ("40000", "1.2338", "200", "0.03", "runs/toy"):
        assert f"(default: {default})" in text


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    args = ["--steps", 400, "--batch-size", 50, "--n-eval", 20_000, "--seeds", 3, "--workers", 2]
    result = cli(*args, "--seed", 5, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout, json.loads((out / "results.json").read_text())


def test_a_run_end_to_end(short_run):
    out, printed, results = short_run
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [
        (name, seed) for seed in (5, 6, 7) for name in ("matryoshka", "vanilla")
    ]
    for run in results["runs"]:
        assert len(run["best_cosine"]) == run["n_features"] == 20
        assert run["clean_features"] == sum(c > 0.9 for c in run["best_cosine"])
        assert sum(run["lost"].values()) == 20 - run["clean_features"]
        assert 0 < run["fvu"] < 1
        assert run["l0"] > 0
    assert results["config"]["steps"] == 400
    assert results["seconds"] > 0
    assert results["environment"]["torch"] == torch.__version__
    for figure in ("activations", "decoder_cosines", "encoder_cosines", "curves", "seeds"):
        assert (out / f"{figure}.png").stat().st_size > 5_000
    assert "matryoshka" in printed
    assert "3 seeds" in printed
    assert not list(out.glob(".*")), "a file was left half written"


def test_the_figures_are_those_of_the_saved_saes(short_run):
    out, _, results = short_run
    config, tree = Config(**results["config"]), train_toy.load_tree("tree.json")
    for run in results["runs"]:
        sae = SAE.load(out / f"{run['sae']}_seed{run['seed']}.safetensors")
        features, x = train_toy.held_out(tree, config, run["seed"], config.n_eval)
        assert evaluate.fvu(x, sae(x)).item() == pytest.approx(run["fvu"], rel=1e-5)
        directions = train_toy.directions_of(tree, config, run["seed"])
        unit = torch.nn.functional.normalize
        cosines = unit(sae.W_dec, dim=1) @ unit(directions, dim=1).T
        np.testing.assert_allclose(cosines.amax(0).detach(), run["best_cosine"], atol=1e-5)
        assert features.shape == (20_000, 20)


def test_the_same_seed_gives_the_same_figures(tmp_path):
    first, second = (
        train_toy.run(Config(out=str(tmp_path / name), seeds=2, **SHORT)) for name in "ab"
    )
    assert figures(first) == figures(second)


def test_steps_to_is_the_first_record_after_which_all_stay_clean():
    worst = np.array([0.2, 0.91, 0.89, 0.96, 0.97])
    steps = np.array([10, 20, 30, 40, 45])
    assert train_toy.steps_to(steps, worst) == {"0.9": 40, "0.95": 40, "0.99": None}
    assert train_toy.steps_to(steps, worst + 0.8)["0.99"] == 10


def test_refit_adds_two_of_each_sae(tmp_path):
    results = train_toy.run(Config(out=str(tmp_path), seeds=1, refit=True, **SHORT))
    names = [f"{sae}{how}" for how in ("", ", refit", ", refit both") for sae in train_toy.SAES]
    assert [run["sae"] for run in results["runs"]] == names
    for run in results["runs"]:
        assert (tmp_path / f"{train_toy.file_name(run['sae'])}_seed0.safetensors").exists()
        tracked = not run["sae"].endswith("both")
        assert (run.get("steps_to") == {"0.9": None, "0.95": None, "0.99": None}) == tracked
    fvu = {run["sae"]: run["fvu"] for run in results["runs"]}
    for sae in train_toy.SAES:
        assert fvu[f"{sae}, refit"] < fvu[sae]


def test_refit_of_saes_that_are_dead_does_not_end_the_run(tmp_path):
    results = train_toy.run(
        Config(out=str(tmp_path), refit=True, sparsity_weight=1000.0, **{**SHORT, "steps": 400})
    )
    assert min(run["l0"] for run in results["runs"]) == 0


def test_training_is_on_other_samples_than_scoring():
    config = train_toy.check(Config(), train_toy.load_tree("tree.json"))
    tree = train_toy.load_tree("tree.json")
    data = train_toy.Data.of(config, tree, [3], torch.device("cpu"))
    trained = next(data.batches(200))[0]
    _, scored = train_toy.held_out(tree, config, 3, 200)
    assert not torch.equal(trained, scored)


def test_both_saes_see_the_same_batches():
    config = train_toy.check(Config(), train_toy.load_tree("tree.json"))
    data = train_toy.Data.of(config, train_toy.load_tree("tree.json"), [3, 4], torch.device("cpu"))
    x = next(data.batches(50))
    assert x.shape == (4, 50, 20)
    assert torch.equal(x[:2], x[2:])
    assert not torch.equal(x[0], x[1])


BAD_TREES = {
    "{": "not JSON",
    '{"active_prob": 1, "children": [{"active_prob": 1.3}]}': "children[0].active_prob",
    '{"active_prob": 1, "colour": 2}': "colour",
    '{"children": []}': "active_prob",
    '{"active_prob": 1, "is_read_out": false}': "read",
}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--seeds", "-1"], "--seeds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--n-prefixes", "21"], "--n-prefixes 21"),
        (["--tree", "nowhere.json"], "nowhere.json"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster"),
        (["--lr", "nan"], "--lr"),
        (["--out", "/dev/null/x"], "--out /dev/null/x"),
        *[(tree, named) for tree, named in BAD_TREES.items()],
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, capsys, flags, named):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("precious")
    if isinstance(flags, str):
        (tmp_path / "tree.json").write_text(flags)
        flags = ["--tree", str(tmp_path / "tree.json")]
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(["--out", str(out), *flags])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert not printed.out
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert (out / "results.json").read_text() == "precious"


def test_bad_input_shows_no_traceback():
    result = cli("--steps", "0")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_training_that_diverges_stops_with_the_last_good_metrics(tmp_path):
    config = Config(out=str(tmp_path), **(SHORT | {"steps": 200}), lr=1e30)
    with pytest.raises(
        UserError, match=r"step \d+: the matryoshka SAE of seed 0 has an FVU of"
    ) as e:
        train_toy.run(config)
    assert "--lr" in str(e.value)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    """The first stack is done when the interrupt comes; its SAEs and figures are written."""
    train_stacks = train_toy.train_stacks

    def interrupted(config, *rest):
        yield from train_stacks(train_toy.dataclasses.replace(config, seeds=2), *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_toy, "train_stacks", interrupted)
    flags = {"seeds": 4, "out": tmp_path, **SHORT}
    with pytest.raises(SystemExit) as stopped:
        train_toy.main([f"--{k.replace('_', '-')}={v}" for k, v in flags.items()])
    assert stopped.value.code == 130
    assert "2 of 4 seeds" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_ctrl_c_stops_every_process_at_once(tmp_path, seeds):
    args = ["--seeds", seeds, "--workers", 2, "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_toy.py"), *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen = ""
    while "L0" not in seen.split("steps/s, matryoshka L0 0.00")[-1] or "FVU" not in seen:
        seen += process.stderr.read(1)  # until the bar shows that training is under way
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: 0 of" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


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
