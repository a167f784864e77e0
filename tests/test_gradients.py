"""gradients.py, each of its ways, against loops over prefixes in float64, and each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradients
from gradients import Params, write_gradient
from sae import reach as reach_by_place
from sae import sample_prefixes, seeded_generator

D_MODEL, N_LATENTS, BATCH = 5, 7, 11
WAYS = ("gram", "blocks", "runs")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed, 99))


def loop_loss(W_enc, b_enc, W_dec, b_dec, x, prefixes, order, weight, sparsity):
    """The prefix loss of the paper as it is written down: one reconstruction a prefix, a loop."""
    acts = torch.relu(x @ W_enc + b_enc)
    total = 0.0
    for m in prefixes:
        kept = order[: int(m)]
        x_hat = b_dec + sum(acts[:, j, None] * W_dec[j] for j in kept)
        error = ((x - x_hat) ** 2).sum(dim=1).mean()
        paid = 0.0
        for j in kept:
            normed = acts[:, j] * W_dec[j].norm()
            paid += (normed if sparsity == "l1" else torch.log((normed + 0.1) / 0.1)).mean()
        total = total + error + weight * paid
    return total / len(prefixes)


def random_case(seed, n_prefixes):
    """Float64 parameters [1, ...], x, prefixes, and an order that is not the stored one."""
    flat = 0.5 * rand(1, 2 * D_MODEL * N_LATENTS + N_LATENTS + D_MODEL, seed=seed).double()
    x = rand(BATCH, D_MODEL, seed=seed + 1).double()
    prefixes = sample_prefixes(N_LATENTS, n_prefixes, seeded_generator(seed))
    order = torch.randperm(N_LATENTS, generator=seeded_generator(seed, 1))
    return flat, x, prefixes, order


def reach_by_latent(prefixes, order):
    """Counted in float64: the share of prefixes that contain each latent where it is stored."""
    shares = torch.empty(N_LATENTS, dtype=torch.float64)
    for place, latent in enumerate(order):
        shares[latent] = (prefixes > place).double().mean()
    return shares


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_prefixes=st.integers(1, N_LATENTS),
    weight=st.floats(0, 3),
    sparsity=st.sampled_from(["l1", "log"]),
)
@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_autograds_of_the_loop(way, seed, n_prefixes, weight, sparsity):
    flat, x, prefixes, order = random_case(seed, n_prefixes)
    flat.requires_grad_()
    W_enc_T, b_enc, W_dec, b_dec = (part[0] for part in Params.of(flat, D_MODEL, N_LATENTS))
    W_enc = W_enc_T.T
    loss = loop_loss(W_enc, b_enc[0], W_dec, b_dec[0], x, prefixes, order, weight, sparsity)
    (expected,) = torch.autograd.grad(loss, flat)

    by_latent = reach_by_latent(prefixes, order)[None]
    grad = torch.full_like(flat, torch.nan)  # every element must be written
    with torch.no_grad():
        l0, mean_square = write_gradient(
            Params.of(grad, D_MODEL, N_LATENTS),
            Params.of(flat.detach(), D_MODEL, N_LATENTS),
            x[None],
            by_latent,
            weight * by_latent,
            sparsity,
            way=way,
        )
        acts = torch.relu(x @ W_enc + b_enc[0])
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(l0[0], (acts > 0).double().sum(1).mean())
    normed = acts * W_dec.detach().norm(dim=1)
    torch.testing.assert_close(mean_square[0], (normed**2).mean(0))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_against_finite_differences(way):
    flat, x, prefixes, order = random_case(seed=3, n_prefixes=3)

    def loss(values):
        W_enc, b_enc, W_dec, b_dec = (p[0] for p in Params.of(values[None], D_MODEL, N_LATENTS))
        return loop_loss(W_enc.T, b_enc[0], W_dec, b_dec[0], x, prefixes, order, 0.7, "l1")

    by_latent = reach_by_latent(prefixes, order)[None]
    grad = torch.zeros_like(flat)
    params = Params.of(flat, D_MODEL, N_LATENTS)
    write_gradient(
        Params.of(grad, D_MODEL, N_LATENTS),
        params,
        x[None],
        by_latent,
        0.7 * by_latent,
        "l1",
        way=way,
    )
    for i in range(0, flat.shape[1], 3):
        nudge = torch.zeros_like(flat[0])
        nudge[i] = 1e-6
        slope = (loss(flat[0] + nudge) - loss(flat[0] - nudge)) / 2e-6
        assert abs(slope - grad[0, i]) < 1e-6 * (1 + abs(slope))


def test_closed_form_of_the_module_docstring_is_the_loop():
    flat, x, prefixes, order = random_case(seed=5, n_prefixes=4)
    W_enc_T, b_enc, W_dec, b_dec = (p[0] for p in Params.of(flat, D_MODEL, N_LATENTS))
    W_enc = W_enc_T.T
    s = reach_by_latent(prefixes, order)
    acts, centred = torch.relu(x @ W_enc + b_enc), x - b_dec
    closed = (centred**2).sum(1)
    closed = closed - 2 * (s * acts * (centred @ W_dec.T)).sum(1)
    quadratic = torch.minimum(s[:, None], s) * (W_dec @ W_dec.T)
    closed = closed + torch.einsum("bi,bj,ij->b", acts, acts, quadratic)
    closed = closed + 0.3 * (s * acts * W_dec.norm(dim=1)).sum(1)
    looped = loop_loss(W_enc, b_enc, W_dec, b_dec, x, prefixes, order, 0.3, "l1")
    torch.testing.assert_close(closed.mean(), looped)


def large_case(seed, sparse, dtype=torch.float32):
    """Parameters and a batch of a size at which all three ways are taken for real: [2, ...]."""
    d_model, n_latents, batch, n_saes = 32, 400, 64, 2
    flat = rand(n_saes, 2 * d_model * n_latents + n_latents + d_model, seed=seed).to(dtype) / 4
    params = Params.of(flat, d_model, n_latents)
    params.b_enc.sub_(3.0 if sparse else 0.0)
    x = rand(n_saes, batch, d_model, seed=seed + 1).to(dtype)
    reach = torch.randint(1, 11, (n_saes, n_latents), generator=seeded_generator(seed)).to(dtype)
    return params, x, reach / 10


@pytest.mark.parametrize("sparsity", ["l1", "log"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("reaches", ["ten prefixes", "every prefix", "one prefix"])
def test_the_ways_agree(sparse, reaches, sparsity):
    """In float64, on two SAEs at once; with every reach different, as in the exact loss, too."""
    params, x, reach = large_case(1, sparse, torch.float64)
    if reaches == "every prefix":
        reach = rand(*reach.shape, seed=5).double().sigmoid()
        reach /= reach.amax(dim=1, keepdim=True)  # the first place is in every prefix
    if reaches == "one prefix":
        reach = torch.ones_like(reach)
    results = {}
    for way in WAYS:
        flat = torch.full((2, sum(p[0].numel() for p in tuple(params))), torch.nan).double()
        grads = Params.of(flat, x.shape[2], reach.shape[1])
        stats = write_gradient(grads, params, x, reach, 0.3 * reach, sparsity, way=way)
        results[way] = [flat, *stats]
    for way in ("blocks", "runs"):
        for ours, gram in zip(results[way], results["gram"], strict=True):
            torch.testing.assert_close(ours, gram, rtol=1e-8, atol=1e-11)


def test_the_way_follows_from_what_is_active(monkeypatch):
    """Few active latents: runs. Many: blocks. A small dictionary: gram."""
    taken = []
    for way in WAYS:
        original = getattr(gradients, f"_{way}")
        monkeypatch.setattr(
            gradients, f"_{way}", lambda *a, o=original, w=way: taken.append(w) or o(*a)
        )
    for sparse in (True, False):
        params, x, reach = large_case(2, sparse)
        grads = Params(*(torch.empty_like(p) for p in tuple(params)))
        write_gradient(grads, params, x, reach, reach)
    assert taken == ["runs", "runs", "blocks", "blocks"]
    flat, x, prefixes, order = random_case(0, 2)
    params = Params.of(flat, D_MODEL, N_LATENTS)
    by_latent = reach_by_latent(prefixes, order)[None]
    write_gradient(
        Params.of(flat.clone(), D_MODEL, N_LATENTS), params, x[None], by_latent, by_latent
    )
    assert taken[4:] == ["gram"]


def test_dense_activations_of_many_reaches_fall_back_to_all_pairs(monkeypatch):
    """A residual a reach would not fit in memory."""
    params, x, reach = large_case(4, sparse=False)
    reach = rand(*reach.shape, seed=5).sigmoid()
    reach /= reach.amax(dim=1, keepdim=True)
    monkeypatch.setattr(gradients, "_blocks", None)
    taken, expected = (Params(*(torch.empty_like(p) for p in tuple(params))) for _ in range(2))
    stats = write_gradient(taken, params, x, reach, reach)
    other = write_gradient(expected, params, x, reach, reach, way="gram")
    for ours, theirs in zip((*taken, *stats), (*expected, *other), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_workspace_changes_nothing(way):
    """Neither what an earlier call left in it, of another size and density, nor its absence."""
    workspace = gradients.Workspace()
    for seed, sparse, kept in ((7, False, 64), (8, True, 64), (9, False, 40)):
        params, x, reach = large_case(seed, sparse)
        x = x[:, :kept]
        with_it, without = (
            Params(*(torch.full_like(p, torch.nan) for p in tuple(params))) for _ in range(2)
        )
        ours = write_gradient(with_it, params, x, reach, reach, way=way, workspace=workspace)
        own = write_gradient(without, params, x, reach, reach, way=way)
        for one, other in zip((*with_it, *ours), (*without, *own), strict=True):
            assert torch.equal(one, other)


def test_what_counts_as_sparse_depends_on_how_many_reaches_there_are(monkeypatch):
    """A run a prefix at most: with many prefixes, runs cost more and blocks are taken sooner."""
    params, x, _ = large_case(2, sparse=True)
    params.b_enc.add_(0.6)
    share = float((torch.bmm(x, params.W_enc.mT) + params.b_enc > 0).float().mean())
    assert gradients.SPARSE_OF_MANY < share < gradients.SPARSE
    taken = []
    for way in ("blocks", "runs"):
        original = getattr(gradients, f"_{way}")
        monkeypatch.setattr(
            gradients, f"_{way}", lambda *a, o=original, w=way: taken.append(w) or o(*a)
        )
    for n_reaches in (gradients.FEW, gradients.FEW + 1):
        reach = (1 + torch.arange(400) % n_reaches) / n_reaches
        grads = Params(*(torch.empty_like(p) for p in tuple(params)))
        write_gradient(grads, params, x, reach.expand(2, -1), reach.expand(2, -1))
    assert taken == ["runs", "runs", "blocks", "blocks"]


def test_too_many_pairs_of_runs_are_left_to_another_way(monkeypatch):
    """They would not fit in memory, nor their number in an index."""
    params, x, _ = large_case(2, sparse=True)
    reach = torch.arange(400, 0, -1).expand(2, -1) / 400  # all different: a run for each active one
    for most, expected in ((gradients.MOST_PAIRS, True), (64, False)):
        taken = []
        monkeypatch.setattr(gradients, "MOST_PAIRS", most)
        original = gradients._runs
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "_runs", lambda *a, o=original, t=taken: t.append(1) or o(*a))
            grads = Params(*(torch.empty_like(p) for p in tuple(params)))
            write_gradient(grads, params, x, reach, reach)
        assert bool(taken) == expected


def test_ends_may_be_given_or_counted():
    params, x, _ = large_case(6, sparse=False)
    prefixes = sample_prefixes(400, 10, seeded_generator(3))
    order = torch.randperm(400, generator=seeded_generator(4))
    reached = torch.empty(2, 400)
    reached[:, order] = reach_by_place(prefixes, 400)
    assert torch.equal(gradients.count_ends(reached[0]), prefixes)
    given, counted = (Params(*(torch.empty_like(p) for p in tuple(params))) for _ in range(2))
    write_gradient(given, params, x, reached, reached, ends=[prefixes, prefixes])
    write_gradient(counted, params, x, reached, reached)
    for ours, theirs in zip(given, counted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_on_which_nothing_fires(way):
    """The gradient is that of b_dec alone, and no way trips over having no active latent."""
    params, x, reach = large_case(3, sparse=True)
    params.b_enc.sub_(1e3)
    grads = Params(*(torch.full_like(p, torch.nan) for p in tuple(params)))
    stats = write_gradient(grads, params, x, reach, reach, way=way)
    assert (stats.l0 == 0).all()
    assert (stats.mean_square == 0).all()
    torch.testing.assert_close(grads.b_dec[:, 0], 2 * (params.b_dec[:, 0] - x.mean(1)))
    for part in (grads.W_enc, grads.b_enc, grads.W_dec):
        assert (part == 0).all()


# ------------------------------------------------------------------------ products in bfloat16


def error_in_norm(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


def exact_gradient(params, x, reach, sparsity):
    """All pairs of latents in float64: the gradient's four tensors, then what is reported."""
    params = Params(*(p.double() for p in tuple(params)))
    grads = Params(*(torch.empty_like(p) for p in tuple(params)))
    reach = reach.double()
    stats = write_gradient(grads, params, x.double(), reach, 0.3 * reach, sparsity, way="gram")
    return [*grads, *stats]


