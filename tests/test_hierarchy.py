"""Parents and children of latents, against loops over every pair and trees that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka.hierarchy import (
    as_json,
    directed,
    directed_forest,
    excess,
    forest,
    level_widths,
    levels_of,
    overlap,
    pairs_of,
    parent_given_child,
    stands_for,
    tree_edges,
)
from sae import SAE


def random_acts(seed: int, n: int = 40, n_latents: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(n, n_latents, generator=generator, dtype=torch.float64)
    density = torch.rand(n_latents, generator=generator, dtype=torch.float64)
    return acts * (torch.rand(n, n_latents, generator=generator, dtype=torch.float64) < density)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_measures_equal_loops_over_tokens(seed):
    acts = random_acts(seed)
    pairs, rows = pairs_of(acts), acts.tolist()
    n = len(rows)
    for p in range(6):
        for c in range(6):
            where = [row for row in rows if row[c] > 0]
            both = [row for row in where if row[p] > 0]
            share = len(both) / len(where) if where else 0.0
            base = sum(row[p] > 0 for row in rows) / n
            assert float(parent_given_child(pairs)[p, c]) == pytest.approx(share)
            expected = (share - base) / (1 - base) if where and base < 1 else 0.0
            if any(row[p] > 0 for row in rows):
                assert float(excess(pairs)[p, c]) == pytest.approx(expected)
            cosine = 0.0
            if both:
                dot = math.fsum(row[p] * row[c] for row in where)
                norms = math.fsum(row[p] ** 2 for row in where) * math.fsum(
                    row[c] ** 2 for row in where
                )
                largest = [max(row[j] for row in rows) for j in (p, c)]
                cosine = dot / math.sqrt(norms) * largest[1] / largest[0]
            assert float(directed(pairs)[p, c]) == pytest.approx(cosine)


def chain() -> Tensor:
    """Four latents on 100 tokens: 0 on forty, 1 within it on twenty, 2 within 1 on five, and 3 on
    half of all tokens, whatever the others do."""
    acts = torch.zeros(100, 4)
    acts[:40, 0] = acts[:20, 1] = acts[:5, 2] = acts[::2, 3] = 1.0
    return acts


def test_the_parent_of_a_chain_is_the_next_one_up():
    pairs, level = pairs_of(chain()), torch.tensor([0, 1, 2, 0])
    assert forest(pairs, level).tolist() == [-1, 0, 1, -1]
    assert directed_forest(pairs, level, 0.5)[2] == 0, "the author's measure ties; the first wins"
    assert torch.equal(overlap(pairs), overlap(pairs).T)


def test_a_latent_that_fires_on_everything_is_no_parent_by_chance():
    acts = chain()
    acts[:, 3] = 1.0
    assert forest(pairs_of(acts), torch.tensor([1, 1, 1, 0])).tolist() == [-1, -1, -1, -1]


def test_parents_are_of_an_earlier_level_unless_there_is_only_one():
    pairs = pairs_of(chain())
    assert forest(pairs, torch.tensor([0, 0, 1, 1])).tolist() == [-1, -1, 1, -1]
    assert forest(pairs, torch.tensor([2, 1, 0, 0])).tolist() == [-1, -1, -1, -1]
    assert forest(pairs, torch.zeros(4, dtype=torch.int64)).tolist() == [-1, 0, 1, -1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_a_forest_has_no_circle(seed, threshold):
    acts = random_acts(seed)
    parents = forest(pairs_of(acts), torch.zeros(6, dtype=torch.int64), threshold).tolist()
    for latent in range(6):
        steps = 0
        while parents[latent] >= 0:
            latent, steps = parents[latent], steps + 1
            assert steps < 6


def test_levels_are_parted_by_the_widths_trained_at_or_by_powers_of_two():
    sae = SAE(4, 6)
    assert level_widths(sae) == [1, 2, 4, 6]
    assert levels_of([1, 2, 4, 6]).tolist() == [0, 1, 2, 2, 3, 3]
    sae.about = {"widths": [2, 6]}
    assert level_widths(sae) == [2, 6]
    assert levels_of([2, 6]).tolist() == [0, 0, 1, 1, 1, 1]
    sae.about = {"n_prefixes": 1}
    assert levels_of(level_widths(sae)).tolist() == [0] * 6


def test_edges_are_found_wrong_or_missing():
    tree = [None, 0, 0, None]  # features 1 and 2 below 0
    features = torch.tensor([0, 2, -1, 3])  # latent 2 stands for nothing, and nothing for 1
    score = tree_edges(torch.tensor([-1, 0, 0, 0]), features, tree)
    assert score == {"found": 1, "wrong": 2, "missing": 1}
    nothing = tree_edges(torch.full((4,), -1), features, tree)
    assert nothing == {"found": 0, "wrong": 0, "missing": 2}


def test_a_latent_stands_for_a_feature_that_it_is_clean_for():
    cosines = torch.tensor([[0.95, 0.1], [0.2, 0.8], [0.0, 0.0]])
    matched = torch.tensor([0, 1])
    assert stands_for(cosines, matched, 0.9).tolist() == [0, -1, -1]
    assert stands_for(cosines, matched, 0.5).tolist() == [0, 1, -1]
    assert stands_for(cosines, torch.tensor([0, -1]), 0.5).tolist() == [0, -1, -1]


def test_the_json_has_every_edge_and_its_measures():
    sae = SAE(8, 4)
    sae.about = {"widths": [1, 2, 4]}
    found = as_json(pairs_of(chain()), sae)
    assert found["widths"] == [1, 2, 4]
    assert [(edge["latent"], edge["parent"]) for edge in found["edges"]] == [(1, 0), (2, 1)]
    first = found["edges"][0]
    assert first["p_parent_given_child"] == 1
    assert first["p_child_given_parent"] == 0.5
    assert first["excess"] == pytest.approx(1)
    assert first["directed"] == pytest.approx(1)
    W = sae.W_dec.detach()
    assert first["cosine"] == pytest.approx(float(W[0] @ W[1] / W[0].norm() / W[1].norm()))
