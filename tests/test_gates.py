"""Activation functions that choose: TopK, BatchTopK and JumpReLU, in sae.py and in every kernel."""

import dataclasses
import itertools

import pytest
import torch
from core_cases import rand
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import float64_groups  # noqa: F401  (grouped products in float64)
from torch.testing import assert_close

from matryoshka.kernels import Objective, Params, Workspace, write_gradient
from matryoshka.kernels.encode import keep_largest
from matryoshka.prefix_draws import expected_reach, reach, width_reach
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import (
    ACTIVATIONS,
    SAE,
    Gate,
    batchtopk,
    jumprelu,
    matryoshka_loss,
    sample_prefixes,
    seeded_generator,
    topk,
)

D_MODEL, N_LATENTS, BATCH, K = 6, 24, 40, 3
KERNELS = ("all_pairs", "by_prefix", "grouped", "sparse", "autograd")
REACHES = {
    "vanilla": torch.ones(N_LATENTS, dtype=torch.float64),
    "sampled": reach(sample_prefixes(N_LATENTS, 5, seeded_generator(3)), N_LATENTS).double(),
    "expected": expected_reach(N_LATENTS, 5),
    "fixed": width_reach(N_LATENTS, [2, 7, 24]),
    "weighted": width_reach(N_LATENTS, [2, 7, 24], [0.25, 1, 3]),
    "with the bias alone": width_reach(N_LATENTS, [0, 2, 7, 24]),
}


# ------------------------------------------------------------------------------------ the functions


def gate_of(seed=0, **more):
    return Gate(0.2 + rand(N_LATENTS, seed=seed).abs(), **more)


def test_topk_keeps_the_k_largest_contributions_of_each_sample():
    preacts, gate = rand(BATCH, N_LATENTS, seed=1), gate_of(k=K)
    acts = topk(preacts.clone(), gate)
    for row, kept in zip(preacts, acts, strict=True):
        scores = row.clamp(min=0) * gate.norms
        largest_k = scores.argsort(descending=True)[:K]
        expected = torch.zeros(N_LATENTS)
        expected[largest_k] = row[largest_k].clamp(min=0)
        assert_close(kept, expected)


def test_batchtopk_keeps_k_contributions_a_sample_of_all_together():
    preacts, gate = rand(BATCH, N_LATENTS, seed=2), gate_of(k=2.5)
    acts = batchtopk(preacts.clone(), gate)
    scores = (preacts.clamp(min=0) * gate.norms).flatten()
    expected = torch.zeros_like(scores)
    index = scores.argsort(descending=True)[: round(2.5 * BATCH)]
    expected[index] = preacts.flatten()[index]
    assert_close(acts.flatten(), expected)
    assert (acts > 0).sum() == 100


def test_each_sae_of_a_stack_chooses_for_itself():
    preacts, gate = rand(3, BATCH, N_LATENTS, seed=3), gate_of(k=K)
    together = batchtopk(preacts.clone(), gate)
    for one, alone in zip(together, preacts, strict=True):
        assert torch.equal(one, batchtopk(alone.clone(), gate))


def test_a_trained_batchtopk_is_a_jumprelu():
    preacts, gate = rand(BATCH, N_LATENTS, seed=4), gate_of(k=K, threshold=torch.full((24,), 0.7))
    expected = preacts * (preacts > 0.7)
    assert torch.equal(batchtopk(preacts.clone(), gate), expected)
    assert torch.equal(jumprelu(preacts.clone(), gate), expected)


def test_fewer_than_k_positive_ones_are_all_kept():
    preacts, gate = -rand(BATCH, N_LATENTS, seed=5).abs(), gate_of(k=K)
    preacts[0, 0] = 1.0
    for function in (topk, batchtopk):
        acts = function(preacts.clone(), gate)
        assert acts[0, 0] == 1.0
        assert acts.sum() == 1.0


