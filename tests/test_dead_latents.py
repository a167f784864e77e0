"""Dead latents: the auxiliary gradient against autograd, and what starting anew changes."""

import pytest
import torch
from core_cases import rand
from torch.testing import assert_close

from matryoshka.dead_latents import Auxiliary, add_auxiliary_gradient, resample
from matryoshka.kernels import Objective, Params
from matryoshka.kernels.layout import Acts, SparseActs
from matryoshka.prefix_draws import width_reach
from sae import seeded_generator

D_MODEL, N_LATENTS, BATCH, K = 6, 14, 30, 3
N_PARAMS = 2 * D_MODEL * N_LATENTS + N_LATENTS + D_MODEL
WIDTHS = (2, 5, 14)
NONE, FEW, MANY = (), (3, 9), (0, 3, 4, 7, 8, 9, 12)  # of d_model / 2 = 3: fewer, and more
ALL = tuple(range(N_LATENTS))


def objective_of(n_saes=2, activation="relu", x=None):
    x = rand(n_saes, BATCH, D_MODEL, seed=1, dtype=torch.float64) if x is None else x
    reach = width_reach(N_LATENTS, list(WIDTHS)).double().expand(n_saes, -1)
    return Objective(x, reach, 0.1 * reach, None, "l1", activation, K)


def dead_of(*which):
    """bool [n_saes, n_latents], of one tuple of latents an SAE."""
    dead = torch.zeros(len(which), N_LATENTS, dtype=torch.bool)
    for row, latents in zip(dead, which, strict=True):
        row[list(latents)] = True
    return dead


def kept(acts, k):
    """Of each row the k largest, by a loop."""
    rows = []
    for row in acts:
        keep = set(row.detach().argsort(descending=True)[:k].tolist())
        rows.append(torch.stack([a if j in keep else 0 * a for j, a in enumerate(row)]))
    return torch.stack(rows)


