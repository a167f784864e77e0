"""The loss at the true dictionary, beside where training ends."""

import json

import pytest
import torch

from matryoshka.prefix_draws import expected_reach
from sae import SAE, matryoshka_loss, sample_prefixes, seeded_generator
from studies import true_solution
from studies.true_solution import Loss, descended, in_order, parameters, scores, true_sae
from toy_model import FeatureTree, ToyData


@pytest.fixture(scope="module")
def data() -> ToyData:
    return ToyData(FeatureTree.from_json("tree.json"), d_model=20)


def random_sae() -> SAE:
    sae = SAE(20, 20, seed=3).requires_grad_(False)
    return sae.with_tensors(b_enc=sae.b_enc + 0.1, W_dec=sae.W_dec * 5)


def test_the_loss_is_the_mean_over_drawn_prefixes(data):
    sae, (_, x) = random_sae().requires_grad_(False), data.held_out(0, 200)
    drawn = sample_prefixes(20, 10, seeded_generator(1), n_draws=2000)
    x, acts = x * sae.scale, sae.encode(x)
    each = torch.stack(
        [matryoshka_loss(x, acts, sae.W_dec, sae.b_dec, lengths, None, 0.3) for lengths in drawn]
    )
    found = Loss(expected_reach(20, 10), 0.3, is_tied=False)(x, parameters(sae))
    error = each.std() / len(each) ** 0.5
    assert abs(float(found - each.mean())) < 4 * float(error)


def test_of_a_tied_encoder_only_what_is_along_the_decoder_counts(data):
    sae, (_, x) = random_sae(), data.held_out(0, 50)
    loss = Loss(torch.ones(20, dtype=torch.float64), 0.3, is_tied=True)
    W_enc, b_enc, W_dec, b_dec = parameters(sae)
    aside = torch.randn(20, 20, generator=seeded_generator(2))
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    aside -= unit.T * (aside * unit.T).sum(0)
    torch.testing.assert_close(
        loss(x, [W_enc + aside, b_enc, W_dec, b_dec]), loss(x, [W_enc, b_enc, W_dec, b_dec])
    )


def test_the_true_sae_explains_all_where_features_are_orthogonal(data):
    features, x = data.held_out(0, 2000)
    sae = true_sae(random_sae(), data.directions(0), x)
    torch.testing.assert_close(sae(x), x, atol=1e-5, rtol=0)
    acts = sae.encode(x)
    assert ((acts > 1e-3).sum(1) == (features > 0).sum(1)).all()


def test_a_descent_lowers_the_loss_and_may_hold_the_decoder(data):
    _, x = data.held_out(0, 2000)
    start = true_sae(random_sae(), data.directions(0), x)
    start = start.with_tensors(W_enc=start.W_enc * 0.5)
    loss = Loss(expected_reach(20, 10), 0.1, is_tied=False)
    batches = data.batches([0], 200, torch.device("cpu"))
    held = descended(start, loss, batches, 60, holds_decoder=True)
    free = descended(start, loss, batches, 60)
    assert torch.equal(held.W_dec, start.W_dec)
    assert not torch.equal(free.W_dec, start.W_dec)
    before = scores(start, loss, x, data.directions(0))
    for after in (held, free):
        assert scores(after, loss, x, data.directions(0))["loss"] < before["loss"]
    assert scores(held, loss, x, data.directions(0))["clean"] == 20


def test_latents_in_order_reconstruct_the_same(data):
    _, x = data.held_out(0, 500)
    sae, ordered = random_sae(), in_order(random_sae(), x)
    torch.testing.assert_close(ordered(x), sae(x))
    size = (ordered.encode(x) * ordered.W_dec.norm(dim=1)).square().mean(0)
    assert (size.diff() <= 0).all()


def test_the_study_end_to_end(tmp_path, capsys, monkeypatch):
    kinds = {kind: true_solution.KINDS[kind] for kind in ("tied", "vanilla")}
    monkeypatch.setattr(true_solution, "KINDS", kinds)
    arguments = ["--d-model", "14", "--seeds", "1", "--train-steps", "40", "--n-steps", "5"]
    true_solution.main([*arguments, "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "true_solution.json").read_text())["runs"]
    assert {(run["kind"], run["point"]) for run in runs} == {
        (kind, point)
        for kind in ("tied", "vanilla")
        for point in ("trained", "trained, on", "truth", "truth, on")
    }
    assert all(run["clean"] == 20 for run in runs if run["point"] == "truth")
    assert "tied, truth, on" in capsys.readouterr().out
