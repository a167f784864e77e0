"""Refits against NumPy's least squares, and against any other decoder."""

import numpy as np
import pytest
import torch

from matryoshka.metrics import best_cosine, decoder_cosines, fvu
from matryoshka.refit import (
    LeastSquares,
    refit_both,
    refit_decoder,
    solve_gram,
    streamed_fvu,
    strengths_of,
)
from sae import ACTIVATIONS, SAE, seeded_generator


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed, 7))


def make_sae(seed=0):
    sae = SAE(6, 9, seed)
    sae.mean_norm.fill_(2.0)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * rand(9, seed=seed))
    return sae


def test_refit_is_least_squares():
    sae, x = make_sae(), rand(400, 6)
    refitted = refit_decoder(sae, x.split(64), ridge=0.0)
    acts = sae.encode(x).detach().double().numpy()
    design = np.concatenate([acts, np.ones((400, 1))], axis=1)
    target = (x * sae.scale).double().numpy()
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(refitted.W_dec.detach(), expected[:-1], atol=1e-5)
    np.testing.assert_allclose(refitted.b_dec.detach(), expected[-1], atol=1e-5)


def test_no_nudged_decoder_reconstructs_better():
    sae, x = make_sae(1), rand(500, 6, seed=1)
    refitted = refit_decoder(sae, [x])
    best = fvu(x, refitted(x)).item()
    assert best < fvu(x, sae(x)).item()
    for seed in range(20):
        nudged = SAE.from_tensors(refitted.state_dict())
        with torch.no_grad():
            nudged.W_dec += 0.01 * rand(9, 6, seed=seed)
            nudged.b_dec += 0.01 * rand(6, seed=seed)
        assert fvu(x, nudged(x)).item() > best


def test_the_same_latents_fire_and_the_silent_keep_their_rows():
    sae, x = make_sae(2), rand(300, 6, seed=2)
    with torch.no_grad():
        sae.b_enc[4] = -1e3
    refitted = refit_decoder(sae, x.split(100))
    assert torch.equal(refitted.encode(x), sae.encode(x))
    torch.testing.assert_close(refitted.W_dec[4], sae.W_dec[4])


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="no activations"):
        refit_decoder(make_sae(), [])


def brute_strengths(x, fires, directions, ridge):
    """A sample at a time, in float64: the ridge is a further row for each latent, of target 1."""
    x, directions, found = x.double().numpy(), directions.double().numpy(), np.zeros(fires.shape)
    for one, on, t in zip(x, fires.numpy(), found, strict=True):
        rows = directions[on]
        weight = np.sqrt(ridge * np.square(rows).sum() / max(1, on.sum()))
        design = np.concatenate([rows.T, weight * np.eye(len(rows))])
        wanted = np.concatenate([one, np.full(len(rows), weight)])
        t[on] = np.linalg.lstsq(design, wanted, rcond=None)[0].clip(min=0)
    return found


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
def test_strengths_are_least_squares_over_what_fires(ridge):
    directions, x = rand(9, 6), rand(50, 6, seed=1)
    fires = rand(50, 9, seed=2) > 0.8
    fires[0] = False
    ours = strengths_of(x, fires, directions, ridge)
    assert (ours[~fires] == 0).all()
    np.testing.assert_allclose(ours, brute_strengths(x, fires, directions, ridge), atol=1e-9)


def test_strengths_of_latents_that_hardly_anything_tells_apart_are_those_of_float64():
    """Directions 1e-4 apart, and more of them than dimensions: the ridge is all that decides."""
    one = rand(1, 6)
    directions = 100 * (one + 1e-4 * rand(12, 6, seed=1))
    x, fires = 100 * (3 * one + rand(40, 6, seed=2)), rand(40, 12, seed=3) > -0.5
    ours = strengths_of(x, fires, directions)
    np.testing.assert_allclose(ours, brute_strengths(x, fires, directions, 1e-4), atol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_strengths_of_latents_that_nothing_tells_apart_are_shared(n):
    """Equal directions: the ridge makes the problem solvable, and asks for equal strengths."""
    fires = torch.ones(1, n, dtype=torch.bool)
    for length in (2.0**-10, 1.0, 2.0**10):
        directions = length * torch.eye(3)[[0] * n]
        x = directions.sum(0, keepdim=True)
        torch.testing.assert_close(strengths_of(x, fires, directions), torch.ones(1, n).double())
        twice = strengths_of(2 * x, fires, directions)
        torch.testing.assert_close(twice, twice.mean().expand(1, n), rtol=1e-9, atol=0)
        assert twice.mean().item() == pytest.approx(2, abs=1e-3)


def test_strengths_of_latents_without_a_direction_are_1():
    t = strengths_of(torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool), torch.zeros(3, 2))
    assert t.tolist() == [[1.0, 1.0, 1.0]]


