"""Unhedged training: its gradients against their definition, and its two parts."""

import dataclasses
import itertools

import pytest
import torch
from core_cases import batches, make_trainer, rand, states_equal
from test_gates import KERNELS, N_LATENTS, REACHES, K, case, gradient, objective_of
from test_kernels import float64_groups  # noqa: F401  (grouped products in float64)
from torch.testing import assert_close

from matryoshka.errors import UserError
from matryoshka.kernels import Params
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from matryoshka.unhedged import tie
from sae import ACTIVATIONS, SAE, Gate, matryoshka_loss

WIDTHS = (2, 4, 7)


def parts_of(one, x, objective, weight):
    """The two losses of the second part, each with the other player held by `detach`."""
    order = objective.reach[0].argsort(descending=True, stable=True)
    ranked = [*objective.reach[0, order].tolist(), 0.0]
    weights = [1 - ranked[0], *(a - b for a, b in itertools.pairwise(ranked))]
    gate = Gate(one.W_dec.detach().norm(dim=1), K)
    acts = ACTIVATIONS[objective.activation](x @ one.W_enc.T + one.b_enc, gate)[:, order]
    W_dec, b_dec, lengths = one.W_dec[order], one.b_dec[0], range(N_LATENTS + 1)
    of_encoder = matryoshka_loss(x, acts, W_dec.detach(), b_dec.detach(), lengths, weights, weight)
    return of_encoder, matryoshka_loss(x, acts.detach(), W_dec, b_dec, [N_LATENTS], None, weight)


@pytest.mark.parametrize("kind", REACHES)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_encoder_learns_from_the_prefixes_and_the_decoder_from_all(kernel, activation, kind):
    params, x = case(5, activation)
    objective = dataclasses.replace(objective_of(x, REACHES[kind], activation), unhedged=True)
    ours, stats = gradient(kernel, params, objective)
    assert stats.kernels == (kernel,)
    one = Params(*(part[0].clone().requires_grad_() for part in params))
    weight = 0.3 if activation == "relu" else 0.0
    expected = torch.autograd.grad(sum(parts_of(one, x[0], objective, weight)), one[:4])
    for mine, theirs in zip(ours, expected, strict=False):
        assert_close(mine[0], theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("sparsity", ["l1", "log"])
@pytest.mark.parametrize("kernel", KERNELS[:-1])
def test_every_kernel_has_autograds_gradient(kernel, activation, sparsity):
    params, x = case(6, activation)
    objective = dataclasses.replace(objective_of(x, REACHES["sampled"], activation), unhedged=True)
    if activation == "relu":
        objective = dataclasses.replace(objective, sparsity=sparsity)
    expected, _ = gradient("autograd", params, objective)
    ours, _ = gradient(kernel, params, objective)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_one_prefix_has_nothing_to_unhedge():
    params, x = case(7, "relu")
    plain = objective_of(x, REACHES["vanilla"], "relu")
    for kernel in KERNELS:
        expected, _ = gradient(kernel, params, plain)
        ours, _ = gradient(kernel, params, dataclasses.replace(plain, unhedged=True))
        for mine, theirs in zip(ours, expected, strict=True):
            assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ the two parts


def test_a_tied_encoder_is_the_part_of_it_along_the_decoder():
    params = Params.of(rand(2, 2 * 5 * 7 + 7 + 5, dtype=torch.float64), 5, 7)
    before = params.W_enc.clone()
    tie(params)
    for i, j in itertools.product(range(2), range(7)):
        u = params.W_dec[i, j] / params.W_dec[i, j].norm()
        assert_close(params.W_enc[i, j], (before[i, j] @ u) * u)


def test_a_decoder_row_of_zeros_ties_its_encoder_to_zero():
    params = Params.of(rand(1, 2 * 5 * 7 + 7 + 5), 5, 7)
    params.W_dec[0, 2] = 0
    tie(params)
    assert torch.equal(params.W_enc[0, 2], torch.zeros(5))
    assert params.W_enc.isfinite().all()


def cosines(trainer):
    """Of each latent's encoder with its decoder: [n_saes, n_latents]."""
    return torch.stack(
        [torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1).abs() for sae in trainer.saes]
    )


def test_the_encoder_is_tied_for_that_share_of_the_steps_and_free_afterwards():
    trainer = make_trainer(n_steps=20, unhedged=0.5)
    for i, x in enumerate(batches(20)):
        trainer.step(x)
        is_tied = bool((cosines(trainer) > 1 - 1e-5).all())
        assert is_tied == (i < 10)


