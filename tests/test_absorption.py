"""Absorption of concepts against loops over tokens, and a case made up by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_factory import randn, random_sae

from matryoshka.absorption import (
    ConceptCounts,
    absorption,
    choose_detectors,
    concept_result,
    count_absorbed,
    halves,
    mean_absorption,
)
from matryoshka.cache_reader import Batch


def counts_on(fires, is_member):
    """`choose_detectors`' first three arguments, from bool [n, n_latents], [n_concepts, n]."""
    hits = is_member.double() @ fires.double()
    return {"fired": fires.sum(0), "hits": hits, "n_members": is_member.sum(1)}


def test_absorption_of_a_made_up_case():
    # Ten tokens, the first six of the concept. Latent 0 fires on five of them and nowhere else but
    # on one: its F1 is the best. 1 takes the sixth, and is the concept's alone. 2 fires on two of
    # the concept and two others: not specific. 3 is specific, but fires once. 4 covers as much as
    # 0, and is on everything.
    first = torch.tensor(
        [
            # 0, 1, 2, 3, 4
            [1, 0, 1, 0, 1],
            [1, 0, 1, 0, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 0, 0, 1],
            [1, 1, 0, 0, 1],
            [0, 1, 0, 1, 1],
            [1, 0, 1, 0, 1],
            [0, 0, 1, 0, 1],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 1],
        ]
    ).bool()
    member = torch.tensor([[1] * 6 + [0] * 4]).bool()
    chosen = choose_detectors(**counts_on(first, member), min_precision=0.8, min_fires=2)
    assert chosen.latent.tolist() == [0]
    assert chosen.precision.item() == pytest.approx(5 / 6)
    assert chosen.recall.item() == pytest.approx(5 / 6)
    assert chosen.specific.tolist() == [[False, True, False, False, False]]

    # Of eight tokens of the concept: on two the detector fires, on three only latent 1 does
    # (absorbed, one of them with 2), on two only what is not specific, on one nothing.
    second = torch.tensor(
        [
            [1, 1, 0, 0, 1],
            [1, 0, 0, 0, 1],
            [0, 1, 0, 0, 1],
            [0, 1, 1, 0, 1],
            [0, 1, 0, 0, 0],
            [0, 0, 1, 0, 1],
            [0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0],
            [0, 1, 0, 0, 1],  # not of the concept: does not count
        ]
    ).bool()
    member = torch.tensor([[1] * 8 + [0]]).bool()
    counts = count_absorbed(second, member, chosen)
    assert [int(c) for c in counts] == [8, 6, 3]


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_concept_absorption_is_the_loops(seed):
    n, n_latents, n_concepts, min_precision, min_fires = 40, 6, 3, 0.5, 4
    fires = randn(2, n, n_latents, seed=seed) > 0.6
    member = randn(2, n_concepts, n, seed=seed + 1) > 0.2
    chosen = choose_detectors(
        **counts_on(fires[0], member[0]), min_precision=min_precision, min_fires=min_fires
    )
    found = count_absorbed(fires[1], member[1], chosen)
    for c in range(n_concepts):
        on = [{i for i in range(n) if fires[0, i, j]} for j in range(n_latents)]
        of = {i for i in range(n) if member[0, c, i]}
        f1 = [2 * len(s & of) / (len(s) + len(of)) for s in on]
        best = f1.index(max(f1))
        assert chosen.latent[c] == best
        assert chosen.precision[c].item() == pytest.approx(len(on[best] & of) / len(on[best]))
        assert chosen.recall[c].item() == pytest.approx(len(on[best] & of) / len(of))
        specific = [
            j
            for j, s in enumerate(on)
            if len(s) >= min_fires
            and len(s & of) / len(s) >= min_precision
            and len(s & of) < len(on[best] & of)
        ]
        assert chosen.specific[c].nonzero()[:, 0].tolist() == specific
        tokens = [i for i in range(n) if member[1, c, i]]
        missed = [i for i in tokens if not fires[1, i, best]]
        absorbed = [i for i in missed if any(fires[1, i, j] for j in specific)]
        assert [int(f[c]) for f in found] == [len(tokens), len(missed), len(absorbed)]


def test_a_concept_that_never_occurs_has_no_rates():
    fires = torch.zeros(4, 3).bool()
    member = torch.zeros(1, 4).bool()
    chosen = choose_detectors(**counts_on(fires, member), min_precision=0.8)
    result = concept_result("none", 0, chosen, 0, [0, 0, 0])
    assert [result[k] for k in ("detector", "precision", "recall", "miss_rate", "absorption")] == (
        [None] * 5
    )