def poisoned(params):
    """Tensors like those of params, in which what is not written can be seen."""
    return Params(*(torch.full_like(p, torch.nan) for p in tuple(params)))


@pytest.mark.parametrize("sparsity", ["l1", "log"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n_reaches", [1, 10, 400])
def test_grouped_products_agree_in_float32(n_reaches, sparse, sparsity):
    params, x, _ = large_case(1, sparse)
    reach = ((1 + torch.arange(400) % n_reaches) / n_reaches).expand(2, -1)
    grads = poisoned(params)
    stats = write_gradient(grads, params, x, reach, 0.3 * reach, sparsity, way="grouped")
    exact = exact_gradient(params, x, reach, sparsity)
    for ours, expected in zip([*grads, *stats], exact, strict=True):
        assert error_in_norm(ours, expected) < 1e-5


@pytest.mark.parametrize("sparse", [True, False])
def test_products_in_bfloat16_are_off_by_its_rounding(sparse):
    """2**-9 an operand; and the few latents that this moves over the ReLU's edge, whose gradients
    come or go: the same ones in both ways, so those are nearer to each other than to the truth."""
    params, x, reach = large_case(1, sparse)
    exact = exact_gradient(params, x, reach, "l1")
    results = []
    for way in ("runs", "grouped"):
        grads = poisoned(params)
        stats = write_gradient(
            grads, params, x, reach, 0.3 * reach, "l1", way=way, products="bfloat16"
        )
        results.append([*grads, *stats])
        assert {tensor.dtype for tensor in results[-1]} == {torch.float32}
        errors = [error_in_norm(*pair) for pair in zip(results[-1], exact, strict=True)]
        assert max(errors[:2]) < 0.05  # of the encoder
        assert max(errors[2:]) < 0.01
        assert errors[0] > 1e-3  # bfloat16 it was
    for runs, grouped in zip(*results, strict=True):
        assert error_in_norm(runs, grouped.double()) < 0.01


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_the_dense_way_follows_from_the_products(products, monkeypatch):
    """It is taken where activations are dense, or where it is asked for."""
    taken = []
    for name in ("_runs", "_add_sliced", "_add_grouped"):
        original = getattr(gradients, name)
        monkeypatch.setattr(
            gradients, name, lambda *a, o=original, n=name: taken.append(n) or o(*a)
        )
    for sparse, way in ((True, None), (False, None), (True, "dense")):
        params, x, reach = large_case(2, sparse)
        write_gradient(poisoned(params), params, x, reach, reach, way=way, products=products)
    dense = "_add_grouped" if products == "bfloat16" else "_add_sliced"
    assert taken == ["_runs", "_runs", dense, dense, dense, dense]


def test_all_pairs_are_of_float32_in_every_figure():
    """Where every reach differs and activations are dense, nothing is of rounded products."""
    params, x, _ = large_case(4, sparse=False)
    reach = (torch.arange(1, 401) / 400).expand(2, -1)
    results = []
    for products in ("float32", "bfloat16"):
        grads = poisoned(params)
        results.append([*grads, *write_gradient(grads, params, x, reach, reach, products=products)])
    for exact, ours in zip(*results, strict=True):
        assert torch.equal(exact, ours)