def hedged_case():
    """A parent and two exclusive children, an SAE that hedges them by hand, and samples.

    The parent's latent fires at 1.3 where a child is active, and its direction holds a part of
    both. The full reconstruction is that of x all the same.
    """
    p, c1, c2 = torch.eye(6)[:3]
    W_enc = torch.stack([p + 0.3 * (c1 + c2), c1, c2], dim=1)  # active children have strength 1
    hedged = p + 0.2 * (c1 + c2)
    W_dec = torch.stack([hedged, c1 - 0.3 * hedged, c2 - 0.3 * hedged])
    sae = SAE.from_tensors(
        {
            "W_enc": 1.1 * W_enc,
            "b_enc": torch.full((3,), -0.1),
            "W_dec": W_dec,
            "b_dec": torch.zeros(6),
            "mean_norm": torch.tensor(6**0.5),
        }
    )
    generator = seeded_generator(5)
    parent = torch.rand(4000, generator=generator) < 0.4
    which = torch.rand(4000, generator=generator)
    features = torch.stack([parent, parent & (which < 0.3), parent & (which > 0.7)], dim=1).float()
    return sae, features, features @ torch.stack([p, c1, c2])


def test_refitting_both_undoes_hedging_where_the_decoder_alone_cannot():
    sae, features, x = hedged_case()
    found = {}
    for name, one in (
        ("decoder", refit_decoder(sae, [x])),
        ("both", refit_both(sae, lambda: x.split(1000))),
    ):
        cosines = decoder_cosines(one.W_dec, torch.eye(6)[:3])
        found[name] = best_cosine(cosines).min().item()
        assert fvu(x, one(x)).item() < 1e-4, name
    assert found["decoder"] < 0.99
    assert found["both"] > 0.9999
    assert torch.equal(refit_both(sae, lambda: [x]).encode(x) > 0, features > 0)


def test_refitting_both_keeps_strengths_that_are_real():
    """Features of varying strength: what fires is not flattened to 0 or 1."""
    sae, features, _ = hedged_case()
    features = features * (0.5 + torch.rand(features.shape, generator=seeded_generator(6)))
    x = features @ torch.eye(6)[:3]
    both = refit_both(sae, lambda: [x])
    assert fvu(x, both(x)).item() < fvu(x, refit_decoder(sae, [x])(x)).item()
    kept = both.encode(x)[:, 0] * both.W_dec[0].norm()
    assert np.corrcoef(kept.detach(), features[:, 0])[0, 1] > 0.99


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_refitting_both_does_not_depend_on_the_units_of_activations(factor):
    """An SAE that is the same function, its activations in other units, becomes the same one."""
    sae, x = make_sae(3), rand(500, 6, seed=3)
    with torch.no_grad():
        sae.W_dec *= 3
    rescaled = SAE.from_tensors(sae.state_dict())
    with torch.no_grad():
        rescaled.W_enc *= factor
        rescaled.b_enc *= factor
        rescaled.W_dec /= factor
    torch.testing.assert_close(rescaled(x), sae(x))
    ours, theirs = (refit_both(one, lambda: [x])(x) for one in (sae, rescaled))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fit", [refit_decoder, lambda sae, x: refit_both(sae, lambda: x)])
