"""Streamed sums of reconstructions against those of all activations at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_factory import D_MODEL, randn, random_sae

from matryoshka.absorption import ConceptCounts
from matryoshka.cache_reader import Batch
from matryoshka.errors import UserError
from matryoshka.metrics import dead_share, density_histogram, fvu, l0
from matryoshka.reconstruction import (
    Moments,
    Statistics,
    norm_spread,
    norms_of,
    outliers_among,
    reconstruct,
)


def test_moments_of_activations_far_from_0_are_those_of_float64():
    x = 1e4 + 1e-2 * randn(500, 3)
    moments = Moments()
    for part in x.split(120):
        moments.add(part)
        moments.add(part[:0])
    exact = x.double()
    assert moments.n == 500
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-15, atol=0)
    expected = (exact - exact.mean(0)).square().sum().item()
    assert moments.variance == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moments_of_other_formats_are_those_of_their_numbers_in_float64(dtype):
    x, moments, doubled = (3 + randn(40, 6)).to(dtype), Moments(), Moments()
    moments.add(x)
    doubled.add(x.double())
    assert moments.variance == doubled.variance
    assert moments.mean.equal(doubled.mean)


def test_moments_of_nothing_are_0():
    moments = Moments()
    moments.add(torch.empty(0, 3))
    assert (moments.n, moments.variance, moments.is_constant) == (0, 0.0, True)


@pytest.mark.parametrize(("spread", "constant"), [(1e-8, True), (1e-4, False), (1.0, False)])
def test_moments_are_constant_where_float32_tells_nothing_apart(spread, constant):
    """By the variance's share of the mean square, whatever the units: 1e-16, 1e-8, 0.5."""
    for unit in (1e-20, 1.0, 1e20):
        moments = Moments()
        moments.add(unit * (1 + spread * randn(500, 3, dtype=torch.float64)))
        assert moments.is_constant is constant
    assert Moments().is_constant


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_norms_spread_is_the_sorted_lists(seed, n):
    norms = randn(n, seed=seed, dtype=torch.float64).exp()
    norms[0] *= 1000
    found = norm_spread(norms)
    ordered = sorted(norms.tolist())
    at = [0.5 * (n - 1), 0.999 * (n - 1)]
    median, high = (
        ordered[int(i)] + (i % 1) * (ordered[min(int(i) + 1, n - 1)] - ordered[int(i)]) for i in at
    )
    assert found["median"] == pytest.approx(median)
    assert found["p99_9_over_median"] == pytest.approx(high / median)
    assert found["max_over_median"] == pytest.approx(ordered[-1] / median)
    assert found["outliers"] == sum(norm > 10 * median for norm in ordered)


def test_the_spread_of_norms_that_are_mostly_0():
    found = norm_spread(torch.tensor([0.0, 0.0, 0.0, 5.0]).double())
    assert found == {
        "median": 0.0,
        "p99_9_over_median": None,
        "max_over_median": None,
        "outliers": 0,
    }


class MadeUpCache:
    """Activations in the place of a cache on disk."""

    folder = "made-up"

    def __init__(self, acts):
        self.all_acts, self.n_tokens = acts, len(acts)

    def sequential(self, batch_size, device):
        for acts in self.all_acts.split(60):
            yield Batch(acts, *torch.zeros(3, len(acts), dtype=torch.int64))


def encoded(sae, x):
    """In the cache's batches: what is just above 0 in others is not the same on every CPU."""
    return torch.cat([sae.encode(part) for part in x.split(60)])


def statistics_of(sae):
    members = torch.zeros(1, 1, dtype=torch.bool)
    return Statistics(sae, ConceptCounts(sae.n_latents, members, torch.ones(1, dtype=torch.bool)))


def test_streamed_statistics_are_those_of_all_at_once():
    x = randn(200, D_MODEL, seed=4) + 1
    x[[3, 150]] *= 100
    is_outlier = outliers_among(x.norm(dim=1).double())
    assert is_outlier.nonzero()[:, 0].tolist() == [3, 150]
    saes = [random_sae(), random_sae(seed=9)]
    statistics = [statistics_of(sae) for sae in saes]
    every, inliers = reconstruct(statistics, MadeUpCache(x), is_outlier, torch.device("cpu"))
    assert (every.n, inliers.n) == (200, 198)
    torch.testing.assert_close(every.mean, x.double().mean(0))
    for sae, one in zip(saes, statistics, strict=True):
        found, acts = one.summary(every, inliers), encoded(sae, x)
        assert found["fvu"] == pytest.approx(fvu(x, sae(x)).item(), rel=1e-5)
        keep = x[~is_outlier]
        assert found["fvu_without_outliers"] == pytest.approx(fvu(keep, sae(keep)).item(), rel=1e-5)
        assert found["l0"] == l0(acts).item()
        assert found["dead_share"] == pytest.approx(dead_share(acts).item())
        assert found["fvu_by_prefix"]["prefix"] == [1, 2, 4, 8, 13]
        assert found["fvu_by_prefix"]["fvu"][2] == pytest.approx(
            fvu(x, sae.decode(acts, 4)).item(), rel=1e-5
        )
        assert found["density_histogram"] == density_histogram((acts > 0).sum(0), 200)
        assert one.concepts.fired.equal((acts > 0).sum(0))


def test_fvu_without_outliers_is_not_defined_where_the_others_are_all_the_same():
    x = torch.ones(100, D_MODEL)
    x[7] = 100
    statistics = [statistics_of(random_sae())]
    moments = reconstruct(
        statistics, MadeUpCache(x), outliers_among(x.norm(dim=1)), torch.device("cpu")
    )
    assert statistics[0].summary(*moments)["fvu_without_outliers"] is None


def test_what_leaves_fvu_undefined_is_refused():
    none, cpu = torch.zeros(50, dtype=torch.bool), torch.device("cpu")
    with pytest.raises(UserError, match="made-up: its activations are all the same"):
        reconstruct([], MadeUpCache(torch.full((50, D_MODEL), 0.1)), none, cpu)
    sae = random_sae()
    sae.W_dec.fill_(3e38)
    statistics = [statistics_of(random_sae()), statistics_of(sae)]
    with pytest.raises(UserError, match="reconstructions of made-up are not finite"):
        reconstruct(statistics, MadeUpCache(randn(50, D_MODEL)), none, cpu)


def test_norms_are_those_of_float64_and_finite():
    x = randn(130, 5, seed=3)
    cpu = torch.device("cpu")
    torch.testing.assert_close(norms_of(MadeUpCache(x), cpu), x.double().norm(dim=1))
    x[77, 2] = torch.inf
    with pytest.raises(UserError, match="made-up: activation 77 is not finite"):
        norms_of(MadeUpCache(x), cpu)


def test_a_norm_of_ten_medians_is_no_outlier_yet():
    norms = torch.tensor([1.0, 1.0, 1.0, 10.0, 10.5]).double()
    assert outliers_among(norms).tolist() == [False] * 4 + [True]
