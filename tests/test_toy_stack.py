"""What a stack of the toy's seeds is measured by, against SAEs whose figures are known."""

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_toy
from matryoshka import toy_stack
from matryoshka.errors import UserError
from matryoshka.toy_progress import Progress
from matryoshka.toy_stack import Member, measure, score, steps_to
from sae import SAE
from toy_model import FeatureTree, ToyData

DATA = ToyData(FeatureTree.from_json(Path(__file__).parents[1] / "tree.json"), 20)
CONFIG = train_toy.checked(train_toy.Config(n_eval=5_000, threshold=0.95), DATA.tree)


def ideal(seed: int = 0, cosines: Any = 1.0, dead: int = 0) -> SAE:
    """An SAE whose latent f is feature f, at a cosine of `cosines`; the last `dead` never fire."""
    directions = DATA.directions(seed).double()
    unit = directions / directions.norm(dim=1, keepdim=True)
    cosines = torch.as_tensor(cosines, dtype=torch.float64).expand(20)[:, None]
    towards = unit.roll(1, dims=0)  # orthogonal to the feature's own direction
    decoder = cosines * unit + (1 - cosines**2).sqrt() * towards
    bias = torch.full((20,), -0.01)
    bias[20 - dead :] = -100
    return SAE(20, 20).with_tensors(
        W_enc=torch.linalg.inv(directions).float() / math.sqrt(20),
        b_enc=bias,
        W_dec=(decoder * directions.norm(dim=1, keepdim=True) * math.sqrt(20)).float(),
        b_dec=torch.zeros(20),
        mean_norm=torch.tensor(1.0),
    )


def test_an_ideal_sae_is_clean_everywhere():
    row = score(CONFIG, DATA, ideal(3), Member("any", 3))
    features, _ = DATA.held_out(3, 5_000)
    assert (row["sae"], row["seed"], row["n_features"]) == ("any", 3, 20)
    assert row["clean_features"] == 20
    assert row["clean_at"] == {"0.9": 20, "0.95": 20, "0.99": 20}
    assert row["lost"] == {"parent": 0, "child": 0, "rare": 0}
    assert row["fvu"] < 1e-3
    assert row["l0"] == pytest.approx(float((features > 0).sum(1).double().mean()))
    assert row["dead_share"] == 0
    assert row["absorption"] == ([None] + [0.0] * 3) * 3 + [None] * 8
    assert row["edges"] == {"found": 9, "wrong": 0, "missing": 0}
    assert row["truth_scores"] == pytest.approx(
        dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness", "shrinkage"), 1.0),
        abs=0.02,
    )
    other_seed = score(CONFIG, DATA, ideal(3), Member("any", 4))
    assert other_seed["clean_features"] < 20


def test_each_threshold_counts_its_own_and_what_is_lost_is_told_by_kind():
    cosines = torch.ones(20)
    cosines[0] = 0.92  # a parent
    cosines[1] = cosines[2] = 0.96  # children
    cosines[12] = 0.5  # a rare one
    row = score(CONFIG, DATA, ideal(0, cosines), Member("any", 0))
    best = [round(float(c), 4) for c in row["best_cosine"]]
    assert best[:3] == [0.92, 0.96, 0.96]
    assert row["clean_at"] == {"0.9": 19, "0.95": 18, "0.99": 16}
    assert row["clean_features"] == 18, "at the threshold that was asked for"
    assert row["lost"] == {"parent": 1, "child": 0, "rare": 1}


def test_latents_that_never_fire_are_dead_and_a_dead_parent_absorbed():
    row = score(CONFIG, DATA, ideal(0, dead=5), Member("any", 0))
    assert row["dead_share"] == 0.25
    silent_parent = ideal()
    silent_parent.b_enc.data[4] = -100
    row = score(CONFIG, DATA, silent_parent, Member("any", 0))
    assert row["absorption"][:12] == [None, 0, 0, 0, None, 1, 1, 1, None, 0, 0, 0]