def test_where_nothing_fires_the_mean_is_left(fit):
    sae, x = make_sae(4), rand(300, 6, seed=4)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    torch.testing.assert_close(fit(sae, [x])(x[:1]), x.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_what_is_not_settled_is_refused():
    sae, x = make_sae(5), rand(300, 6, seed=5)
    with torch.no_grad():
        sae.b_enc[2] = -1e3
    with pytest.raises(ValueError, match="a larger ridge"):
        refit_decoder(sae, [x], ridge=0.0)
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        refit_decoder(sae, [x])


def test_a_fit_that_rounding_alone_settles_is_refused():
    """Two latents that fire alike have no decoder of their own, in whatever units they are."""
    sae, x = make_sae(6), rand(300, 6, seed=6)
    with torch.no_grad():
        sae.W_enc[:, 3], sae.b_enc[3] = 0.25 * sae.W_enc[:, 7], 0.25 * sae.b_enc[7]
    with pytest.raises(ValueError, match="a larger ridge"):
        refit_decoder(sae, [x], ridge=0.0)
    refit_decoder(sae, [x])
    with torch.no_grad():
        sae.W_enc[:, 3], sae.b_enc[3] = 1e-6 * rand(6), 1e-7
    refit_decoder(sae, [x], ridge=0.0)  # a latent of small activations is no such latent


def test_a_latent_that_always_fires_is_not_left_to_rounding():
    """On or off tells nothing of it, so it stands for 1 throughout and keeps its row."""
    sae, x = make_sae(12).double(), 2 + rand(900, 6, seed=12).double()
    with torch.no_grad():
        sae.b_enc[5] = 1e3
    both = refit_both(sae, lambda: x.split(100))
    torch.testing.assert_close(both.encode(x)[:, 5], torch.ones(900).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(both.W_dec[5], sae.W_dec[5], rtol=0, atol=1e-6)


def test_nothing_to_refit_both_on_is_refused():
    with pytest.raises(ValueError, match="no activations"):
        refit_both(make_sae(), lambda: [])


def test_streamed_fvu_is_that_of_all_at_once():
    sae = make_sae(7)
    for x in (rand(300, 6, seed=7), 1000 + rand(300, 6, seed=7)):
        exact = fvu(x, sae(x)).item()
        assert streamed_fvu(sae, x.split(77)) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ValueError, match="all the same"):
        streamed_fvu(sae, [])
    with pytest.raises(ValueError, match="not finite"):
        streamed_fvu(sae, [x.log()[:0], torch.full((2, 6), torch.nan)])
    with pytest.raises(ValueError, match="d_model is 6"):
        streamed_fvu(sae, [x[:, :3]])


def brute_fit(u, y, prior, ridge):
    """LeastSquares in other words: the ridge is a further row for each column of u."""
    weight = np.sqrt(ridge * np.square(u).sum() / u.shape[1])
    design = np.concatenate([np.c_[u, np.ones(len(u))], weight * np.eye(u.shape[1] + 1)[:-1]])
    solution = np.linalg.lstsq(design, np.concatenate([y, weight * prior]), rcond=None)[0]
    return solution[:-1], solution[-1]


def brute_refit_both(sae, x, ridge):
    """Its four steps, in float64: the tensors, whether each latent fired, and the strengths."""
    y, W_enc, b_enc, prior = (
        t.detach().double().numpy() for t in (x * sae.scale, sae.W_enc, sae.b_enc, sae.W_dec)
    )
    preacts = y @ W_enc + b_enc
    fires = preacts > 0
    directions, origin = brute_fit(fires.astype(float), y, np.zeros((9, 6)), ridge)
    strengths = brute_strengths(*map(torch.tensor, (y - origin, fires, directions)), 1e-4)
    unit = np.where(fires, preacts, 0).sum(0) / fires.sum(0).clip(1)
    silent = (preacts / unit.clip(1e-12)).clip(-0.5, 0)
    W_enc, b_enc = brute_fit(y, np.where(fires, strengths, silent), np.zeros((6, 9)), ridge)
    acts = (y @ W_enc + b_enc).clip(min=0)
    W_dec, b_dec = brute_fit(acts, y, prior, ridge)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, fires, strengths


@pytest.mark.parametrize("ridge", [1e-4, 0.2])
def test_refitting_both_is_its_four_steps_in_float64(ridge):
    """On data whose mean is not 0, of a scale that is not 1, with latents that fire never and
    once."""
    sae, x = make_sae(8).double(), 0.5 + rand(900, 6, seed=8).double()
    with torch.no_grad():
        sae.b_enc[4] = -1e3
        highest = (x * sae.scale @ sae.W_enc)[:, 3].topk(2).values
        sae.b_enc[3] = -highest.mean()
    found = refit_both(sae, lambda: x.split(250), ridge)
    tensors, fires, strengths = brute_refit_both(sae, x, ridge)
    for name, expected in tensors.items():
        ours = getattr(found, name).detach()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert (strengths == 0).sum() > (~fires).sum()  # some were clipped at 0
    assert not fires.all(0).any()
    assert fires.sum(0)[[3, 4]].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_reconstructed_is_settled_even_where_a_latent_fires_on_all_samples(dtype):
    """Such a latent is another bias: how the two share what they reconstruct is rounding."""
    sae, x = make_sae(8).to(dtype), 2 + rand(900, 6, seed=8).to(dtype)
    found = refit_both(sae, lambda: x.split(250), 1e-4)
    tensors, fires, _ = brute_refit_both(sae, x, 1e-4)
    assert fires.all(0).any()
    y = (x * sae.scale).double().numpy()
    acts = (y @ tensors["W_enc"] + tensors["b_enc"]).clip(min=0)
    expected = (acts @ tensors["W_dec"] + tensors["b_dec"]) / sae.scale.item()
    np.testing.assert_allclose(found(x).detach(), expected, atol=TOLERANCE[dtype])


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 1e3])
def test_the_ridge_is_a_share_of_the_mean_square_and_draws_to_the_old_decoder(ridge):
    sae, x = make_sae(9).double(), 2 + rand(300, 6, seed=9).double()
    acts, y = sae.encode(x).detach().numpy(), (x * sae.scale).numpy()
    W_dec, b_dec = brute_fit(acts, y, sae.W_dec.detach().numpy(), ridge)
    found = refit_decoder(sae, x.split(64), ridge)
    np.testing.assert_allclose(found.W_dec.detach(), W_dec, atol=1e-9)
    np.testing.assert_allclose(found.b_dec.detach(), b_dec, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fit", [refit_decoder, lambda sae, x: refit_both(sae, lambda: x)])
def test_other_formats_are_fitted_in_float32_at_least_and_keep_their_own(dtype, fit):
    sae, x = make_sae(10).to(dtype), rand(400, 6, seed=10).to(dtype)
    plain = SAE.from_tensors(sae.state_dict()).float()
    found, expected = fit(sae, x.split(50)), fit(plain, x.float().split(50))
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == dtype
        eps = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(
            tensor.double(), expected.state_dict()[name].double(), rtol=10 * eps, atol=eps
        )
    before, after = (streamed_fvu(one, [x]) for one in (plain, found))
    assert fit is not refit_decoder or after < before


def test_sequences_and_single_activations_are_rows():
    sae, x = make_sae(11), rand(60, 6, seed=11)
    rows = refit_decoder(sae, [x])
    shaped = refit_decoder(sae, [x[:1].view(6), x[1:46].view(5, 9, 6), x[46:]])
    torch.testing.assert_close(shaped.W_dec, rows.W_dec)
    with pytest.raises(ValueError, match="d_model is 6"):
        refit_decoder(sae, [x.view(30, 12)])


def test_a_refit_is_a_copy_that_keeps_what_the_sae_is(monkeypatch):
    sae, x = make_sae(12), rand(200, 6, seed=12)
    sae.about = {"seed": 12}
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for refitted in (refit_decoder(sae, [x]), refit_both(sae, lambda: [x])):
        assert (refitted.activation, refitted.about) == ("relu", {"seed": 12})
        assert not torch.equal(refitted.W_dec, sae.W_dec)
        assert torch.equal(refitted.mean_norm, sae.mean_norm)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())

    monkeypatch.setitem(ACTIVATIONS, "double", lambda preacts, gate: 2 * preacts.relu())
    other = SAE.from_tensors(sae.state_dict(), "double")
    for dtype in (torch.float32, torch.bfloat16):
        plain = SAE.from_tensors(sae.to(dtype).state_dict())
        other = SAE.from_tensors(sae.state_dict(), "double")
        doubled, single = (refit_decoder(one, [x], 1e-9) for one in (other, plain))
        assert doubled.activation == "double"
        torch.testing.assert_close(2 * doubled.W_dec, single.W_dec, rtol=0.02, atol=0.01)
    with pytest.raises(ValueError, match="for relu alone, not for double"):
        refit_both(other, lambda: [x])


