"""The field's scores against loops in float64, closed forms, and SAELens's own code."""

import itertools

import pytest
import torch
from run_factory import randn
from torch import Tensor

from matryoshka.metrics import decoder_cosines
from matryoshka.truth_scores import TruthScores, mean_correlation, nearest_features, uniqueness

N_LATENTS, N_FEATURES, D_MODEL, N = 5, 7, 4, 300


def case(seed: int) -> tuple[Tensor, ...]:
    """A decoder, directions, activations, which features are active, samples, reconstructions.

    One latent never fires, one feature is never active, and one sample is 0.
    """
    W_dec, directions = (
        randn(N_LATENTS, D_MODEL, seed=seed),
        randn(N_FEATURES, D_MODEL, seed=seed + 1),
    )
    acts = (randn(N, N_LATENTS, seed=seed + 2) - 0.5).relu()
    is_active = randn(N, N_FEATURES, seed=seed + 3) > 0.3
    x, x_hat = randn(N, D_MODEL, seed=seed + 4), randn(N, D_MODEL, seed=seed + 5)
    acts[:, 1], is_active[:, 2], x[3] = 0, False, 0
    return W_dec, directions, acts, is_active, x, x_hat


def scored(W_dec, directions, acts, is_active, x, x_hat, at_once=N):
    scores = TruthScores(W_dec, directions)
    for start in range(0, len(x), at_once):
        scores.add(*(rows[start : start + at_once] for rows in (acts, is_active, x, x_hat)))
    return scores.summary()


def by_loops(W_dec, directions, acts, is_active, x, x_hat):
    """The same by the definitions, one latent and one sample at a time."""

    def cosine(u, v):
        return float(u.double() @ v.double() / (u.double().norm() * v.double().norm()))

    size = [[abs(cosine(row, direction)) for direction in directions] for row in W_dec]
    injections = itertools.permutations(range(N_FEATURES), N_LATENTS)
    mcc = max(sum(size[j][f] for j, f in enumerate(m)) / N_LATENTS for m in injections)
    precisions, recalls, f1s = [], [], []
    for j in range(N_LATENTS):
        nearest = max(range(N_FEATURES), key=lambda f, j=j: size[j][f])
        pairs = [(bool(acts[i, j] > 0), bool(is_active[i, nearest])) for i in range(N)]
        fired, true = (sum(pair[k] for pair in pairs) for k in (0, 1))
        both = pairs.count((True, True))
        precisions.append(both / fired if fired else 0.0)
        recalls.append(both / true if true else 0.0)
        total = precisions[-1] + recalls[-1]
        f1s.append(2 * precisions[-1] * recalls[-1] / total if total else 0.0)
    ratios = [
        float(x_hat[i].double().norm() / x[i].double().norm()) for i in range(N) if x[i].any()
    ]
    nearest = [max(range(N_FEATURES), key=lambda f, row=row: row[f]) for row in size]
    return {
        "mcc": mcc,
        "f1": sum(f1s) / N_LATENTS,
        "precision": sum(precisions) / N_LATENTS,
        "recall": sum(recalls) / N_LATENTS,
        "uniqueness": len(set(nearest)) / N_LATENTS,
        "shrinkage": sum(ratios) / len(ratios),
    }


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_scores_are_the_loops(seed):
    assert scored(*case(seed)) == pytest.approx(by_loops(*case(seed)), rel=1e-6)


def test_batches_add_up():
    assert scored(*case(0), at_once=7) == pytest.approx(scored(*case(0)), rel=1e-12)


def test_latents_that_are_the_features_score_1_whichever_way_they_point():
    directions = randn(N_FEATURES, 32)
    is_active = randn(N, N_FEATURES, seed=1) > 0
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    W_dec = directions[order] * torch.tensor([1.0, -2, 3, -4, 5, -6, 7])[:, None]
    x = is_active.float() @ directions + 1
    scores = scored(W_dec, directions, is_active[:, order].float(), is_active, x, 0.5 * x)
    expected = dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness"), 1.0)
    assert scores == pytest.approx(expected | {"shrinkage": 0.5})


def test_two_latents_of_one_feature_are_one_too_many():
    directions = torch.eye(4)
    W_dec = directions[[0, 0, 1]]
    cosines = decoder_cosines(W_dec, directions)
    assert uniqueness(nearest_features(cosines)) == pytest.approx(2 / 3)
    assert mean_correlation(cosines).item() == pytest.approx(2 / 3)  # the third pair is orthogonal


def test_more_latents_than_features_are_matched_to_as_many_as_there_are():
    W_dec = torch.cat([torch.eye(3), torch.ones(2, 3)])
    assert mean_correlation(decoder_cosines(W_dec, torch.eye(3))).item() == pytest.approx(1)


def test_nothing_added_scores_0():
    W_dec, directions, *_ = case(0)
    summary = TruthScores(W_dec, directions).summary()
    assert [summary[name] for name in ("f1", "precision", "recall", "shrinkage")] == [0.0] * 4


def test_a_decoder_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="invalid numeric"):
        TruthScores(torch.full((2, 3), torch.nan), torch.eye(3))


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_scores_are_those_of_saelens(seed):
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    W_dec, directions, acts, is_active, x, x_hat = case(seed)
    calculator = evals.ClassificationMetricsCalculator(W_dec, directions)
    shrinkage = evals.ShrinkageCalculator()
    for start in range(0, N, 70):
        rows = slice(start, start + 70)
        calculator.add_batch(acts[rows], is_active[rows].float())
        shrinkage.add_batch(x_hat[rows], x[rows])
    classified = calculator.compute()
    assert scored(W_dec, directions, acts, is_active, x, x_hat) == pytest.approx(
        {
            "mcc": evals.mean_correlation_coefficient(W_dec, directions),
            "f1": classified.f1_score,
            "precision": classified.precision,
            "recall": classified.recall,
            "uniqueness": evals.feature_uniqueness(W_dec, directions),
            "shrinkage": shrinkage.compute(),
        },
        rel=1e-5,
    )
