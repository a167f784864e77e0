"""The README's numbers against results/, and the README's own promises."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import evaluate
import report
from sae import SAE
from script import UserError

README = (report.ROOT / "README.md").read_text()


def test_every_table_in_the_readme_is_what_results_say():
    assert report.with_tables(README) == README


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_is_in_the_readme(name):
    assert f"<!-- table {name} -->" in README


def test_a_wrong_number_would_be_seen():
    first = re.search(r"<!-- table toy -->\n(.*?)<!-- end -->", README, re.DOTALL)[1]
    digit = re.search(r"0\.\d+", first)[0]
    assert report.with_tables(README.replace(digit, "0.9999")) == README


def test_numbers_in_prose_are_what_results_say():
    """Those that stand outside a table."""
    prose = " ".join(README.split())
    matryoshka = report.runs_of(report.read("toy/results.json"), "matryoshka")
    n_whole = sum(run["clean_features"] == 20 for run in matryoshka)
    assert f"recovers all in {n_whole} of the hundred" in prose
    assert 7.5 <= 100 / (100 - n_whole) < 8.5
    assert "one Matryoshka seed in eight fails" in prose

    whole = report.read("bench/toy-whole.json")["toy-whole"]
    one, ten = (whole[f"train_toy.py, {n}"]["median"] / 1e3 for n in ("1 seed", "10 seeds"))
    assert f"{one:.1f} s for one seed of both SAEs and {ten:.0f} s for ten" in prose

    took = [report.read(f"{folder}/results.json")["seconds"] for folder in report.RECIPES.values()]
    assert f"took {min(took):.0f} to {max(took):.0f} s" in prose

    for folder in report.RECIPES.values():  # "below 0.0001 with every feature ... over 0.99"
        results = report.read(f"{folder}/results.json")
        whole = report.whole_seeds(results)
        for run in report.runs_of(results, "matryoshka, refit both"):
            assert run["seed"] not in whole or run["fvu"] < 1e-4
            assert run["seed"] not in whole or run["clean_at"]["0.99"] == 20
    graded = report.read("trees/graded_0.json")
    both = report.runs_of(graded, "matryoshka, refit both")
    assert sum(run["clean_features"] < 20 for run in both) == 1  # "one seed of ten"
    absorbed = [a for r in report.runs_of(graded, "vanilla") for a in r["absorption"] if a]
    n_children = 9 * 10
    assert round(100 * sum(absorbed) / n_children) == 4

    times = {n: t["median"] for n, t in report.read("bench/growth.json")["growth"].items()}
    (small, large), (few, many) = (
        [times[f"{n} latents{what}"] for n in (3072, 49152)] for what in ("", ", five products")
    )
    grown = f"grows by {large - small:.0f} ms, the five products by {many - few:,.0f} ms"
    assert f"{grown}; as a ratio, {large / small:.1f} times against {many / few:.1f} times" in prose
    rounded = times["49152 latents, bfloat16"] / times["3072 latents, bfloat16"]
    assert f"In bfloat16 that is {rounded:.1f} times." in prose

    steps = report.read("bench/step.json")["step"]
    for name in ("vanilla", "matryoshka, 10 prefixes"):
        assert abs(steps[name]["l0"] - 30) < 1.5
    encode, whole = (
        steps[name]["median"] for name in ("of these: encode", "matryoshka, 10 prefixes")
    )
    assert 0.44 < encode / whole < 0.6  # "half of the step"
    names = ("matryoshka, 10 prefixes", "vanilla", "matryoshka, 10 prefixes, fresh")
    original, ours, rounded = (
        np.array([steps[kind + name]["median"] for name in names])
        for kind in ("the original: ", "", "bfloat16: ")
    )
    x, y, z = (f"{ratio:.1f}" for ratio in original / ours)
    assert f"ours takes {x} times less time at ten prefixes" in prose
    low = steps["the original: matryoshka, 10 prefixes"]["q1"] / ours[0]
    assert f"({low:.1f} times less than its lower quartile: it spreads widely)" in prose
    slower = f", {y} at one, and {z} where both are fresh; in bfloat16"
    x, y, z = (f"{ratio:.1f}" for ratio in original / rounded)
    assert f"{slower} {x}, {y} and {z}." in prose
    trained, _, fresh = (f"{ratio:.2f}" for ratio in rounded / ours)
    assert f"step takes {trained} of the time and a fresh one's {fresh}" in prose

    counts = [report.read("toy_ablation/ablation.json")["variants"][v] for v in ("none", "all")]
    none, everything = (c["matryoshka"]["clean_features"]["20"] for c in counts)
    p = scipy.stats.fisher_exact([[none, 20 - none], [everything, 20 - everything]]).pvalue
    assert f"do not tell {none} from {everything} (Fisher's exact test: p = {p:.2f})" in prose

    for seed in range(report.STANDIN_SEEDS):
        training = report.read(f"tinystories_standin/seed{seed}_training.json")
        assert all(abs(run["final_l0"] / 20 - 1) < 0.0025 for run in training["runs"])
        assert round(training["passes"]) == 18
    below = [100 * (1 - run["l0"] / 20) for run in report.standin_runs("seed{}", "matryoshka")]
    ours, expected, refit, expected_refit = (
        np.array([run["fvu"] for run in report.standin_runs(folder, "matryoshka")])
        for folder in ("seed{}", "expected_seed{}", "seed{}_refit", "expected_seed{}_refit")
    )
    assert abs(ours.mean() - expected.mean()) < ours.std(ddof=1)  # "within the spread"
    assert (expected_refit < refit).all()  # "in every seed, by about a hundredth"
    assert 0.005 < 1 - expected_refit.mean() / refit.mean() < 0.015
    change = {
        key: max(
            abs(100 * (ours[key] / exact[key] - 1))
            for folder in ("bfloat16_seed{}", "bfloat16_dense_seed{}")
            for sae in ("matryoshka", "vanilla")
            for ours, exact in zip(
                report.standin_runs(folder, sae), report.standin_runs("seed{}", sae), strict=True
            )
        )
        for key in ("fvu", "l0")
    }
    changed = f"change FVU by at most {change['fvu']:.2f}% in any seed and L0 by at most"
    assert f"{changed} {change['l0']:.2f}%" in prose
    assert max(change.values()) < 1
    both = report.standin_runs("seed{}_refit_both", "matryoshka")
    assert 0.3 < np.mean([run["dead_share"] for run in both]) < 1 / 3
    assert f"L0 falls to {np.mean([run['l0'] for run in both]):.1f}" in prose
    assert 1.4 < np.mean([run["fvu"] for run in both]) / refit.mean() < 1.55
    assert f"by {min(below):.1f} to {max(below):.1f}%, after 18 passes" in prose


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="no table nonsense"):
        report.with_tables("<!-- table nonsense -->\nx\n<!-- end -->")


def test_the_own_activations_example_runs_as_it_stands(tmp_path, monkeypatch):
    """Under fifteen lines, and what it prints about prefixes holds."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    saved = SAE.load("sae.safetensors")
    x = names["acts"]
    assert torch.equal(saved(x), names["sae"](x))
    acts = saved.encode(x)
    assert torch.equal(names["x_hat"], saved.decode(acts, prefix=32))
    assert 4 < evaluate.l0(acts) < 12  # the target is 8
    assert evaluate.fvu(x, saved(x)) < 0.9


def test_links_lead_somewhere():
    """Every relative link and picture of the README is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(report.ROOT) / target).exists(), target