def auxiliary_loss(p, x, dead, weight, ends, k=None):
    """As the docstring writes it, for one SAE whose prefixes end at `ends`."""
    preacts = torch.relu(x @ p.W_enc.T + p.b_enc)
    acts = preacts if k is None else kept(preacts * p.W_dec.norm(dim=1), k).sign() * preacts
    loss, begin = x.new_zeros(()), 0
    for end in ends:
        e = (x - p.b_dec - acts[:, :end] @ p.W_dec[:end]).detach()
        index = [j for j in range(begin, end) if dead[j]]
        begin = end
        if not index:
            continue
        e_hat = kept(preacts[:, index], D_MODEL // 2) @ p.W_dec[index]
        error = (e - e_hat).square().sum(1).mean()
        loss = loss + error / (e - e.mean(0)).square().sum(1).mean()
    return weight * loss / len(ends)


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize(
    "which", [(NONE, FEW), (FEW, MANY), (MANY, ALL), (ALL, NONE), (NONE, NONE)]
)
def test_the_auxiliary_gradient_is_autograds(which, activation, by_level):
    flat = rand(2, N_PARAMS, seed=3, dtype=torch.float64)
    written = rand(2, N_PARAMS, seed=4, dtype=torch.float64)  # the loss's own gradient stays
    before, dead, objective = written.clone(), dead_of(*which), objective_of(activation=activation)
    views = [Params.of(tensor, D_MODEL, N_LATENTS) for tensor in (written, flat)]
    add_auxiliary_gradient(*views, objective, dead, Auxiliary(0.25, by_level))

    leaf = flat.clone().requires_grad_()
    ends = WIDTHS if by_level else (N_LATENTS,)
    losses = [
        auxiliary_loss(
            Params.of(leaf, D_MODEL, N_LATENTS).one(i),
            objective.x[i],
            dead[i],
            0.25,
            ends,
            K if activation == "topk" else None,
        )
        for i in range(2)
    ]
    total = sum(losses) + 0 * leaf.sum()
    (expected,) = torch.autograd.grad(total, leaf)
    assert_close(written - before, expected, rtol=1e-9, atol=1e-12)
    for i in range(2):
        assert torch.equal(written[i], before[i]) == (not which[i])


@pytest.mark.parametrize("by_level", [False, True])
def test_activations_that_are_known_are_taken_as_they_are(by_level):
    """As a matrix or one by one, in any order."""
    flat, objective = rand(1, N_PARAMS, seed=3, dtype=torch.float64), objective_of(1)
    p = Params.of(flat, D_MODEL, N_LATENTS).one(0)
    dense = torch.relu(objective.x[0] @ p.W_enc.T + p.b_enc).T
    latent, sample = (index.flip(0) for index in dense.nonzero(as_tuple=True))
    listed = Acts(dense.shape, None, SparseActs(latent, sample, dense[latent, sample]))
    found = []
    for known in (None, Acts(dense.shape, dense, None), listed):
        views = [Params.of(tensor, D_MODEL, N_LATENTS) for tensor in (torch.zeros_like(flat), flat)]
        add_auxiliary_gradient(*views, objective, dead_of(MANY), Auxiliary(0.25, by_level), known)
        found.append(torch.cat([tensor.flatten() for tensor in views[0]]))
    assert found[0].abs().max() > 0
    for other in found[1:]:
        assert_close(other, found[0])


@pytest.mark.parametrize("by_level", [False, True])
def test_nothing_is_added_where_nothing_is_left_to_explain(by_level):
    """Samples that are all the same leave an error without a variance: no division by it."""
    flat = rand(1, N_PARAMS, seed=5, dtype=torch.float64)
    written = torch.zeros_like(flat)
    objective = objective_of(1, x=torch.ones(1, BATCH, D_MODEL, dtype=torch.float64))
    views = [Params.of(tensor, D_MODEL, N_LATENTS) for tensor in (written, flat)]
    Params.of(flat, D_MODEL, N_LATENTS).W_dec.zero_()
    add_auxiliary_gradient(*views, objective, dead_of(ALL), Auxiliary(0.25, by_level))
    assert torch.equal(written, torch.zeros_like(flat))


# ------------------------------------------------------------------------------------ starting anew


def state_of(n_saes=2):
    state = {
        name: rand(n_saes, N_PARAMS, seed=10 + i, dtype=torch.float64)
        for i, name in enumerate(("params", "adam_mean", "adam_square"))
    }
    state["silent"] = 1.0 + torch.arange(n_saes * N_LATENTS).view(n_saes, -1)
    return state


def resampled(which, objective=None, seeds=(0, 1)):
    """The state before and after, and the objective."""
    objective = objective or objective_of(len(which))
    before, after = state_of(len(which)), state_of(len(which))
    params = Params.of(after["params"], D_MODEL, N_LATENTS)
    generators = [seeded_generator(seed, 7) for seed in seeds[: len(which)]]
    resample(after, params, objective, dead_of(*which), generators)
    return before, after, objective


def residual(state, objective, i):
    p = Params.of(state["params"], D_MODEL, N_LATENTS).one(i)
    acts = torch.relu(objective.x[i] @ p.W_enc.T + p.b_enc)
    return objective.x[i] - p.b_dec - acts @ p.W_dec


def test_dead_latents_start_along_what_is_left_and_the_others_stay():
    which = (FEW, MANY)
    before, after, objective = resampled(which)
    for i, latents in enumerate(which):
        dead = dead_of(latents)[0]
        directions = torch.nn.functional.normalize(residual(before, objective, i), dim=1)
        old = Params.of(before["params"], D_MODEL, N_LATENTS).one(i)
        new = Params.of(after["params"], D_MODEL, N_LATENTS).one(i)
        row_norm = old.W_dec[~dead].norm(dim=1).mean()
        column_norm = old.W_enc[~dead].norm(dim=1).mean()
        taken = set()
        for j in latents:
            nearest = int((directions @ new.W_dec[j]).argmax())
            assert_close(new.W_dec[j], row_norm * directions[nearest])
            assert_close(new.W_enc[j], 0.2 * column_norm * directions[nearest])
            assert new.b_enc[0, j] == 0
            taken.add(nearest)
        assert len(taken) == len(latents), "no two of one sample"
        for name in ("adam_mean", "adam_square"):
            moments = Params.of(after[name], D_MODEL, N_LATENTS).one(i)
            for tensor in (moments.W_enc[dead], moments.W_dec[dead], moments.b_enc[0, dead]):
                assert torch.equal(tensor, torch.zeros_like(tensor))
        assert torch.equal(after["silent"][i][dead], torch.zeros(len(latents)))
        assert torch.equal(after["silent"][i][~dead], before["silent"][i][~dead])
        for name in ("params", "adam_mean", "adam_square"):
            one, other = (Params.of(s[name], D_MODEL, N_LATENTS).one(i) for s in (before, after))
            assert torch.equal(one.W_enc[~dead], other.W_enc[~dead])
            assert torch.equal(one.W_dec[~dead], other.W_dec[~dead])
            assert torch.equal(one.b_enc[0, ~dead], other.b_enc[0, ~dead])
            assert torch.equal(one.b_dec, other.b_dec)


@pytest.mark.parametrize("which", [(NONE, NONE), (ALL, ALL)])
def test_where_none_is_dead_or_all_are_nothing_changes(which):
    """Where all are dead, there is no norm to start with."""
    before, after, _ = resampled(which)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_sae_of_a_stack_starts_its_latents_as_alone():
    _, together, objective = resampled((FEW, MANY))
    alone = {name: tensor[1:].clone() for name, tensor in state_of().items()}
    params = Params.of(alone["params"], D_MODEL, N_LATENTS)
    resample(alone, params, objective.slice(1), dead_of(MANY), [seeded_generator(1, 7)])
    for name, tensor in alone.items():
        assert_close(together[name][1:], tensor)


def test_samples_are_drawn_by_their_squared_error():
    """Over many seeds, one dead latent takes each of four samples as often as its share says."""
    x = torch.zeros(1, 4, D_MODEL, dtype=torch.float64)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    x[0, torch.arange(4), torch.arange(4)] = 10 * shares.sqrt()  # each along its own axis
    state = state_of(1)
    p = Params.of(state["params"], D_MODEL, N_LATENTS)
    p.b_enc.fill_(-1e6)  # nothing fires: what is left is x itself
    p.b_dec.zero_()
    n_drawn, n = torch.zeros(4), 600
    for seed in range(n):
        one = {name: tensor.clone() for name, tensor in state.items()}
        params = Params.of(one["params"], D_MODEL, N_LATENTS)
        resample(one, params, objective_of(1, x=x), dead_of((5,)), [seeded_generator(seed)])
        n_drawn[int(params.W_dec[0, 5].argmax())] += 1
    assert_close(n_drawn.double() / n, shares, rtol=0, atol=0.08)  # 4 standard deviations


def test_of_more_dead_latents_than_samples_the_first_start():
    x = rand(1, 2, D_MODEL, seed=1, dtype=torch.float64)
    before, after, _ = resampled((MANY,), objective_of(1, x=x))
    rows = [Params.of(s["params"], D_MODEL, N_LATENTS).W_dec[0] for s in (before, after)]
    changed = (rows[0] != rows[1]).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == list(MANY[:2])


def test_an_sae_that_has_diverged_is_left_to_be_noticed():
    """Its error is not finite, which no sample can be drawn by."""
    x = torch.full((1, BATCH, D_MODEL), torch.inf, dtype=torch.float64)
    before, after, _ = resampled((FEW,), objective_of(1, x=x))
    assert all(torch.equal(before[name], after[name]) for name in before)
