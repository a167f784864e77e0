"""The prefixes of a step, and their exact mean."""

import itertools
import math

import pytest
import torch
from core_cases import batches, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.prefix_draws import PrefixDraws, PrefixRule, expected_reach, reach
from sae import prefix_probabilities, sample_prefixes, seeded_generator


@given(n_latents=st.integers(1, 40), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_reach_counts_prefixes(n_latents, data):
    n_prefixes = data.draw(st.integers(1, n_latents))
    prefixes = sample_prefixes(n_latents, n_prefixes, seeded_generator(n_latents), 3)
    for row, shares in zip(prefixes, reach(prefixes, n_latents), strict=True):
        counts = [sum(int(m) >= place for m in row) for place in range(1, n_latents + 1)]
        torch.testing.assert_close(shares, torch.tensor(counts) / n_prefixes)


@pytest.mark.parametrize(("n_latents", "n_prefixes"), [(2, 2), (6, 1), (6, 3), (6, 5), (6, 6)])
def test_expected_reach_is_the_mean_over_every_draw(n_latents, n_prefixes):
    """Against every ordered draw without replacement, enumerated with its probability."""
    p = prefix_probabilities(n_latents).tolist()
    expected = torch.zeros(n_latents, dtype=torch.float64)
    for lengths in itertools.permutations(range(1, n_latents), n_prefixes - 1):
        probability, left = 1.0, 1.0
        for m in lengths:
            probability *= p[m - 1] / left
            left -= p[m - 1]
        shares = [sum(m >= j for m in (*lengths, n_latents)) for j in range(1, n_latents + 1)]
        expected += probability * torch.tensor(shares, dtype=torch.float64) / n_prefixes
    assert (expected_reach(n_latents, n_prefixes) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("n_latents", "n_prefixes"), [(20, 10), (300, 10), (200, 60)])
def test_expected_reach_is_the_mean_of_many_draws(n_latents, n_prefixes):
    draws = reach(sample_prefixes(n_latents, n_prefixes, seeded_generator(1), 50_000), n_latents)
    exact = expected_reach(n_latents, n_prefixes)
    error = draws.double().std(0) / math.sqrt(50_000)
    assert ((draws.double().mean(0) - exact).abs() <= 5 * error + 1e-6).all()
    assert exact.sum() * n_prefixes > n_latents  # and the inclusion probabilities add up:
    assert abs(float(exact[0]) - 1) < 1e-9


def test_the_loss_at_the_expected_reach_is_the_mean_loss():
    """Many sampled gradients average to that of the expected loss."""
    still = {"lr": 1e-30, "max_grad_norm": 1e9, "n_steps": 10**6}
    sampled, exact = (
        make_trainer(seeds=(0,), n_prefixes=(4,), prefixes=kind, sparsity_weight=1.0, **still)
        for kind in ("sampled", "expected")
    )
    x = batches(1)[0]
    exact.step(x)
    gradients = []
    for _ in range(3000):
        sampled.step(x)
        sampled._state["mean_square"].copy_(exact._state["mean_square"] * 0)  # the same order
        sampled._state["mean_norm"].copy_(exact._state["mean_norm"])
        sampled._state["sparsity_weight"].fill_(sampled.config.weight_in_warmup(0))
        gradients.append(sampled._flat_grads.clone())
    gradients = torch.stack(gradients).double()
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - exact._flat_grads).abs() <= 5 * error + 1e-5).all()


@pytest.mark.parametrize("n_prefixes", [0, 6])
def test_impossible_prefixes_are_refused(n_prefixes):
    with pytest.raises(ValueError, match="within 1 and 5"):
        sample_prefixes(5, n_prefixes, seeded_generator(0))
    with pytest.raises(ValueError, match="within 1 and 5"):
        expected_reach(5, n_prefixes)


def draws(n_prefixes=(4, 4), seeds=(0, 1), n_latents=500, expected=False):
    cpu = torch.device("cpu")
    rules = [PrefixRule(*of_sae, expected) for of_sae in zip(n_prefixes, seeds, strict=True)]
    return PrefixDraws(n_latents, rules, torch.zeros(1), cpu)


def lengths(drawn, block):
    return [drawn.lengths(rule, block) for rule in drawn.rules]


def test_vanilla_is_one_prefix():
    """With one prefix every reach is 1, whatever the order."""
    for step in (0, 5, 300):
        prefixes = draws((1, 1)).of(step)
        assert (prefixes.reach == 1).all()
        assert [end.tolist() for end in prefixes.ends] == [[500], [500]]


def test_prefixes_differ_by_seed_step_and_block():
    rows = torch.cat(lengths(draws(), 0) + lengths(draws(), 1))  # [4 * 256, 4]
    assert len(torch.unique(rows, dim=0)) > 0.99 * len(rows)


def test_a_step_has_its_prefixes_whatever_came_before():
    """And each SAE of a stack has its own: its reach and where that ends go together."""
    whole = draws((10, 3))
    for step in (0, 255, 256, 1000):
        ours, fresh = whole.of(step), draws((10, 3)).of(step)
        assert torch.equal(ours.reach, fresh.reach)
        for i, n in enumerate((10, 3)):
            assert torch.equal(ours.ends[i], fresh.ends[i])
            assert torch.equal(ours.reach[i], reach(ours.ends[i], 500))
            assert len(ours.ends[i]) == n


def test_the_exact_mean_is_the_same_at_every_step():
    prefixes = draws((10, 1), expected=True)
    assert prefixes.of(0) is prefixes.of(999)
    torch.testing.assert_close(prefixes.of(0).reach[0], expected_reach(500, 10).float())
    assert prefixes.of(0).ends[1].tolist() == [500]


def test_a_seeds_prefixes_are_what_they_were():
    """Blocks of 256 steps: results that were published name their seeds."""
    block = sample_prefixes(500, 4, seeded_generator(1, 1, 1), 256)
    assert draws().of(256 + 255).ends[1].tolist() == block[255].tolist()
