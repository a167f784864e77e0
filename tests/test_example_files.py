"""The file of examples and relations: what is in it, and when it is used again."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from cache_factory import write_cache
from run_factory import random_sae

from matryoshka import example_files
from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.example_files import examples_of, read, relations_of
from matryoshka.hierarchy import (
    directed,
    excess,
    forest,
    level_widths,
    levels_of,
    overlap,
    pairs_of,
    parent_given_child,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return ActivationCache(write_cache(tmp_path_factory.mktemp("cache"), 400, d_model=8))


def test_relations_are_what_the_matrices_say():
    sae = random_sae(n_latents=30, d_model=8)
    acts = sae.encode(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 3)
    pairs = pairs_of(acts)
    found = relations_of(pairs, sae, threshold=0.2)
    level = levels_of(level_widths(sae))
    assert found.parents[:, 0].tolist() == forest(pairs, level, 0.2).tolist()
    assert (found.parents[:, 0] >= 0).any()
    measures = (parent_given_child(pairs), parent_given_child(pairs).T, excess(pairs))
    measures = (*measures, directed(pairs))
    for child in range(30):
        for place, parent in enumerate(found.parents[child]):
            if parent >= 0:
                assert level[parent] < level[child]
                expected = [float(measure[parent, child]) for measure in measures]
                np.testing.assert_allclose(found.parent_measures[child, place], expected, rtol=1e-6)
        together = overlap(pairs)[child].tolist()
        together[child] = 0.0
        best = sorted((-value, j) for j, value in enumerate(together) if value > 0)[:10]
        np.testing.assert_allclose(
            found.coactive_overlap[child, : len(best)], [-value for value, _ in best], rtol=1e-6
        )
        assert child not in found.coactive[child]


def test_a_file_is_used_again_for_the_same_sae_and_cache(tmp_path, cache, monkeypatch):
    sae = random_sae(n_latents=9, d_model=8)
    first = examples_of(tmp_path / "examples" / "a.safetensors", sae, "f" * 64, cache)
    monkeypatch.setattr(example_files, "collect", None)
    again = examples_of(tmp_path / "examples" / "a.safetensors", sae, "f" * 64, cache)
    for kept, found in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        np.testing.assert_array_equal(kept, found)
    with pytest.raises(TypeError):
        examples_of(tmp_path / "examples" / "a.safetensors", sae, "e" * 64, cache)
    tree = json.loads((tmp_path / "examples" / "a.json").read_text())
    assert tree["sae_sha256"] == "f" * 64
    assert tree["widths"] == level_widths(sae)
    assert {edge["latent"] for edge in tree["edges"]} == set(
        np.flatnonzero(first[1].parents[:, 0] >= 0).tolist()
    )


@pytest.mark.parametrize("content", [b"", b"text", "later", "other"])
def test_a_file_that_is_something_else_is_named(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if isinstance(content, str):
        about = {"examples": json.dumps({"format": 2})} if content == "later" else None
        content = safetensors.numpy.save({"fired": np.zeros(3)}, metadata=about)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors holds no examples"):
        read(path)


def test_without_pairs_there_are_no_relations():
    found = relations_of(None, random_sae(), n_latents=13)
    assert [array.shape for array in found] == [(13, 0), (13, 0), (13, 0), (13, 0, 4)]
