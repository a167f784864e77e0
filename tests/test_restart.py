"""Restarts of the last latent, against a plain loop."""

import pytest
import torch
from core_cases import rand, states_equal

from matryoshka.kernels import Objective, Params
from matryoshka.restart import restart_last
from matryoshka.trainer import Trainer
from matryoshka.trainer_config import TrainerConfig
from sae import ACTIVATIONS, SAE


def test_a_lost_feature_is_restarted_and_a_found_one_is_left_alone():
    """Two orthogonal features, two latents: one latent on each, or the second on nothing."""
    x = torch.eye(2).repeat(8, 1) * 3
    found = SAE(2, 2)
    with torch.no_grad():
        found.W_enc.copy_(torch.eye(2))
        found.W_dec.copy_(torch.eye(2))
    lost = found.with_tensors()
    with torch.no_grad():
        lost.W_enc[:, 1] = -lost.W_enc[:, 1]  # never fires, so no gradient would move it
    config = TrainerConfig(
        n_steps=10, target_l0=1.0, n_prefixes=1, lr=1e-30, restart_every=1, restart_window=(0, 1)
    )
    trainer = Trainer([found, lost], config, [0, 0])
    trainer.step(x)
    for sae in trainer.saes:
        assert (sae(x) - x).abs().max() < 1e-3


def state_of(d_model, n_latents, n_saes, seed):
    n_params = 2 * d_model * n_latents + n_latents + d_model
    state = {
        name: rand(n_saes, n_params, seed=seed + i)
        for i, name in enumerate(("params", "adam_mean", "adam_square"))
    }
    state["mean_square"] = rand(n_saes, n_latents, seed=seed + 9).abs() / 10
    return state


def by_hand(state, x, i, d_model, n_latents, activation):
    """What becomes of SAE i: the latent that is worth least, against the residual's worth."""
    parts = {
        name: Params.of(state[name].clone(), d_model, n_latents).one(i)
        for name in ("params", "adam_mean", "adam_square")
    }
    params, worths = parts["params"], state["mean_square"][i].clone()
    last = int(worths.argsort(descending=True, stable=True)[-1])
    acts = activation(x[i] @ params.W_enc.T + params.b_enc)
    residual = x[i] - params.b_dec - acts @ params.W_dec
    u = max(residual, key=lambda r: float(r.norm()))
    u = u / u.norm()
    worth = float(torch.relu(residual @ u).square().mean())
    moves = worth > float(worths[last])
    if moves:
        for name, row in (("params", u), ("adam_mean", 0), ("adam_square", 0)):
            parts[name].W_enc[last] = row
            parts[name].W_dec[last] = row
            parts[name].b_enc[0, last] = 0
        worths[last] = worth
    return parts, worths, moves


def objective_on(x, activation):
    nothing = torch.zeros(len(x), 6)
    return Objective(x, nothing, nothing, activation=activation)


def hard_threshold(preacts, gate=None):
    return preacts * (preacts > 1)


@pytest.mark.parametrize("activation", [torch.relu, hard_threshold])
def test_a_restart_is_what_a_loop_does(activation, monkeypatch):
    """To weights, bias, both of Adam's moments and the running mean; and to nothing else."""
    monkeypatch.setitem(ACTIVATIONS, "mine", lambda z, _: activation(z))
    d_model, n_latents, n_saes, moved = 4, 6, 5, []
    for seed in range(6):
        state = state_of(d_model, n_latents, n_saes, 100 * seed)
        x = rand(n_saes, 30, d_model, seed=seed) * (0.2 if seed % 2 else 2.0)
        if seed % 2:
            state["mean_square"] += 1.0  # what is worth more than any residual stays
        expected = [by_hand(state, x, i, d_model, n_latents, activation) for i in range(n_saes)]
        params = Params.of(state["params"], d_model, n_latents)
        order = state["mean_square"].sort(dim=1, descending=True, stable=True).indices
        restart_last(state, params, order[:, -1:], objective_on(x, "mine"))
        for i, (parts, worths, moves) in enumerate(expected):
            moved.append(moves)
            torch.testing.assert_close(state["mean_square"][i], worths)
            for name, of_name in parts.items():
                for ours, theirs in zip(
                    Params.of(state[name], d_model, n_latents).one(i), of_name, strict=True
                ):
                    torch.testing.assert_close(ours, theirs)
    assert any(moved)
    assert not all(moved)


def test_what_is_reconstructed_to_the_last_bit_is_left_alone():
    """A residual of zeros has no direction: nothing moves, and nothing becomes NaN."""
    state = state_of(4, 6, 2, 0)
    state["params"].zero_()
    state["mean_square"].zero_()
    before = {name: tensor.clone() for name, tensor in state.items()}
    params = Params.of(state["params"], 4, 6)
    objective = objective_on(torch.zeros(2, 30, 4), "relu")
    restart_last(state, params, torch.full((2, 1), 5), objective)
    assert states_equal(before, state)
