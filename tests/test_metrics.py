"""The metrics against closed forms, and against loops in float64 written here."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_factory import D_MODEL, fvu_by_loop, randn, random_sae

from matryoshka.metrics import (
    absorption_rate,
    best_cosine,
    clean_features,
    dead_share,
    decoder_cosines,
    density_histogram,
    fvu,
    highest_cosines,
    l0,
    match_latents,
    prefix_errors,
    prefix_lengths,
)


def test_fvu_is_the_loops():
    x, x_hat = randn(50, 7) + 3, randn(50, 7, seed=1)
    found = fvu(x, x_hat)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(fvu_by_loop(x.tolist(), x_hat.tolist()), rel=1e-6)


def test_samples_in_sequences_are_samples_like_others():
    x, x_hat, acts = randn(50, 7) + 3, randn(50, 7, seed=1), (randn(50, 9) - 1.5).relu()
    assert fvu(x.view(5, 10, 7), x_hat.view(5, 10, 7)) == fvu(x, x_hat)
    assert l0(acts.view(5, 10, 9)) == l0(acts)
    assert dead_share(acts.view(5, 10, 9)) == dead_share(acts)
    assert l0(acts[7]) == (acts[7] > 0).sum()
    assert dead_share(acts[7]).item() == pytest.approx((acts[7] <= 0).sum().item() / 9)
    assert fvu(x[7], x_hat[7]) == math.inf  # one sample does not vary


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
    tenths = torch.full((10, 3), 0.1)  # their sum rounds, and so does their mean
    assert fvu(tenths, tenths + 1) == math.inf
    assert fvu(tenths, tenths).isnan()
    assert fvu(ones[:0], ones[:0]).isnan()
    for wrong in (torch.ones(10, 1), torch.ones(1, 3), torch.ones(3)):  # would broadcast
        with pytest.raises(ValueError, match="must be equal"):
            fvu(ones, wrong)
    with pytest.raises(ValueError, match="must be equal"):
        fvu(torch.ones(()), torch.ones(()))


@given(st.integers(0, 2**32), st.floats(-1, 3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_l0_and_dead_share_are_the_loops(seed, bias):
    acts = (randn(11, 5, seed=seed) - bias).relu()
    fired = [[value > 0 for value in row] for row in acts.tolist()]
    assert l0(acts).item() == pytest.approx(sum(map(sum, fired)) / 11)
    dead = sum(not any(row[j] for row in fired) for j in range(5))
    assert dead_share(acts).item() == pytest.approx(dead / 5)


def test_negative_activations_do_not_fire():
    acts = torch.tensor([[-1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])
    assert l0(acts) == 0.5
    assert dead_share(acts).item() == pytest.approx(2 / 3)


@given(st.integers(0, 2**32), st.sampled_from([1, 50, 1000]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_density_histogram_counts_every_latent_in_its_tenth_of_a_power_of_ten(seed, n):
    fired = torch.randint(-2, n + 1, (40,), generator=torch.Generator().manual_seed(seed)).relu()
    found = density_histogram(fired, n)
    edges = found["log10_edges"]
    assert (edges[0], edges[-1], len(edges)) == (-8.0, 0.0, 81)
    counts = [0] * 80
    for k in fired.tolist():
        if k:
            place = next(i for i in range(80) if math.log10(k / n) < edges[i + 1] or i == 79)
            counts[place] += 1
    assert found["counts"] == counts
    assert found["never"] == fired.tolist().count(0)


def test_densities_below_the_histograms_lowest_edge_are_in_its_first_bin():
    found = density_histogram(torch.tensor([1, 0, 10**10]), 10**10)
    assert found["counts"] == [1, *[0] * 78, 1]
    assert found["never"] == 1


def test_decoder_cosines_are_the_loops():
    W_dec, directions = randn(4, 6) * 5, randn(3, 6, seed=1) * 0.1
    found = decoder_cosines(W_dec, directions)
    assert found.shape == (4, 3)
    for j, f in itertools.product(range(4), range(3)):
        u, v = W_dec[j].tolist(), directions[f].tolist()
        dot = math.fsum(a * b for a, b in zip(u, v, strict=True))
        assert found[j, f].item() == pytest.approx(dot / (math.hypot(*u) * math.hypot(*v)))


def test_cosines_of_zero_and_tiny_rows():
    W_dec = torch.tensor([[0.0, 0.0], [3e-30, 4e-30]])
    cosines = decoder_cosines(W_dec, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(cosines, torch.tensor([[0.0, 0.0], [0.6, 0.0]]).double())
    with pytest.raises(ValueError, match="last dimension"):
        decoder_cosines(W_dec, torch.ones(2, 1))


def test_cosines_of_rows_whose_square_underflows():
    tiny = torch.tensor([[3e-200, 4e-200]], dtype=torch.float64)
    assert decoder_cosines(tiny, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.6)


def test_best_cosine_and_clean_features():
    cosines = torch.tensor([[0.95, -0.99, 0.2], [0.1, 0.3, 0.9]], dtype=torch.float64)
    best = best_cosine(cosines)
    assert best.tolist() == [0.95, 0.3, 0.9]  # the best is signed
    assert clean_features(best) == 1  # over the threshold, not at it
    assert clean_features(best, 0.85) == 2


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
    cosines = randn(n_latents, n_features, seed=seed, dtype=torch.float64)
    matched = match_latents(cosines)
    assert matched.shape == (n_features,)
    pairs = [(j, f) for f, j in enumerate(matched.tolist()) if j >= 0]
    assert len(pairs) == min(n_latents, n_features)
    assert len({j for j, _ in pairs}) == len(pairs)
    assert sum(cosines[j, f].item() for j, f in pairs) == pytest.approx(best_total(cosines))


def test_a_cosine_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="invalid numeric"):
        match_latents(torch.tensor([[0.5, torch.nan]]))


def test_matching_gives_up_a_best_cosine_for_the_total():
    # Both features like latent 0 best; the second can do without it, the first cannot.
    cosines = torch.tensor([[0.9, 0.95], [0.0, 0.9]])
    assert match_latents(cosines).tolist() == [0, 1]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_highest_cosines_are_the_loops(chunk):
    W_dec = randn(7, 5)
    W_dec[3] = 2 * W_dec[1]
    found = highest_cosines(W_dec, chunk).tolist()
    for j in range(7):
        cosines = [
            torch.nn.functional.cosine_similarity(W_dec[j].double(), W_dec[k].double(), dim=0)
            for k in range(7)
            if k != j
        ]
        assert found[j] == pytest.approx(max(cosines).item(), abs=1e-12)
    assert found[3] == pytest.approx(1)


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


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_absorption_is_the_loops(seed):
    parent_of = [None, 0, 0, 1, None, 4]
    features = (randn(9, 6, seed=seed) - 0.8).relu()
    acts = (randn(9, 4, seed=seed + 1) - 0.2).relu()
    matched = match_latents(randn(4, 6, seed=seed + 2))  # two features have no latent
    found = absorption_rate(acts, features, parent_of, matched)
    assert found.shape == (6,)
    for child, parent in enumerate(parent_of):
        latent = -1 if parent is None else int(matched[parent])
        on = [i for i in range(9) if features[i, child] > 0]
        if latent < 0 or not on:
            assert found[child].isnan()
        else:
            silent = sum(acts[i, latent].item() <= 0 for i in on)
            assert found[child].item() == pytest.approx(silent / len(on))


def test_absorption_refuses_what_does_not_fit():
    acts, features, matched = torch.ones(5, 2), torch.ones(5, 3), torch.tensor([0, 1, -1])
    with pytest.raises(ValueError, match="samples"):
        absorption_rate(acts[:1], features, [None, 0, 0], matched)
    with pytest.raises(ValueError, match="features"):
        absorption_rate(acts, features, [None, 0], matched)


def test_prefix_lengths():
    assert prefix_lengths(1) == [1]
    assert prefix_lengths(2) == [1, 2]
    assert prefix_lengths(8) == [1, 2, 4, 8]
    assert prefix_lengths(13) == [1, 2, 4, 8, 13]


def test_fvu_by_prefix_is_each_prefixs_own_decode():
    sae, x = random_sae(), randn(60, D_MODEL, seed=9) + 2
    acts = sae.encode(x)
    found = prefix_errors(sae, x, acts, [1, 2, 4, 8, 13])
    assert found.dtype == torch.float64
    assert found.shape == (5, 60)
    for error, prefix in zip(found.sum(1).tolist(), [1, 2, 4, 8, 13], strict=True):
        decoded = sae.decode(acts, prefix)
        by_loop = fvu_by_loop(x.tolist(), decoded.tolist())
        variance = (x.double() - x.double().mean(0)).square().sum().item()
        assert error / variance == pytest.approx(by_loop, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_of_other_formats_are_those_of_their_numbers_in_float64(dtype):
    x, x_hat = (3 + randn(40, 6)).to(dtype), (3 + randn(40, 6, seed=1)).to(dtype)
    expected = fvu_by_loop(x.double().tolist(), x_hat.double().tolist())
    assert fvu(x, x_hat).item() == pytest.approx(expected, rel=1e-12)
    assert fvu(x, x_hat.float()).item() == pytest.approx(expected, rel=1e-12)
    assert fvu(x, x_hat).dtype == l0(x).dtype == dead_share(x).dtype == torch.float64
    cosines = decoder_cosines(x, x_hat)
    torch.testing.assert_close(cosines, decoder_cosines(x.double(), x_hat.double()))
    acts = (x - 3).relu()
    assert l0(acts).item() == (acts.double() > 0).sum().item() / 40
    matched = match_latents(cosines.to(dtype))
    assert matched.equal(match_latents(cosines.to(dtype).double()))
    rates = absorption_rate(acts, acts.relu(), [None, 0, 0, 1, 1, 2], torch.arange(6))
    wide = absorption_rate(acts.double(), acts.double(), [None, 0, 0, 1, 1, 2], torch.arange(6))
    torch.testing.assert_close(rates, wide, equal_nan=True)


def test_fvu_of_samples_far_from_zero_is_exact() -> None:
    """In float32 their mean is a thousand times their spread: they are centred before it is."""
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    x = 1000 + 1e-3 * noise
    x_hat = x + 1e-4 * noise.flip(0)
    wide, error = x.double(), x_hat.double() - x.double()
    exact = error.square().sum() / (wide - wide.mean(0)).square().sum()
    torch.testing.assert_close(fvu(x, x_hat), exact, rtol=1e-6, atol=0)