def test_least_squares_of_u_that_is_0_throughout_is_the_prior():
    """Then the ridge itself is what the prior weighs, and b is the mean."""
    prior, y = rand(3, 2), rand(20, 2, seed=1)
    problem = LeastSquares(prior)
    problem.add(torch.zeros(20, 3), y)
    W, b = problem.solve(1e-6)
    torch.testing.assert_close(W, prior.double())
    torch.testing.assert_close(b, y.double().mean(0))


def test_a_gram_matrix_is_solved_in_any_units():
    u, units = rand(50, 4).double(), torch.tensor([1e-120, 1.0, 1e9, 1e100], dtype=torch.float64)
    solution = rand(4, 3, seed=1).double()
    gram = (u * units).T @ (u * units)
    found = solve_gram(gram, gram @ (solution / units[:, None]), gram.diagonal())
    torch.testing.assert_close(found * units[:, None], solution, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        solve_gram(gram, torch.full((4, 3), torch.inf).double(), gram.diagonal())


@pytest.mark.parametrize("off_diagonal", [1 - 2.0**-53, 2.0])
def test_a_gram_matrix_that_rounding_settles_or_that_is_none_is_refused(off_diagonal):
    """The first has a factor, of a pivot that is all rounding; the second is not positive."""
    gram = torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="a larger ridge"):
        solve_gram(gram, torch.ones(2, 1, dtype=torch.float64), gram.diagonal())


def test_more_samples_than_are_held_at_once_are_all_fitted(monkeypatch):
    sae, x = make_sae(13), rand(300, 6, seed=13)
    whole = refit_both(sae, lambda: [x])
    monkeypatch.setattr("matryoshka.refit.SAMPLES_AT_ONCE", 7)
    torch.testing.assert_close(refit_both(sae, lambda: [x]).W_enc, whole.W_enc)


def test_fvu_of_reconstructions_that_are_not_finite_is_refused():
    sae, x = make_sae(14), rand(50, 6, seed=14)
    with torch.no_grad():
        sae.W_dec.fill_(3e38)
    with pytest.raises(ValueError, match="reconstructions are not finite"):
        streamed_fvu(sae, [x])