def test_curves_measure_each_sae_on_its_own_samples_and_features():
    saes = [ideal(3), ideal(4, 0.97), ideal(3)]
    xs = [DATA.held_out(seed, 1_000)[1] for seed in (3, 4, 4)]
    directions = [DATA.directions(seed) for seed in (3, 4, 4)]
    found = measure(saes, xs, directions, with_refit=False)
    assert found.keys() == {"l0", "fvu", "worst_cosine"}
    np.testing.assert_allclose(found["worst_cosine"][:2], [1, 0.97], atol=1e-5)
    assert found["worst_cosine"][2] < 0.9, "the third is of another seed"
    assert found["fvu"][0] < 1e-3 < found["fvu"][1] < found["fvu"][2]
    features = DATA.held_out(3, 1_000)[0]
    assert found["l0"][0] == pytest.approx(float((features > 0).sum(1).double().mean()))
    refitted = measure(saes, xs, directions, with_refit=True)
    np.testing.assert_allclose(refitted["worst_cosine_refit"][:2], [1, 1], atol=1e-3)
    np.testing.assert_array_equal(refitted["worst_cosine"], found["worst_cosine"])


def test_steps_to_is_the_first_record_after_which_all_stay_clean():
    worst = np.array([0.2, 0.91, 0.89, 0.96, 0.97])
    steps = np.array([10, 20, 30, 40, 45])
    assert steps_to(steps, worst) == {"0.9": 40, "0.95": 40, "0.99": None}
    assert steps_to(steps, worst + 0.8)["0.99"] == 10
    assert steps_to(steps, np.full(5, 0.9))["0.9"] is None, "clean is above the threshold"


