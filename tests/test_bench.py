"""studies/bench.py and its cases where they take a second: what is measured, not how fast it is."""

import json
import math
import types

import numpy as np
import pytest
import torch

from studies import bench, bench_cases
from studies.bench_cases import Case

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, value in (("D_MODEL", 48), ("N_LATENTS", 300), ("BATCH", 512), ("L0", 6)):
        monkeypatch.setattr(bench_cases, name, value)
    monkeypatch.setattr(bench_cases, "TRAINING_STEPS", 20)


def test_a_placed_sae_fires_as_many_latents_as_it_says(small):
    for n_latents, l0 in ((300, 3), (300, 12), (2000, 3)):
        case = Case.placed(CPU, n_latents, l0)
        assert case.l0() == pytest.approx(l0, rel=0.15)
        norm = case.x.norm(dim=1).mean().item()
        assert norm == pytest.approx(math.sqrt(48), rel=0.05)  # the units that SAEs work in
    assert Case.fresh(CPU).l0() == pytest.approx(150, rel=0.1)


def test_a_case_is_the_same_each_time(small):
    first, second = (Case.placed(CPU, 300, 6) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.sae.b_enc, second.sae.b_enc)


def test_a_trained_sae_has_moved(small):
    placed, trained = Case.placed(CPU, 300, 6), Case.trained(CPU, 10)
    assert not torch.equal(placed.sae.W_dec, trained.sae.W_dec)
    assert math.isfinite(trained.l0())


def test_a_timed_step_changes_nothing_and_can_be_repeated(small):
    case = Case.placed(CPU, 300, 6)
    trainer = case.trainer(10)
    (before,) = trainer.saes
    for _ in range(3):
        trainer.step(case.x)
    (after,) = trainer.saes
    for old, new in ((before.W_enc, after.W_enc), (before.W_dec, after.W_dec)):
        assert torch.allclose(old.norm(), new.norm(), rtol=1e-6)


def test_the_step_part_end_to_end(small, tmp_path, capsys):
    bench.main(["--part", "step", "--repeats", "2", "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "step.json").read_text())
    assert next(iter(results["step"])) == "five dense products"
    for name, times in results["step"].items():
        assert 0 < times["q1"] <= times["median"] <= times["q3"], name
        assert name in printed
    assert results["step"]["vanilla"]["l0"] > 0
    assert results["environment"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_pair_is_trained_whole(small, tmp_path):
    bench.main(["--part", "pair", "--pair-steps", "30", "--out", str(tmp_path), "--device", "cpu"])
    times = json.loads((tmp_path / "pair.json").read_text())["pair"]
    assert times["30 steps, float32"]["median"] > 0
    assert 0 < times["30 steps, float32"]["vanilla_training_fvu"] < 1


def test_variants_take_turns():
    calls = []
    times = bench.alternate(
        {name: lambda n=name: calls.append(n) for name in ("a", "b")}, repeats=3, device=CPU
    )
    assert calls == ["a", "b"] * 4  # the first round is not counted
    assert set(times) == {"a", "b"}


def test_quartiles_are_numpys():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    found = bench._quartiles(values)
    assert found == dict(zip(("q1", "median", "q3"), np.quantile(values, (0.25, 0.5, 0.75))))  # noqa: B905


def test_the_original_is_stepped_from_the_same_weights(small):
    """With a stand-in for the module: what is handed over, and that its step is what is timed."""
    seen = []

    class MatryoshkaSAE(torch.nn.Module):
        def __init__(self, d_model, n_latents, n_prefixes, target_l0, n_steps, lr):
            super().__init__()
            self.W_enc = torch.nn.Parameter(torch.zeros(d_model, n_latents))
            self.b_enc = torch.nn.Parameter(torch.zeros(n_latents))
            self.W_dec = torch.nn.Parameter(torch.zeros(n_latents, d_model))
            self.b_dec = torch.nn.Parameter(torch.zeros(d_model))
            self.normalizer = types.SimpleNamespace(running_avg=torch.zeros(1))
            seen.append((self, n_prefixes, lr))

        def step(self, x):
            seen.append(x)

    case = Case.placed(CPU, 300, 6)
    bench_cases.original_step(types.SimpleNamespace(MatryoshkaSAE=MatryoshkaSAE), case, 10)()
    (theirs, n_prefixes, lr), x = seen
    assert (n_prefixes, lr) == (10, bench_cases.UNMOVED.lr)
    assert torch.equal(theirs.W_enc, case.sae.W_enc)
    assert torch.equal(theirs.b_enc, case.sae.b_enc)
    assert theirs.normalizer.running_avg.item() == pytest.approx(case.x.norm(dim=1).mean().item())
    assert x is case.x


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--original", "nowhere"], "nowhere"),
        (["--original", "."], "MatryoshkaSAE"),
        (["--original", "broken"], "SyntaxError"),
        (["--original", "broken/sae.py"], "no sae.py"),
        (["--original", ".", "--part", "toy"], "--part toy"),
        (["--saelens", "--part", "toy"], "--part toy"),
        (["--pair-steps", "0"], "pair-steps"),
        (["--repeats", "0"], "repeats"),
        (["--part", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(flags, named, tmp_path, capsys, monkeypatch):
    (tmp_path / "sae.py").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sae.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        bench.main([*flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