# --------------------------------------------------- the largest activations, without a full sort


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    batch=st.sampled_from([1, 7, 64, 300]),
    k=st.floats(0.05, 20),
    shift=st.sampled_from([-8.0, -2.0, 0.0, 3.0]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_the_largest_are_those_that_batchtopk_keeps(seed, batch, k, shift, spread):
    """Whatever the guess was worth: few positive ones, all positive, columns of other sizes."""
    n_latents = 500
    preacts = rand(n_latents, batch, seed=seed) + shift
    preacts *= (spread * rand(1, batch, seed=seed + 1)).exp()  # where a sample's are all large
    norms = rand(n_latents, seed=seed + 2).abs()
    expected = batchtopk(preacts.T.clone(), Gate(norms, k)).T
    n = max(1, round(k * batch))
    found = keep_largest(preacts, norms, n, Workspace())
    latent, sample, a = found.sparse
    dense = torch.zeros_like(preacts)
    dense[latent, sample] = a
    assert torch.equal(dense, expected)
    assert latent.diff().ge(0).all()  # by latent
    if len(a):
        assert found.least_kept == (a * norms[latent]).min()


# ------------------------------------------------------------------------------------- the gradient


def case(seed, activation):
    """Parameters in float64, with thresholds of a size that half of the activations are over."""
    n_params = 2 * D_MODEL * N_LATENTS + N_LATENTS + D_MODEL
    flat = 0.7 * rand(1, n_params, seed=seed, dtype=torch.float64)
    if activation == "jumprelu":
        log_threshold = -1 + 0.5 * rand(1, N_LATENTS, seed=seed + 1, dtype=torch.float64)
        flat = torch.cat([flat, log_threshold], dim=1)
    x = rand(1, BATCH, D_MODEL, seed=seed + 2, dtype=torch.float64)
    return Params.of(flat, D_MODEL, N_LATENTS), x


def objective_of(x, of_places, activation, weight=0.3):
    order = torch.randperm(N_LATENTS, generator=seeded_generator(7))
    reached = torch.empty_like(of_places)
    reached[order] = of_places
    price = weight * reached * (activation not in ("topk", "batchtopk"))
    sparsity = "l0" if activation == "jumprelu" else "l1"
    return Objective(
        x, reached[None], price[None], None, sparsity, activation, float(K), bandwidth=0.3
    )


def gradient(kernel, params, objective):
    grads = Params(*(torch.full_like(part, torch.nan) for part in params))
    return grads, write_gradient(grads, params, objective, kernel)


@pytest.mark.parametrize("kind", REACHES)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("kernel", KERNELS[:-1])
def test_every_kernel_has_autograds_gradient(kernel, activation, kind):
    for seed in range(3):
        params, x = case(10 * seed, activation)
        objective = objective_of(x, REACHES[kind], activation)
        expected, of_autograd = gradient("autograd", params, objective)
        ours, stats = gradient(kernel, params, objective)
        assert stats.kernels == (kernel,)
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert_close(stats.l0, of_autograd.l0)
        assert_close(stats.mean_square, of_autograd.mean_square)
        if activation == "batchtopk":
            assert_close(stats.least_kept, of_autograd.least_kept)


@pytest.mark.parametrize("kind", REACHES)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_autograds_gradient_is_that_of_the_loss(activation, kind):
    """Each length's weight is written out here; what lacks of 1 is the bias alone's."""
    params, x = case(5, activation)
    objective = objective_of(x, REACHES[kind], activation)
    ours, _ = gradient("autograd", params, objective)
    one = Params(*(part[0].clone().requires_grad_() for part in params))
    order = objective.reach[0].argsort(descending=True, stable=True)
    ranked = [*objective.reach[0, order].tolist(), 0.0]
    weights = [1 - ranked[0], *(a - b for a, b in itertools.pairwise(ranked))]
    gate = Gate(one.W_dec.detach().norm(dim=1), K)
    acts = ACTIVATIONS[activation](x[0] @ one.W_enc.T + one.b_enc, gate)
    price = 0.3 if activation == "relu" else 0.0
    loss = matryoshka_loss(
        x[0],
        acts[:, order],
        one.W_dec[order],
        one.b_dec[0],
        range(N_LATENTS + 1),
        weights,
        price,
    )
    expected = torch.autograd.grad(loss, one[:4])
    for mine, theirs in zip(ours, expected, strict=False):
        assert_close(mine[0], theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_jumprelus_thresholds_have_the_papers_gradient(kernel):
    """By a loop over samples and latents, from the equations in the head of jumprelu.py."""
    params, x = case(8, "jumprelu")
    objective = objective_of(x, REACHES["vanilla"], "jumprelu", weight=0.4)
    ours, _ = gradient(kernel, params, objective)
    one = params.one(0)
    threshold = one.log_threshold[0].exp()
    preacts = x[0] @ one.W_enc.T + one.b_enc
    acts = preacts * (preacts > threshold)
    residual = acts @ one.W_dec + one.b_dec - x[0]
    expected = torch.zeros(N_LATENTS, dtype=torch.float64)
    for i in range(BATCH):
        for j in range(N_LATENTS):
            if abs(preacts[i, j] - threshold[j]) < 0.15:
                slope = 2 * residual[i] @ one.W_dec[j] * threshold[j] + 0.4
                expected[j] -= slope / 0.3 / BATCH
    assert (expected != 0).sum() > 10
    assert_close(ours.log_threshold[0, 0], expected * threshold, rtol=1e-9, atol=1e-12)


def test_a_bandwidth_of_nothing_moves_no_threshold():
    params, x = case(8, "jumprelu")
    objective = dataclasses.replace(objective_of(x, REACHES["fixed"], "jumprelu"), bandwidth=1e-12)
    for kernel in KERNELS:
        assert not gradient(kernel, params, objective)[0].log_threshold.any()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("kind", ["vanilla", "fixed"])
@pytest.mark.parametrize("kernel", ["by_prefix", "grouped", "sparse"])
def test_what_a_kernel_hands_on_are_the_activations(kernel, kind, activation):
    """They are read again, by the auxiliary loss, after the gradient is written."""
    params, x = case(6, activation)
    objective = objective_of(x, REACHES[kind], activation)
    _, stats = gradient(kernel, params, objective)
    one = params.one(0)
    threshold = one.log_threshold[0].exp() if activation == "jumprelu" else None
    gate = Gate(one.W_dec.norm(dim=1), K, threshold)
    expected = ACTIVATIONS[activation](x[0] @ one.W_enc.T + one.b_enc, gate)
    acts = stats.acts
    if acts.dense is not None:
        assert_close(acts.dense.T, expected)
    else:
        latent, sample, a = acts.sparse
        dense = torch.zeros_like(expected)
        dense[sample, latent] = a
        assert_close(dense, expected)


@pytest.mark.parametrize("kernel", KERNELS[:-1])
def test_one_width_beside_the_bias_alone(kernel):
    params, x = case(7, "relu")
    objective = objective_of(x, width_reach(N_LATENTS, [0, N_LATENTS]), "relu")
    expected, _ = gradient("autograd", params, objective)
    ours, _ = gradient(kernel, params, objective)
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("start", "n_steps"),
    [(0.1, 2000), pytest.param(2.0, 2000, marks=SLOW), pytest.param(1e-3, 6000, marks=SLOW)],
)
def test_jumprelu_reaches_its_l0_from_any_start(start: float, n_steps: int) -> None:
    """Where thresholds learn as slowly as weights do, L0 ends at twice its target here."""
    generator = seeded_generator(0)
    directions = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=1)
    strengths = torch.rand(40, 256, 60, generator=generator)
    xs = (strengths - 0.95).relu() @ directions  # 3 of 60 are active in the mean
    sae = SAE(16, 64, activation="jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(start)
    config = TrainerConfig(
        n_steps=n_steps,
        target_l0=6,
        n_prefixes=1,
        lr=3e-3,
        l0_control="steady",
        sparsity_weight=1.2,
    )
    trainer = Trainer([sae], config, [0])
    l0 = [float(trainer.step(xs[i % len(xs)])["l0"]) for i in range(n_steps)]
    assert sum(l0[-n_steps // 20 :]) / (n_steps // 20) == pytest.approx(6, rel=0.02)