def test_a_concept_that_is_not_on_the_first_half_has_no_detector():
    fires = torch.ones(6, 2, dtype=torch.bool)
    chosen = choose_detectors(**counts_on(fires, ~fires[:, :1].T), min_precision=0.5)
    result = concept_result("late", 0, chosen, 0, [4, 1, 1])
    assert (result["tokens"], result["detector"], result["precision"]) == (4, None, None)
    assert (result["recall"], result["miss_rate"], result["absorption"]) == (None, None, None)


def test_halves_are_halves_and_repeat():
    first = halves(11, seed=3)
    assert first.sum() == 5
    assert first.equal(halves(11, seed=3))
    assert not first.equal(halves(11, seed=4))


class MadeUpCache:
    """Activations of made-up tokens in the place of a cache on disk."""

    def __init__(self, acts, tok_ids, rows):
        self.everything = Batch(acts, tok_ids, rows, torch.zeros_like(rows))

    def sequential(self, batch_size, device):
        for parts in zip(*(part.split(batch_size) for part in self.everything), strict=True):
            yield Batch(*parts)


def test_streamed_absorption_chooses_on_one_half_and_counts_on_the_other():
    n, n_rows, names = 240, 20, ["a", "b", "never"]
    generator = torch.Generator().manual_seed(5)
    tok_ids = torch.randint(0, 8, (n,), generator=generator)
    rows = torch.arange(n) * n_rows // n
    members = torch.zeros(3, 30, dtype=torch.bool)
    members[0, :3], members[1, 2:7], members[2, 20] = True, True, True
    # Activations that tell of the token, so that there is something to detect and to absorb.
    x = randn(8, 16, seed=2)[tok_ids] + 0.5 * randn(n, 16, seed=3)
    cache, first = MadeUpCache(x, tok_ids, rows), halves(n_rows, 1)
    saes = [random_sae(seed=seed) for seed in (0, 7)]
    counted = [(sae, ConceptCounts(sae.n_latents, members, first)) for sae in saes]
    for batch in cache.sequential(50, "cpu"):
        for sae, counts in counted:
            counts.add(sae.encode(batch.acts) > 0, batch)
    found = absorption(counted, cache, names, 0.3, 50)

    chosen_on, is_member = first[rows], members[:, tok_ids]
    n_absorbed = 0
    for sae, of_sae in zip(saes, found, strict=True):
        fires = torch.cat([sae.encode(part) for part in x.split(50)]) > 0
        detectors = choose_detectors(
            **counts_on(fires[chosen_on], is_member[:, chosen_on]), min_precision=0.3
        )
        counts = count_absorbed(fires[~chosen_on], is_member[:, ~chosen_on], detectors)
        for i, (name, result) in enumerate(zip(names, of_sae, strict=True)):
            n_tokens, missed, absorbed = (int(count[i]) for count in counts)
            assert result["concept"] == name
            assert result["tokens"] == n_tokens
            assert result["tokens_chosen_on"] == int(is_member[i, chosen_on].sum())
            if name == "never":
                assert n_tokens == 0
                assert result["absorption"] is None
                continue
            assert result["detector"] == int(detectors.latent[i])
            assert result["precision"] == float(detectors.precision[i])
            assert result["recall"] == float(detectors.recall[i])
            assert result["specific_latents"] == int(detectors.specific[i].sum())
            assert result["miss_rate"] == missed / n_tokens
            assert result["absorption"] == absorbed / n_tokens
            n_absorbed += absorbed
    assert n_absorbed > 0


def test_a_latent_of_few_firings_is_not_believed_by_default():
    fires = torch.zeros(20, 2, dtype=torch.bool)
    fires[:10, 0], fires[15:, 1] = True, True
    member = torch.ones(1, 20, dtype=torch.bool)
    assert choose_detectors(**counts_on(fires, member), min_precision=1.0).specific[0, 1]
    fires[19, 1] = False
    assert not choose_detectors(**counts_on(fires, member), min_precision=1.0).specific.any()


def test_of_equally_good_latents_the_first_is_the_detector():
    fires = torch.ones(6, 3, dtype=torch.bool)
    chosen = choose_detectors(**counts_on(fires, fires[:, :1].T), min_precision=0.5)
    assert chosen.latent.tolist() == [0]


def test_a_concept_without_tokens_on_the_second_half_has_a_detector_but_no_rates():
    fires = torch.ones(6, 1, dtype=torch.bool)
    chosen = choose_detectors(**counts_on(fires, fires.T), min_precision=0.5)
    result = concept_result("some", 0, chosen, 6, [0, 0, 0])
    assert (result["detector"], result["precision"], result["recall"]) == (0, 1.0, 1.0)
    assert (result["miss_rate"], result["absorption"]) == (None, None)


def test_mean_absorption_is_over_the_concepts_that_have_a_rate():
    rates = [{"absorption": rate} for rate in (0.25, None, 0.0)]
    assert mean_absorption(rates) == 0.125
    assert mean_absorption(rates[1:2]) is None
