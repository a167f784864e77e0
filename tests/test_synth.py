"""The study on synthetic models: a model of seconds made here, and SAELens's where it is there."""

import json

import pytest
import torch
from synth_factory import SIZE, drawn, write_samples

import train
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.metrics import fvu
from matryoshka.truth_scores import TruthScores
from sae import SAE
from studies import synth, synth_data, synth_peers
from studies.synth_data import read_truth

pytestmark = pytest.mark.usefixtures("one_thread")

SAES = ("vanilla_relu", "matryoshka_batchtopk")


@pytest.fixture
def small(monkeypatch):
    """The size `mini`, so small that it takes seconds."""
    monkeypatch.setitem(synth_data.SIZES, "mini", SIZE)


@pytest.fixture
def data(tmp_path, small):
    write_samples(tmp_path / "data")
    return tmp_path / "data"


def config_for(folder, **settings):
    at = {name: str(folder.parent / name) for name in ("runs", "ours.json")}
    common = {"saes": SAES, "seeds": (0, 1), "runs": at["runs"], "out": at["ours.json"]}
    return synth.Config(**common | {"data": str(folder)} | settings)


def test_the_truth_is_what_was_written(data):
    truth = read_truth(data)
    directions, active, _ = drawn(SIZE.n_held_out, 2)
    assert torch.equal(truth.directions, directions)
    for start, stop in ((0, 300), (1, 2), (7, 90), (290, 400)):
        assert torch.equal(truth.fired(start, stop), active[start:stop])
    assert truth.l0 == pytest.approx(active.sum().item() / 300)


def test_scores_over_batches_are_those_of_all_samples_at_once(data, monkeypatch):
    monkeypatch.setattr(synth, "BATCH_SIZE", 70)
    sae = SAE(SIZE.d_model, SIZE.n_latents, seed=1).requires_grad_(False)
    directions, active, x = drawn(SIZE.n_held_out, 2)
    acts, x_hat = sae.encode(x), sae(x)
    every = TruthScores(sae.W_dec, directions)
    every.add(acts, active, x, x_hat)
    found = synth.score(sae, ActivationCache(data / "held_out"), read_truth(data))
    expected = every.summary() | {
        "fvu": float(fvu(x, x_hat)),
        "l0": float((acts > 0).sum() / len(x)),
        "dead": int((acts <= 0).all(0).sum()),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_sae_of_every_seed_is_trained_once(data, monkeypatch):
    first = synth.run(config_for(data, seeds=(0,)))
    results = synth.run(config_for(data))
    assert results["runs"][:4] == first["runs"]
    shown = [name + how for name in SAES for how in ("", ", refit")]
    assert [(r["sae"], r["seed"]) for r in results["runs"]] == [
        (s, k) for k in (0, 1) for s in shown
    ]
    runs = data.parent / "runs"
    (member,) = json.loads((runs / "matryoshka_batchtopk_seed0.json").read_text())["sae"]
    assert member["widths"] == [2, 12]
    sae = SAE.load(runs / "matryoshka_batchtopk_seed0" / "matryoshka_batchtopk.safetensors")
    assert sae.k == pytest.approx(read_truth(data).l0, abs=0.01)
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("it was trained"))
    assert synth.run(config_for(data)) == results
    assert str(data.parent) not in (data.parent / "ours.json").read_text()


def test_results_of_other_settings_are_not_added_to(data):
    synth.run(config_for(data, seeds=(0,), saes=SAES[:1]))
    with pytest.raises(
        UserError, match=r"ours.json has runs of another config: give another --out"
    ):
        synth.run(config_for(data, n_steps=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saes": ("vanilla",)}, "--saes vanilla is none of matryoshka_batchtopk, "),
        ({"data": "nowhere"}, "nowhere/truth.safetensors is not there, or damaged"),
        ({"size": "16k"}, "has samples of size mini, not 16k"),
    ],
)
def test_what_cannot_be_right_is_refused(data, settings, message):
    with pytest.raises(UserError, match=message):
        synth.run(config_for(data, **settings))


def test_a_peer_is_trained_at_every_rate_and_then_at_the_best(small):
    config = synth_peers.Config(seeds=(5, 6, 7))
    runs, asked = [{"sae": "other", "seed": 5, "lr": 1e-2, "f1": 1.0}], []
    for seed, lr in synth_peers.still_to_do(config, "saelens_batchtopk", runs):
        asked.append((seed, lr))
        runs.append({"sae": "saelens_batchtopk", "seed": seed, "lr": lr, "f1": 1 - lr})
    assert asked == [(5, 1e-2), (5, 3e-3), (6, 3e-3), (7, 3e-3)]
    assert list(synth_peers.still_to_do(config, "saelens_batchtopk", runs)) == []


def test_saelens_draws_the_samples_once_and_trains_its_own_on_them(small, tmp_path):
    pytest.importorskip("sae_lens")
    data = tmp_path / "data"
    config = synth_data.Config(out=str(data))
    first = synth_data.run(config)
    assert (first["train"], first["held_out"], first["n_features"]) == (400, 300, 100)
    assert synth_data.run(config) == first
    with pytest.raises(UserError, match="give another --out"):
        synth_data.run(synth_data.Config(out=str(data), samples=5))
    truth = read_truth(data)
    x = ActivationCache(data / "held_out").acts(0, 300).float()
    none_active = (~truth.fired(0, 300)).all(1)
    assert (x[none_active] - x[none_active][:1]).abs().max() < 1e-2  # the model's bias alone

    at = {"data": str(data), "runs": str(tmp_path / "peers"), "out": str(tmp_path / "peers.json")}
    results = synth_peers.run(synth_peers.Config(seeds=(0, 1), **at))
    assert len(results["runs"]) == 2 * (2 + 1)
    assert synth_peers.run(synth_peers.Config(seeds=(0, 1), **at)) == results
    assert all(0 <= run["f1"] <= 1 and run["l0"] > 0 for run in results["runs"])


def run_of(sae, seed, lr, f1, **more):
    scores = dict.fromkeys(("precision", "recall", "mcc", "uniqueness", "shrinkage"), 0.5)
    return (
        {"sae": sae, "seed": seed, "lr": lr, "f1": f1, "fvu": 0.25, "l0": 2.0, "dead": 3}
        | scores
        | more
    )


def test_the_table_is_of_the_rate_that_all_seeds_were_trained_at():
    ours = [run_of("ours", seed, 1e-3, f1) for seed, f1 in ((0, 0.5), (1, 0.7))]
    peers = [run_of("peer", 0, lr, f1) for lr, f1 in ((1e-3, 0.3), (3e-4, 0.6))]
    peers += [run_of("peer", 1, 3e-4, 0.8, dead=4)]
    text = synth.summary({"sources": [{"true_l0": 2.5}], "runs": ours}, {"runs": peers})
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert head[:3] == ["2 seeds, true L0 2.50", "lr", "F1"]
    assert rows[0][:3] == ["ours", "0.001", "0.600 ± 0.141"]
    assert rows[1][:3] == ["peer", "0.0003", "0.700 ± 0.141"]
    assert rows[1][-3:] == ["0.750 ± 0.000", "2.00", "3.5"]


@pytest.mark.parametrize("best", [0.01, 3e-3, 1e-3])
def test_of_rates_with_as_many_seeds_the_best_is_shown(best):
    runs = [run_of("once", 0, lr, 0.5 if lr == best else 0.4) for lr in (0.01, 3e-3, 1e-3)]
    row = synth.summary({"sources": [{"true_l0": 2.5}], "runs": runs}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["once", f"{best:g}", "0.500"]