def test_the_tied_part_is_of_one_prefix_whatever_the_prefixes():
    trainers = [make_trainer(n_prefixes=(k, 1), n_steps=20, unhedged=0.5) for k in (4, 7)]
    for x in batches(10):
        for trainer in trainers:
            trainer.step(x)
    assert states_equal(*(trainer.state_dict() for trainer in trainers))
    for trainer in trainers:
        trainer.step(batches(11)[-1])
    assert not states_equal(*(trainer.state_dict() for trainer in trainers))


@pytest.mark.parametrize("stop", [7, 10, 13])
@pytest.mark.parametrize("settings", [{}, {"widths": WIDTHS}])
def test_resuming_is_not_stopping_in_either_part(stop, settings):
    made = {"n_prefixes": (4, 4), "n_steps": 20, "unhedged": 0.5} | settings
    xs, whole, first = batches(20), make_trainer(**made), make_trainer(**made)
    for x in xs:
        whole.step(x)
    for x in xs[:stop]:
        first.step(x)
    second = make_trainer(**made)
    second.load_state_dict(first.state_dict())
    for x in xs[stop:]:
        second.step(x)
    assert states_equal(whole.state_dict(), second.state_dict())


def test_every_gradient_trains_the_same_saes():
    saes = []
    for gradient_of in ("auto", "autograd"):
        trainer = make_trainer(n_steps=20, unhedged=0.5, gradient=gradient_of, dtype=torch.float64)
        for x in batches(20):
            trainer.step(x)
        saes.append(trainer.state_dict()["params"])
    assert_close(*saes, rtol=1e-6, atol=1e-8)


def test_widths_take_the_latents_that_are_worth_most():
    """There are no prefixes in the first part that could have put latents in their places."""
    trainer = make_trainer(seeds=(0,), n_prefixes=(4,), n_steps=20, unhedged=0.5, widths=WIDTHS)
    for x in batches(20):
        trainer.step(x)
    mean_square = trainer.state_dict()["mean_square"]
    order = trainer.order()
    assert (mean_square.gather(1, order).diff(dim=1) <= 0).all()


def test_restarts_are_refused():
    with pytest.raises(UserError, match="use one of them"):
        TrainerConfig(n_steps=10, target_l0=2, restart_every=2, unhedged=0.5).check(n_latents=7)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match="--unhedged must be a share, between 0 and 1"):
        TrainerConfig(n_steps=10, target_l0=2, unhedged=share).check(n_latents=7)


def test_the_true_tree_is_an_equilibrium_of_orthogonal_features():
    """One parent with two children that exclude each other; without a sparsity loss."""
    directions = torch.eye(3, dtype=torch.float64)
    present = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.float64)
    sae = SAE(3, 3).double()
    sae = sae.with_tensors(W_enc=directions, b_enc=torch.zeros(3).double(), W_dec=directions)
    settings = {"n_steps": 10, "target_l0": 2.0, "n_prefixes": 2, "norm_decay": 0.0}
    for unhedged, stays in ((1e-9, True), (0.0, False)):
        config = TrainerConfig(**settings, unhedged=unhedged, sparsity_weight=1e-12)
        trainer = Trainer([sae], config, [0])
        trainer.n_steps_done = 1  # past the tied part
        norm = trainer.step(present)["grad_norm"]
        assert bool(norm < 1e-9) == stays


def test_two_likely_children_make_a_wrong_tree_the_optimum():
    """The table of docs/toy_details.md: parent T, and M0, M1 or neither: never both."""
    T, M0, M1 = torch.eye(3, dtype=torch.float64)
    x = torch.stack([T + M0, T + M1, T])
    chances = torch.tensor([0.35, 0.35, 0.3], dtype=torch.float64)
    true = torch.stack([T, M0, M1]), x
    first = T + M0
    left = x - (x @ first / first.square().sum())[:, None] * first
    acts = torch.stack([x @ first / first.square().sum(), *torch.eye(3).double()[1:]], dim=1)
    wrong = torch.stack([first, left[1], left[2]]), acts
    found = []
    for W_dec, a in (true, wrong):
        errors = [(x - a[:, :m] @ W_dec[:m]).square().sum(1) @ chances for m in (3, 1, 2)]
        l0, l1 = (a > 0).double().sum(1) @ chances, (a * W_dec.norm(dim=1)).sum(1) @ chances
        found.append([*map(float, errors), float(l0), float(l1)])
    assert found[0] == pytest.approx([0, 0.7, 0.35, 1.7, 1.7])
    assert found[1] == pytest.approx([0, 0.675, 0.15, 1.65, 1.5954], abs=1e-4)
