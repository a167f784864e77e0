"""The metrics against closed forms, and against loops in float64 written here."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import (
    absorption_rate,
    best_cosine,
    clean_features,
    dead_share,
    decoder_cosines,
    fvu,
    l0,
    match_latents,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fvu_by_loop(x, x_hat):
    n, d = len(x), len(x[0])
    mean = [math.fsum(row[k] for row in x) / n for k in range(d)]
    residual = math.fsum(
        (a - b) ** 2 for p, q in zip(x, x_hat, strict=True) for a, b in zip(p, q, strict=True)
    )
    return residual / math.fsum((row[k] - mean[k]) ** 2 for row in x for k in range(d))


def test_fvu_is_the_loops():
    x, x_hat = randn(50, 7) + 3, randn(2, 3, 50, 7, seed=1)
    found = fvu(x, x_hat)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    for a, b in itertools.product(range(2), range(3)):
        expected = fvu_by_loop(x.tolist(), x_hat[a, b].tolist())
        assert found[a, b].item() == pytest.approx(expected, rel=1e-6)
    own = randn(2, 3, 50, 7, seed=2)  # each SAE against the variance of its own samples
    expected = fvu_by_loop(own[1, 2].tolist(), x_hat[1, 2].tolist())
    assert fvu(own, x_hat)[1, 2].item() == pytest.approx(expected, rel=1e-6)


def test_fvu_closed_forms():
    x = randn(100, 5) + 10  # far from 0: the mean is taken off
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)).item() == pytest.approx(1, abs=1e-6)
    assert fvu(x, x - 0.1 * (x - x.mean(0))).item() == pytest.approx(0.01, rel=1e-4)
    assert fvu(x * 7, x * 7 + 7).item() == pytest.approx(fvu(x, x + 1).item(), rel=1e-5)


def test_fvu_sums_in_float64():
    n = 2**15 + 1
    x = torch.tensor([1.1, -1.1]).repeat_interleave(n)[:, None]
    # The residual is x / 1000 to float64's precision, so that only the sums could round.
    assert fvu(x, 1.001 * x.double()).item() == pytest.approx(1e-6, rel=1e-9)


def test_fvu_of_constant_samples_and_of_wrong_shapes():
    ones = torch.ones(10, 3)
    assert fvu(ones, ones + 1) == math.inf
    assert fvu(ones, ones).isnan()
    for wrong in (torch.ones(10, 1), torch.ones(1, 3), torch.ones(3)):  # would broadcast
        with pytest.raises(ValueError, match="must be equal"):
            fvu(ones, wrong)


@given(st.integers(0, 2**32), st.floats(-1, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_l0_and_dead_share_are_the_loops(seed, bias):
    acts = (randn(2, 3, 11, 5, seed=seed) - bias).relu()
    for a, b in itertools.product(range(2), range(3)):
        one = acts[a, b].tolist()
        fired = [[value > 0 for value in row] for row in one]
        assert l0(acts)[a, b].item() == pytest.approx(sum(map(sum, fired)) / 11)
        dead = sum(not any(row[j] for row in fired) for j in range(5))
        assert dead_share(acts)[a, b].item() == pytest.approx(dead / 5)


def test_negative_activations_do_not_fire():
    acts = torch.tensor([[-1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])
    assert l0(acts) == 0.5
    assert dead_share(acts).item() == pytest.approx(2 / 3)


def test_decoder_cosines_are_the_loops():
    W_dec, directions = randn(2, 4, 6) * 5, randn(3, 6, seed=1) * 0.1
    found = decoder_cosines(W_dec, directions)
    assert found.shape == (2, 4, 3)
    for s, j, f in itertools.product(range(2), range(4), range(3)):
        u, v = W_dec[s, j].tolist(), directions[f].tolist()
        dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
        assert found[s, j, f].item() == pytest.approx(dot / (math.hypot(*u) * math.hypot(*v)))


def test_cosines_of_zero_and_tiny_rows():
    W_dec = torch.tensor([[0.0, 0.0], [3e-30, 4e-30]])
    cosines = decoder_cosines(W_dec, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(cosines, torch.tensor([[0.0, 0.0], [0.6, 0.0]]).double())
    with pytest.raises(ValueError, match="last dimension"):
        decoder_cosines(W_dec, torch.ones(2, 1))


def test_best_cosine_and_clean_features():
    cosines = torch.tensor([[0.95, -0.99, 0.2], [0.1, 0.3, 0.9]], dtype=torch.float64)
    best = best_cosine(cosines)
    assert best.tolist() == [0.95, 0.3, 0.9]  # the best is signed
    assert clean_features(best) == 1  # over the threshold, not at it
    assert clean_features(best, 0.85) == 2
    assert clean_features(torch.stack([best, best + 0.05]), 0.94).tolist() == [1, 2]


def best_total(cosines: torch.Tensor) -> float:
    """The highest total cosine over all one-to-one matchings, by trying each."""
    n_latents, n_features = cosines.shape
    if n_latents < n_features:
        return best_total(cosines.T)
    table = cosines.tolist()
    return max(
        sum(table[j][f] for f, j in enumerate(latents))
        for latents in itertools.permutations(range(n_latents), n_features)
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_matching_is_one_to_one_and_the_best(n_latents, n_features, seed):
    cosines = randn(2, n_latents, n_features, seed=seed, dtype=torch.float64)
    matched = match_latents(cosines)
    assert matched.shape == (2, n_features)
    for one, latents in zip(cosines, matched.tolist(), strict=True):
        pairs = [(j, f) for f, j in enumerate(latents) if j >= 0]
        assert len(pairs) == min(n_latents, n_features)
        assert len({j for j, _ in pairs}) == len(pairs)
        assert sum(one[j, f].item() for j, f in pairs) == pytest.approx(best_total(one))


def test_matching_gives_up_a_best_cosine_for_the_total():
    # Both features like latent 0 best; the second can do without it, the first cannot.
    cosines = torch.tensor([[0.9, 0.95], [0.0, 0.9]])
    assert match_latents(cosines).tolist() == [0, 1]


def test_absorption_by_hand():
    #           feature: parent, child, child, alone
    features = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [1.0, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    )
    matched = torch.tensor([2, 0, 1, -1])
    acts = torch.zeros(4, 3)
    acts[:, 2] = torch.tensor([0.5, 0.0, 0.0, 0.0])  # the last is no child's sample: not counted
    rates = absorption_rate(acts, features, [None, 0, 0, None], matched)
    assert rates[1].item() == pytest.approx(2 / 3)
    assert rates.isnan().tolist() == [True, False, True, True]  # feature 2 was never active
    without = absorption_rate(acts, features, [None, 3, 0, None], matched)
    assert without[1].isnan()  # its parent has no latent


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_absorption_is_the_loops(seed, own_samples):
    parent_of = [None, 0, 0, 1, None, 4]
    features = (randn(*([2, 3] if own_samples else []), 9, 6, seed=seed) - 0.8).relu()
    acts = (randn(2, 3, 9, 4, seed=seed + 1) - 0.2).relu()
    matched = match_latents(randn(2, 3, 4, 6, seed=seed + 2))  # two features have no latent
    found = absorption_rate(acts, features, parent_of, matched)
    assert found.shape == (2, 3, 6)
    for a, b, child in itertools.product(range(2), range(3), range(6)):
        rows = (features[a, b] if own_samples else features).tolist()
        parent = parent_of[child]
        latent = -1 if parent is None else int(matched[a, b, parent])
        on = [i for i in range(9) if rows[i][child] > 0]
        if latent < 0 or not on:
            assert found[a, b, child].isnan()
        else:
            silent = sum(acts[a, b, i, latent].item() <= 0 for i in on)
            assert found[a, b, child].item() == pytest.approx(silent / len(on))


def test_absorption_refuses_what_does_not_fit():
    acts, features, matched = torch.ones(5, 2), torch.ones(5, 3), torch.tensor([0, 1, -1])
    with pytest.raises(ValueError, match="samples"):
        absorption_rate(acts[:1], features, [None, 0, 0], matched)
    with pytest.raises(ValueError, match="features"):
        absorption_rate(acts, features, [None, 0], matched)
