"""What latents fire on, against brute force over the whole cache."""

import itertools
import math

import numpy as np
import pytest
import torch
from cache_factory import write_cache
from run_factory import random_sae

from matryoshka import top_examples
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.hierarchy import pairs_of
from matryoshka.pair_sums import Firings, PairSums, _mirror
from matryoshka.top_examples import (
    N_A_QUANTILE,
    N_BINS,
    N_SAMPLE,
    N_TOP,
    TOP_A_ROW,
    Collector,
    _keys,
    collect,
    quantile_examples,
    strengths,
)

N_LATENTS, N_TOKENS, ROW = 12, 3000, 17


def acts_of(seed: int, dead: int = 1) -> torch.Tensor:
    """Activations [N_TOKENS, N_LATENTS] of very different densities and sizes, with ties."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.logspace(-3, 0, N_LATENTS)
    fires = torch.rand(N_TOKENS, N_LATENTS, generator=generator) < density
    fires[:, :dead] = False
    values = torch.rand(N_TOKENS, N_LATENTS, generator=generator) ** 4 * torch.logspace(
        -4, 4, N_LATENTS
    )
    values[:, -1] = values[:, -1].round(decimals=-3)  # many ties
    return values * fires


def collected(acts: torch.Tensor, batch: int) -> top_examples.Examples:
    collector = Collector(N_LATENTS, seed=3)
    for start in range(0, N_TOKENS, batch):
        part = acts[start : start + batch]
        tokens = torch.arange(start, start + len(part))
        collector.add(Firings(part), tokens % 7, tokens // ROW)
    return collector.examples()


@pytest.fixture(scope="module")
def acts() -> torch.Tensor:
    return acts_of(0)


@pytest.mark.parametrize("batch", [1000, 64, N_TOKENS])
def test_the_strongest_tokens_are_those_of_a_sort_with_two_a_row(acts, batch):
    found = collected(acts, batch)
    for j in range(N_LATENTS):
        values = acts[:, j].tolist()
        order = sorted((t for t in range(N_TOKENS) if values[t] > 0), key=lambda t: (-values[t], t))
        kept: list[int] = []
        for token in order:
            if sum(t // ROW == token // ROW for t in kept) < TOP_A_ROW:
                kept.append(token)
        kept = kept[:N_TOP]
        n = len(kept)
        assert found.top_tokens[j].tolist() == kept + [-1] * (N_TOP - n)
        assert found.top_values[j].tolist() == [values[t] for t in kept] + [0.0] * (N_TOP - n)


@pytest.mark.parametrize("batch", [1000, 64])
def test_the_sample_is_of_the_lowest_keys_and_counts_are_counts(acts, batch):
    found = collected(acts, batch)
    for j in range(N_LATENTS):
        fires = np.flatnonzero(acts[:, j].numpy() > 0)
        order = fires[np.argsort(_keys(3, np.full(len(fires), j), fires))][:N_SAMPLE]
        assert found.sample_tokens[j, : len(order)].tolist() == order.tolist()
        assert (found.sample_tokens[j, len(order) :] == -1).all()
        assert found.sample_values[j, : len(order)].tolist() == acts[order, j].tolist()
        assert found.fired[j] == len(fires)
        assert found.total[j] == pytest.approx(math.fsum(acts[:, j].tolist()))
        assert found.largest[j] == float(acts[:, j].max())
    assert found.token_counts.tolist() == np.bincount(np.arange(N_TOKENS) % 7).tolist()
    assert found.n_tokens == N_TOKENS


@pytest.mark.parametrize("batch", [1000, 64])
def test_a_histogram_counts_every_firing_whatever_came_first(acts, batch):
    found = collected(acts, batch)
    for j in range(N_LATENTS):
        values = acts[:, j][acts[:, j] > 0].double().tolist()
        width = float(found.bin_width[j])
        if not values:
            assert width == 0
            assert not found.histogram[j].any()
            continue
        assert math.log2(width) == int(math.log2(width))
        assert width * N_BINS / 2 <= max(values) < width * N_BINS
        counts = [0] * N_BINS
        for value in values:
            counts[int(value // width)] += 1
        assert found.histogram[j].tolist() == counts


def test_keys_are_uniform_and_differ_by_seed():
    token, latent = np.arange(10_000), np.zeros(10_000, dtype=np.int64)
    keys = _keys(0, latent, token)
    assert len(set(keys)) == 10_000
    assert abs(np.corrcoef(keys[1:], keys[:-1])[0, 1]) < 0.05
    assert np.abs(np.histogram(keys, 10, (0, 1))[0] - 1000).max() < 150
    assert not (keys == _keys(1, latent, token)).any()
    assert not (keys == _keys(0, latent + 1, token)).any()


def test_quantiles_part_the_sample_by_activation(acts):
    found = collected(acts, 1000)
    latent = N_LATENTS - 2
    quantiles = quantile_examples(found, latent)
    assert [len(part) for part in quantiles] == [N_A_QUANTILE] * 10
    for low, high in itertools.pairwise(quantiles):
        assert max(value for _, value in low) <= min(value for _, value in high)
    for token, value in itertools.chain(*quantiles):
        assert value == float(acts[token, latent])
    assert quantile_examples(found, 0) == [[]] * 10, "a dead latent has none"
    few = int(np.flatnonzero((found.fired > 0) & (found.fired < 10))[0])
    assert sum(map(len, quantile_examples(found, few))) == found.fired[few]


@pytest.mark.parametrize("waiting", [1, 300, 2**21])
@pytest.mark.parametrize("at_once", [1, 50, 2**20])
def test_pair_sums_equal_the_dense_products(acts, at_once, waiting, monkeypatch):
    monkeypatch.setattr("matryoshka.pair_sums.PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr("matryoshka.pair_sums.WAITING", waiting)
    acts = acts[:300]
    sums = PairSums(N_LATENTS)
    for start in range(0, 300, 77):
        sums.add(Firings(acts[start : start + 77]))
    found, expected = sums.pairs(), pairs_of(acts)
    assert found.n_tokens == expected.n_tokens
    for name in ("fired", "largest", "both", "products", "masked"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("n", [1, 5, 300])
def test_what_is_above_the_diagonal_is_mirrored_below(n):
    upper = np.triu(np.random.default_rng(n).random((n, n)), 1)
    expected = upper + upper.T
    _mirror(upper, size=64)
    np.testing.assert_array_equal(upper, expected)


def test_a_cache_is_collected_whole(tmp_path):
    cache = ActivationCache(write_cache(tmp_path, 5000, d_model=8))
    sae = random_sae(n_latents=9, d_model=8)
    found, pairs = collect(sae, cache)
    x = cache.acts(0, 5000).float()
    acts = sae.encode(x) * sae.W_dec.norm(dim=1) * sae.mean_norm / math.sqrt(8)
    torch.testing.assert_close(strengths(sae, x), acts)
    assert found.n_tokens == 5000
    assert found.fired.tolist() == (acts > 0).sum(0).tolist()
    np.testing.assert_allclose(found.largest, acts.amax(0).numpy(), rtol=1e-5)
    assert pairs is not None
    fires = (acts > 0).double()
    assert torch.equal(pairs.both, fires.T @ fires)


def test_what_is_added_has_the_length_of_the_activation(tmp_path):
    sae = random_sae(n_latents=5, d_model=8)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    acts, alone = sae.encode(x), torch.zeros(4, 5)
    alone[:, 2] = acts[:, 2]
    added = sae.decode(alone) - sae.decode(torch.zeros(4, 5))
    torch.testing.assert_close(strengths(sae, x)[:, 2], added.norm(dim=1))


def test_a_cache_of_another_width_is_refused(tmp_path):
    cache = ActivationCache(write_cache(tmp_path, 50, d_model=8))
    with pytest.raises(UserError, match="has d_model 8, but the SAE has d_model 16"):
        collect(random_sae(), cache)


def test_too_many_latents_have_no_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(top_examples, "MAX_LATENTS", 8)
    cache = ActivationCache(write_cache(tmp_path, 50, d_model=8))
    assert collect(random_sae(n_latents=9, d_model=8), cache)[1] is None
    assert collect(random_sae(n_latents=8, d_model=8), cache)[1] is not None