class Perfect:
    """A trainer that knows the features from its first step on."""

    def __init__(self, saes: list[SAE], configs: list[Any], seeds: list[int]):
        self.seeds, self.n = seeds, 0

    @property
    def saes(self) -> list[SAE]:
        return [ideal(seed, 1.0 if self.n >= 20 else 0.92) for seed in self.seeds]

    def step(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.n += 1
        return {"sparsity_weight": torch.full((len(self.seeds),), float(self.n))}


def stack_of(n_steps: int, refit: bool = False, seeds: tuple[int, ...] = (1, 2)) -> Any:
    config = train_toy.Config(n_steps=n_steps, n_eval=500, refit=refit, batch_size=10)
    config = train_toy.checked(config, DATA.tree)
    progress = Progress(multiprocessing.get_context("spawn"), config.saes)
    kind: Any = Perfect
    return toy_stack.train_stack(config, DATA, seeds, progress, kind), progress


def test_a_stack_is_recorded_two_hundred_times_and_at_its_last_step():
    result, progress = stack_of(30)
    assert result.curves["step"].tolist() == list(range(1, 31))
    assert result.curves["sparsity_weight"].tolist() == [[float(t)] * 4 for t in range(1, 31)]
    assert result.curves["l0"].shape == (30, 4)
    assert progress.steps.value == 30
    assert [run["steps_to"] for run in result.runs] == [{"0.9": 1, "0.95": 20, "0.99": 20}] * 4
    result, progress = stack_of(450)
    assert result.curves["step"].tolist() == [*range(2, 451, 2)]
    assert progress.steps.value == 450


def test_refits_follow_the_trained_and_are_followed_apart():
    result, _ = stack_of(25, refit=True)
    names = [(run["sae"], run["seed"]) for run in result.runs]
    assert names == [
        (name + how, seed)
        for how in ("", ", refit", ", refit both")
        for name in ("matryoshka", "vanilla")
        for seed in (1, 2)
    ]
    steps = [run.get("steps_to") for run in result.runs]
    assert steps[:4] == [{"0.9": 1, "0.95": 20, "0.99": 20}] * 4
    assert steps[4:8] == [{"0.9": 1, "0.95": 1, "0.99": 1}] * 4, "a refit mends the decoder at once"
    assert steps[8:] == [None] * 4
    assert [sae.about["name"] for sae in result.saes] == [name for name, _ in names]
    assert result.sae("vanilla, refit") is result.saes[6]


def test_samples_that_are_all_the_same_are_refused_before_training():
    never = FeatureTree.from_dict({"active_prob": 1, "children": [{"active_prob": 1e-9}]})
    data = ToyData(never, 20)
    config = train_toy.checked(train_toy.Config(n_eval=500, n_prefixes=1), never)
    progress = Progress(multiprocessing.get_context("spawn"), config.saes)
    with pytest.raises(UserError, match="500 held-out samples of seed 6 are all the same"):
        toy_stack.train_stack(config, data, [6], progress)
    assert progress.steps.value == 0


def test_a_refit_that_is_impossible_is_one_line(monkeypatch):
    def impossible(sae: SAE, x: torch.Tensor) -> SAE:
        raise ValueError("no unique solution")

    monkeypatch.setitem(toy_stack.REFITS, ", refit", impossible)
    with pytest.raises(UserError, match=r"no refit is possible \(no unique solution\): --no-refit"):
        stack_of(3, refit=True)


def test_an_fvu_that_is_no_number_names_the_sae_and_what_was_before():
    members = [Member("matryoshka", 3), Member("vanilla", 3)]
    good = {"fvu": np.array([0.5, 0.25]), "l0": np.array([4.0, 2.0]), "step": np.array(7)}
    bad = {"fvu": np.array([0.5, np.nan]), "l0": np.array([4.0, 2.0])}
    toy_stack.check_finite(8, members, good, [])
    with pytest.raises(UserError, match=r"step 8: the vanilla SAE of seed 3 has an FVU of nan; "
                       r"at step 7 FVU was 0\.25, L0 2\. Try a lower --lr"):  # fmt: skip
        toy_stack.check_finite(8, members, bad, [good])
    with pytest.raises(UserError, match="there were no earlier metrics"):
        toy_stack.check_finite(1, members, bad, [])


def test_progress_shows_every_sae_in_the_width_there_is():
    progress = Progress(multiprocessing.get_context("spawn"), ["matryoshka", "vanilla"])
    assert progress.text(80) == "", "nothing is known yet"
    progress.show({
        "l0": np.array([1.25, 9, 0.5, 9]),
        "fvu": np.array([0.03, 9, 0.001, 9]),
        "sparsity_weight": np.array([0.2, 9, 0.1, 9]),
    })  # fmt: skip
    long = "matryoshka L0 1.25 FVU 0.030 weight 0.2; vanilla L0 0.50 FVU 0.001 weight 0.1"
    assert progress.text(200) == progress.text(len(long)) == long
    short = "matryoshka L0 1.25 FVU 0.030; vanilla L0 0.50 FVU 0.001"
    assert progress.text(len(long) - 1) == progress.text(len(short)) == short
    assert progress.text(len(short) - 1) == "matryoshka 1.25 0.030; vanilla 0.50 0.001"
    progress.advance(3)
    progress.advance(4)
    assert progress.steps.value == 7
    progress.stop.set()
    with pytest.raises(KeyboardInterrupt):
        progress.advance(1)


def test_views_put_latents_in_the_order_of_the_features():
    sae = ideal(0)
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = sae.with_tensors(
        W_enc=sae.W_enc[:, shuffle], b_enc=sae.b_enc[shuffle], W_dec=sae.W_dec[shuffle]
    )
    features, x = DATA.held_out(0, 300)
    acts, decoder, encoder = toy_stack.matched_views(DATA, shuffled, 0, x)
    lengths = DATA.directions(0).norm(dim=1)
    torch.testing.assert_close(acts, features * lengths, atol=0.05, rtol=0)
    torch.testing.assert_close(decoder, torch.eye(20).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder, torch.eye(20).double(), atol=1e-5, rtol=0)


def test_a_feature_without_a_latent_is_nan_in_every_view():
    sae = SAE(20, 7)
    views = toy_stack.matched_views(DATA, sae, 0, DATA.held_out(0, 10)[1])
    missing = views[1].isnan().all(dim=1)
    assert missing.sum() == 13
    assert torch.equal(views[0].isnan().all(dim=0), missing)
    assert torch.equal(views[2].isnan().all(dim=1), missing)
