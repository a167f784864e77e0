"""Each kernel's gradient: autograd's of `sae.matryoshka_loss`, that of a loop, and the others'."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from core_cases import BATCH, D_MODEL, N_LATENTS, rand
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from matryoshka.kernels import Objective, Params, Workspace, by_prefix, dispatch, write_gradient
from matryoshka.kernels.layout import MIN_NORM, count_ends
from matryoshka.prefix_draws import expected_reach
from matryoshka.prefix_draws import reach as reach_of_places
from sae import ACTIVATIONS, matryoshka_loss, sample_prefixes, seeded_generator

BY_HAND = ("all_pairs", "by_prefix", "grouped", "sparse")
KERNELS = (*BY_HAND, "autograd")
grouped_mm = by_prefix.grouped_mm


def grouped_in_any_dtype(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """PyTorch's grouped product, in float64, too, which it has none for: a loop over groups."""
    if a.dtype != torch.float64:
        return grouped_mm(a, b, offs=offs)
    starts = [0, *offs.tolist()]
    groups = [slice(*pair) for pair in itertools.pairwise(starts)]
    if b.dim() == 2:
        return torch.stack([a[:, group] @ b[group] for group in groups])
    return torch.cat([a[group] @ b[k] for k, group in enumerate(groups)])


@pytest.fixture(autouse=True, scope="module")
def float64_groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(by_prefix, "grouped_mm", grouped_in_any_dtype)
        yield


SPARSITIES = ("l1", "log")


def poisoned(params):
    """Tensors like those of params, in which what is not written can be seen."""
    return Params(*(torch.full_like(p, torch.nan) for p in params))


def gradient(kernel, params, objective, **options):
    """What a kernel writes: four tensors of the gradient, L0, mean squares; and which it was."""
    grads = poisoned(params)
    stats = write_gradient(grads, params, objective, kernel, **options)
    return [*grads[:4], stats.l0, stats.mean_square], stats.kernels


def objective_of(x, reach, weight=1.0, **more):
    return Objective(x, reach, weight * reach, **more)


def assert_all_close(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, **tolerance)


# ------------------------------------------------------------------------ small cases, float64


def small_case(seed, n_prefixes, n_saes=1):
    """Parameters, x, and of each SAE its lengths and an order that is not the stored one."""
    n_params = 2 * D_MODEL * N_LATENTS + N_LATENTS + D_MODEL
    flat = 0.5 * rand(n_saes, n_params, seed=seed, dtype=torch.float64)
    x = rand(n_saes, BATCH, D_MODEL, seed=seed + 1, dtype=torch.float64)
    lengths, orders = [], []
    for i in range(n_saes):
        generator = seeded_generator(seed, i)
        lengths.append(sample_prefixes(N_LATENTS, n_prefixes, generator))
        orders.append(torch.randperm(N_LATENTS, generator=generator))
    return Params.of(flat, D_MODEL, N_LATENTS), x, lengths, orders


def reach_of_latents(lengths, order):
    """Counted in float64: the share of the lengths that contain each latent where it is stored."""
    shares = torch.empty(N_LATENTS, dtype=torch.float64)
    for place, latent in enumerate(order):
        shares[latent] = (lengths > place).double().mean()
    return shares


def loop_loss(params, x, lengths, order, weight, sparsity):
    """The loss of the paper as it is written down: one reconstruction a prefix, a loop."""
    acts = torch.relu(x @ params.W_enc.T + params.b_enc)
    total = 0.0
    for m in lengths:
        kept = order[: int(m)]
        x_hat = params.b_dec + sum(acts[:, j, None] * params.W_dec[j] for j in kept)
        paid = 0.0
        for j in kept:
            c = acts[:, j] * params.W_dec[j].norm()
            paid += (c if sparsity == "l1" else torch.log((c + 0.1) / 0.1)).mean()
        total = total + ((x - x_hat) ** 2).sum(dim=1).mean() + weight * paid
    return total / len(lengths)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_prefixes=st.integers(1, N_LATENTS),
    weight=st.floats(0, 3),
    sparsity=st.sampled_from(SPARSITIES),
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_is_autograds_of_the_loop(kernel, seed, n_prefixes, weight, sparsity):
    params, x, (lengths,), (order,) = small_case(seed, n_prefixes)
    leaves = Params(*(part[0].clone().requires_grad_() for part in params))
    loss = loop_loss(leaves, x[0], lengths, order, weight, sparsity)
    expected = torch.autograd.grad(loss, leaves[:4])

    reach = reach_of_latents(lengths, order)[None]
    objective = objective_of(x, reach, weight, sparsity=sparsity)
    ours, kernels = gradient(kernel, params, objective)
    assert kernels == (kernel,)
    assert_all_close(ours[:4], [part[None] for part in expected], rtol=1e-9, atol=1e-11)
    one = params.one(0)
    acts = torch.relu(x[0] @ one.W_enc.T + one.b_enc)
    assert_close(ours[4][0], (acts > 0).double().sum(1).mean())
    assert_close(ours[5][0], ((acts * one.W_dec.norm(dim=1)) ** 2).mean(0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, N_LATENTS - 1), unique=True).map(sorted),
    weight=st.floats(0, 3),
    sparsity=st.sampled_from(SPARSITIES),
    data=st.data(),
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_is_autograds_of_the_loss_for_any_weights(
    kernel, seed, lengths, weight, sparsity, data
):
    """Of `sae.matryoshka_loss`, with lengths of weights that differ, as in the exact mean."""
    params, x, _, (order,) = small_case(seed, 1)
    lengths = [*lengths, N_LATENTS]
    n = len(lengths)
    weights = torch.tensor(data.draw(st.lists(st.floats(0.1, 1), min_size=n, max_size=n))).double()
    weights /= weights.sum()
    leaves = Params(*(part[0].clone().requires_grad_() for part in params))
    acts = torch.relu(x[0] @ leaves.W_enc.T + leaves.b_enc)
    loss = matryoshka_loss(
        x[0],
        acts[:, order],
        leaves.W_dec[order],
        leaves.b_dec[0],
        lengths,
        weights,
        weight,
        sparsity,
    )
    expected = torch.autograd.grad(loss, leaves[:4])
    reach = torch.zeros(N_LATENTS, dtype=torch.float64)
    for m, share in zip(lengths, weights, strict=True):
        reach[order[:m]] += share
    reach /= reach.max()
    objective = objective_of(
        x, reach[None], weight, sparsity=sparsity, ends=[torch.tensor(lengths)]
    )
    ours, _ = gradient(kernel, params, objective)
    assert_all_close(ours[:4], [part[None] for part in expected], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_against_finite_differences(kernel, sparsity):
    params, x, (lengths,), (order,) = small_case(seed=3, n_prefixes=3)
    flat = torch.cat([part.flatten() for part in params])

    def loss(values):
        one = Params.of(values[None], D_MODEL, N_LATENTS).one(0)
        return loop_loss(one, x[0], lengths, order, 0.7, sparsity)

    reach = reach_of_latents(lengths, order)[None]
    ours, _ = gradient(kernel, params, objective_of(x, reach, 0.7, sparsity=sparsity))
    ours = torch.cat([part.flatten() for part in ours[:4]])
    for i in range(0, len(flat), 3):
        nudge = torch.zeros_like(flat)
        nudge[i] = 1e-6
        slope = (loss(flat + nudge) - loss(flat - nudge)) / 2e-6
        assert abs(slope - ours[i]) < 1e-6 * (1 + abs(slope))


@pytest.mark.parametrize("given_ends", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stack_is_each_sae_alone(kernel, given_ends):
    """With prefixes of its own, as many as no other has: its reach goes with its ends."""
    n_prefixes = (7, 1, 4)
    cases = [small_case(10 * k, k) for k in n_prefixes]
    params = Params(*(torch.cat(parts) for parts in zip(*(case[0] for case in cases), strict=True)))
    x = torch.cat([case[1] for case in cases])
    lengths = [case[2][0] for case in cases]
    reach = torch.stack([reach_of_latents(case[2][0], case[3][0]) for case in cases])
    weight = torch.tensor([[0.1], [1.0], [0.4]]).double()
    ends = lengths if given_ends else None
    together, kernels = gradient(kernel, params, objective_of(x, reach, weight, ends=ends))
    assert kernels == (kernel,) * 3
    for i in range(3):
        one = slice(i, i + 1)
        ends = [lengths[i]] if given_ends else None
        objective = objective_of(x[one], reach[one], weight[one], ends=ends)
        alone, _ = gradient(kernel, params.slice(one), objective)
        assert_all_close([tensor[one] for tensor in together], alone)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_in_which_latents_are_stored_changes_nothing(kernel):
    params, x, (lengths,), (order,) = small_case(21, 3)
    reach = reach_of_latents(lengths, order)[None]
    ours, _ = gradient(kernel, params, objective_of(x, reach))
    moved = Params(
        params.W_enc[:, order],
        params.b_enc[..., order],
        params.W_dec[:, order],
        params.b_dec,
        params.log_threshold,
    )
    theirs, _ = gradient(kernel, moved, objective_of(x, reach[:, order]))
    expected = [ours[0][:, order], ours[1][..., order], ours[2][:, order], *ours[3:5]]
    assert_all_close(theirs, [*expected, ours[5][:, order]])


# --------------------------------------------------------- sizes at which kernels are taken


def large_case(seed, sparse, dtype=torch.float32):
    """Parameters and a batch of a size at which all kernels are taken for real: [2, ...]."""
    d_model, n_latents, batch, n_saes = 32, 400, 64, 2
    flat = rand(n_saes, 2 * d_model * n_latents + n_latents + d_model, seed=seed).to(dtype) / 4
    params = Params.of(flat, d_model, n_latents)
    params.b_enc.sub_(3.0 if sparse else 0.0)
    x = rand(n_saes, batch, d_model, seed=seed + 1).to(dtype)
    reach = torch.randint(1, 11, (n_saes, n_latents), generator=seeded_generator(seed)).to(dtype)
    return params, x, reach / 10


def every_reach_differs(reach):
    reach = rand(*reach.shape, seed=5).to(reach.dtype).sigmoid()
    return reach / reach.amax(dim=1, keepdim=True)  # the first place is in every prefix


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("reaches", ["ten prefixes", "every prefix", "one prefix"])
def test_the_kernels_agree(sparse, reaches, sparsity):
    """In float64, on two SAEs at once; with every reach different, as in the exact loss, too."""
    params, x, reach = large_case(1, sparse, torch.float64)
    if reaches == "every prefix":
        reach = every_reach_differs(reach)
    if reaches == "one prefix":
        reach = torch.ones_like(reach)
    objective = objective_of(x, reach, 0.3, sparsity=sparsity)
    expected, _ = gradient("autograd", params, objective)
    for kernel in BY_HAND:
        ours, kernels = gradient(kernel, params, objective)
        assert kernels == (kernel, kernel)
        assert_all_close(ours, expected, rtol=1e-8, atol=1e-11)


def test_the_kernel_follows_from_what_is_active():
    """Few active latents: sparse. Many: by prefix. A small dictionary: all pairs."""
    for sparse, kernel in ((True, "sparse"), (False, "by_prefix")):
        params, x, reach = large_case(2, sparse)
        assert gradient("auto", params, objective_of(x, reach))[1] == (kernel, kernel)
        assert gradient("dense", params, objective_of(x, reach))[1] == ("by_prefix",) * 2
    params, x, (lengths,), (order,) = small_case(0, 2)
    reach = reach_of_latents(lengths, order)[None]
    for name in ("auto", "dense"):
        assert gradient(name, params, objective_of(x, reach))[1] == ("all_pairs",)


def test_each_sae_of_a_stack_has_its_own_kernel():
    params, x, reach = large_case(2, sparse=False)
    params.b_enc[1] -= 3.0
    objective = objective_of(x, reach)
    ours, kernels = gradient("auto", params, objective)
    assert kernels == ("by_prefix", "sparse")
    assert_all_close(ours, gradient("autograd", params, objective)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_latents", [256, 257])
def test_all_pairs_serve_up_to_256_latents(n_latents):
    params = Params.of(rand(1, 16 * n_latents + n_latents + 8), 8, n_latents)
    objective = objective_of(rand(1, 8, 8), torch.ones(1, n_latents))
    kernel = "all_pairs" if n_latents == 256 else "by_prefix"
    assert gradient("auto", params, objective)[1] == (kernel,)


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_reaches", [128, 129])
def test_dense_activations_of_many_reaches_are_left_to_all_pairs(n_reaches, matmul_dtype):
    """A residual a reach would not fit in memory."""
    params, x, _ = large_case(4, sparse=False)
    reach = ((1 + torch.arange(400) % n_reaches) / n_reaches).expand(2, -1)
    objective = objective_of(x, reach)
    ours, kernels = gradient("auto", params, objective, matmul_dtype=matmul_dtype)
    few = "grouped" if matmul_dtype == "bfloat16" else "by_prefix"
    assert kernels == (few if n_reaches == 128 else "all_pairs",) * 2
    if n_reaches == 129:  # nothing of which is of rounded products
        exact, _ = gradient("all_pairs", params, objective)
        pairs = zip(ours, exact, strict=True)
        assert max(error_in_norm(*pair) for pair in pairs) < 1e-5  # bfloat16's would be 1e-3


@pytest.mark.parametrize("kernel", BY_HAND)
def test_a_workspace_changes_nothing(kernel):
    """Neither what an earlier call left in it, of another size and density, nor its absence."""
    workspace = Workspace()
    for seed, sparse, kept in ((7, False, 64), (8, True, 64), (9, False, 40)):
        params, x, reach = large_case(seed, sparse)
        objective = objective_of(x[:, :kept], reach)
        ours, _ = gradient(kernel, params, objective, workspace=workspace)
        own, _ = gradient(kernel, params, objective)
        assert all(torch.equal(one, other) for one, other in zip(ours, own, strict=True))
        assert workspace._held or kernel == "all_pairs"  # which needs none


def test_a_workspace_hands_out_the_same_memory_where_it_fits():
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.empty("a", like, 10, 10)
    assert workspace.empty("a", like, 5, 5).data_ptr() == first.data_ptr()
    assert workspace.empty("b", like, 5, 5).data_ptr() != first.data_ptr()
    larger = workspace.empty("a", like, 20, 20)
    assert larger.shape == (20, 20)
    assert workspace.empty("a", like.double(), 5).dtype == torch.float64
    on_device = torch.empty(0, device="meta")
    assert workspace.empty("a", on_device, 3).device.type == "meta"


@pytest.mark.parametrize("gradient_of", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_reaches", [32, 33])
def test_what_counts_as_sparse_depends_on_how_many_reaches_there_are(n_reaches, gradient_of):
    """A run a prefix at most: with many prefixes, or faster dense products, `sparse` gives way."""
    params, x, _ = large_case(2, sparse=True)
    params.b_enc.add_(0.6)
    share = float((torch.bmm(x, params.W_enc.mT) + params.b_enc > 0).float().mean())
    assert 0.04 < share < 0.1
    reach = ((1 + torch.arange(400) % n_reaches) / n_reaches).expand(2, -1)
    _, kernels = gradient("auto", params, objective_of(x, reach), matmul_dtype=gradient_of)
    dense = "by_prefix" if gradient_of == "float32" else "grouped"
    few = n_reaches == 32 and gradient_of == "float32"
    assert kernels == ("sparse" if few else dense,) * 2


@pytest.mark.parametrize(
    ("n_active", "n_reaches", "kernel"),
    [(40, 32, "sparse"), (41, 32, "by_prefix"), (16, 33, "sparse"), (17, 33, "by_prefix")],
)
def test_shares_of_active_latents_at_which_sparse_gives_way(n_active, n_reaches, kernel):
    """A tenth of 400, or a 25th where there are more than 32 reaches."""
    params, x, _ = large_case(2, sparse=False)
    params.W_enc.zero_()
    params.b_enc.fill_(-1.0)[..., :n_active] = 1.0
    reach = ((1 + torch.arange(400) % n_reaches) / n_reaches).expand(2, -1)
    assert gradient("auto", params, objective_of(x, reach))[1] == (kernel, kernel)


@pytest.mark.parametrize("spare", [0, -1])
def test_too_many_pairs_of_runs_are_left_to_another_kernel(monkeypatch, spare):
    """They would not fit in memory, nor their number in an index."""
    params, x, _ = large_case(2, sparse=True)
    params.W_enc.zero_()
    params.b_enc.fill_(-1.0)[..., :9] = 1.0  # 9 active latents a sample, of 9 reaches
    objective = objective_of(x, torch.arange(400, 0, -1).expand(2, -1) / 400)
    assert dispatch.MAX_PAIRS_OF_RUNS == 2**26
    monkeypatch.setattr(dispatch, "MAX_PAIRS_OF_RUNS", 64 * 9**2 + spare)
    kernel = "sparse" if spare == 0 else "all_pairs"
    assert gradient("auto", params, objective)[1] == (kernel, kernel)


def test_runs_of_one_reach_are_counted_once(monkeypatch):
    """9 active latents a sample, of 3 reaches: 9 pairs, not 81."""
    params, x, _ = large_case(2, sparse=True)
    params.W_enc.zero_()
    params.b_enc.fill_(-1.0)[..., :9] = 1.0
    monkeypatch.setattr(dispatch, "MAX_PAIRS_OF_RUNS", 64 * 9)
    objective = objective_of(x, ((1 + torch.arange(400) % 3) / 3).expand(2, -1))
    assert gradient("auto", params, objective)[1] == ("sparse", "sparse")


def test_one_saes_part_of_an_objective_is_its_own():
    x, reach = rand(2, 3, 4), rand(2, 5, seed=1)
    ends = [torch.tensor([1, 5]), torch.tensor([2, 5])]
    one = objective_of(x, reach, 0.3, ends=ends, sparsity="log", activation="other").slice(1)
    assert torch.equal(one.x, x[1:])
    assert torch.equal(one.reach, reach[1:])
    assert torch.equal(one.price, 0.3 * reach[1:])
    assert torch.equal(one.ends_of(0), ends[1])
    assert (one.sparsity, one.activation) == ("log", "other")


@pytest.mark.parametrize("kernel", KERNELS)
def test_ends_may_be_given_or_counted(kernel):
    params, x, _ = large_case(6, sparse=False)
    lengths = sample_prefixes(400, 10, seeded_generator(3))
    order = torch.randperm(400, generator=seeded_generator(4))
    reach = torch.empty(2, 400)
    reach[:, order] = reach_of_places(lengths, 400)
    assert torch.equal(count_ends(reach[0]), lengths)
    given, _ = gradient(kernel, params, objective_of(x, reach, ends=[lengths, lengths]))
    counted, _ = gradient(kernel, params, objective_of(x, reach))
    assert all(torch.equal(one, other) for one, other in zip(given, counted, strict=True))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_on_which_nothing_fires(kernel, sparsity):
    """The gradient is that of b_dec alone, and no kernel trips over having no active latent."""
    params, x, reach = large_case(3, sparse=True)
    params.b_enc.sub_(1e3)
    ours, _ = gradient(kernel, params, objective_of(x, reach, sparsity=sparsity))
    assert_close(ours[3][:, 0], 2 * (params.b_dec[:, 0] - x.mean(1)))
    for part in (*ours[:3], *ours[4:]):
        assert (part == 0).all()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_decoder_row_of_zeros_has_autograds_gradient(kernel, sparsity):
    """It has no direction in which to shrink; all else goes on."""
    params, x, reach = large_case(3, sparse=False, dtype=torch.float64)
    params.W_dec[:, 5] = 0
    objective = objective_of(x, reach, 0.7, sparsity=sparsity)
    ours, _ = gradient(kernel, params, objective)
    assert ours[2][:, 5].isfinite().all()
    assert ours[2][:, 5].any()
    expected, _ = gradient("autograd", params, objective)
    assert_all_close(ours, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tiny_decoder_row_leaves_everything_finite(kernel, sparsity):
    """In float32, whose squares end at 1e-38; all rows but that one have autograd's gradient."""
    params, x, reach = large_case(3, sparse=False)
    others = torch.arange(400) != 5
    for norm in (1e-18, 1e-22, 1e-30, 1e-44):
        params.W_dec[:, 5] *= norm / params.W_dec[:, 5].norm(dim=-1, keepdim=True)
        objective = objective_of(x, reach, 0.7, sparsity=sparsity)
        ours, _ = gradient(kernel, params, objective)
        assert all(tensor.isfinite().all() for tensor in ours)
        assert ours[2].abs().max() < 1e3
        expected, _ = gradient("autograd", params, objective)
        assert_close(ours[2][:, others], expected[2][:, others], rtol=1e-3, atol=1e-3)
        params.W_dec[:, 5] = 1.0


@pytest.mark.parametrize("kernel", BY_HAND)
def test_a_short_decoder_row_has_autograds_gradient(kernel):
    """Down to a norm of 1e-12."""
    assert MIN_NORM == 1e-12
    params, x, reach = large_case(3, sparse=False, dtype=torch.float64)
    params.W_dec[:, 5] *= 1.1e-12 / params.W_dec[:, 5].norm(dim=-1, keepdim=True)
    ours, _ = gradient(kernel, params, objective_of(x, reach, 0.7))
    expected, _ = gradient("autograd", params, objective_of(x, reach, 0.7))
    assert_all_close(ours, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_of_zeros_have_autograds_gradient(kernel, sparsity):
    params, x, reach = large_case(3, sparse=False, dtype=torch.float64)
    params.b_enc.add_(0.5)
    objective = objective_of(torch.zeros_like(x), reach, sparsity=sparsity)
    ours, _ = gradient(kernel, params, objective)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert not ours[0].any()
    assert ours[2].any()
    assert_all_close(ours, gradient("autograd", params, objective)[0], rtol=1e-8, atol=1e-11)


# ------------------------------------------------------------------------- other activations


def hard_threshold(preacts, gate):
    """What is above 1, as it is."""
    return preacts * (preacts > 1)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kernel", BY_HAND)
def test_a_hard_threshold_works_in_every_kernel(monkeypatch, kernel, sparsity):
    """A new activation is one entry of a table, where its slope is 1 or 0."""
    monkeypatch.setitem(ACTIVATIONS, "hard", hard_threshold)
    params, x, reach = large_case(3, sparse=False, dtype=torch.float64)
    objective = objective_of(x, reach, 0.3, sparsity=sparsity, activation="hard")
    expected, _ = gradient("autograd", params, objective)
    ours, _ = gradient(kernel, params, objective)
    assert_all_close(ours, expected, rtol=1e-8, atol=1e-11)
    relu, _ = gradient(kernel, params, dataclasses.replace(objective, activation="relu"))
    assert (relu[4] > 1.1 * ours[4]).all()


def test_any_activation_works_by_autograd(monkeypatch):
    """Against PyTorch's gradient of the loss, for one whose slope is neither 1 nor 0."""
    monkeypatch.setitem(ACTIVATIONS, "softplus", lambda z, _: torch.nn.functional.softplus(z))
    params, x, (lengths,), (order,) = small_case(3, 4)
    reach = reach_of_latents(lengths, order)[None]
    leaves = Params(*(part[0].clone().requires_grad_() for part in params))
    acts = torch.nn.functional.softplus(x[0] @ leaves.W_enc.T + leaves.b_enc)
    loss = matryoshka_loss(
        x[0], acts[:, order], leaves.W_dec[order], leaves.b_dec[0], lengths, None, 0.3
    )
    expected = torch.autograd.grad(loss, leaves[:4])
    ours, _ = gradient("autograd", params, objective_of(x, reach, 0.3, activation="softplus"))
    assert_all_close(ours[:4], [part[None] for part in expected])
    assert (ours[4] == N_LATENTS).all()


def test_autograd_works_within_inference_mode():
    params, x, reach = large_case(3, sparse=False)
    outside, _ = gradient("autograd", params, objective_of(x, reach))
    with torch.inference_mode():
        inside, _ = gradient("autograd", params, objective_of(x.clone(), reach.clone()))
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


# ------------------------------------------------------------------------ products in bfloat16


def error_in_norm(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


def exact_gradient(params, x, reach, sparsity):
    """All pairs of latents, in float64."""
    params, reach = Params(*(p.double() for p in params)), reach.double()
    objective = objective_of(x.double(), reach, 0.3, sparsity=sparsity)
    return gradient("all_pairs", params, objective)[0]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n_reaches", [1, 10, 400])
def test_grouped_products_agree_in_float32(n_reaches, sparse, sparsity):
    params, x, _ = large_case(1, sparse)
    reach = ((1 + torch.arange(400) % n_reaches) / n_reaches).expand(2, -1)
    ours, _ = gradient("grouped", params, objective_of(x, reach, 0.3, sparsity=sparsity))
    exact = exact_gradient(params, x, reach, sparsity)
    for one, expected in zip(ours, exact, strict=True):
        assert error_in_norm(one, expected) < 1e-5


@pytest.mark.parametrize("sparse", [True, False])
def test_products_in_bfloat16_are_off_by_its_rounding(sparse):
    """2**-9 an operand; and the few latents that this moves over the ReLU's edge, whose gradients
    come or go: the same in all kernels, so those are nearer to each other than to the truth."""
    params, x, reach = large_case(1, sparse)
    exact, results = exact_gradient(params, x, reach, "l1"), []
    for kernel in ("sparse", "by_prefix", "grouped"):
        ours, kernels = gradient(
            kernel, params, objective_of(x, reach, 0.3), matmul_dtype="bfloat16"
        )
        results.append(ours)
        assert kernels == (kernel, kernel)
        assert {tensor.dtype for tensor in ours} == {torch.float32}
        errors = [error_in_norm(*pair) for pair in zip(ours, exact, strict=True)]
        assert max(errors[:2]) < 0.05  # of the encoder
        assert max(errors[2:]) < 0.01
        assert errors[0] > 1e-3  # bfloat16 it was
    for by_run, *dense in zip(*results, strict=True):
        for tensor in dense:
            assert error_in_norm(tensor, by_run.double()) < 0.01


def test_the_dense_kernel_follows_from_the_products():
    """It is taken where activations are dense, or where it is asked for."""
    for matmul_dtype, dense in (("float32", "by_prefix"), ("bfloat16", "grouped")):
        for sparse, name in ((True, "auto"), (False, "auto"), (True, "dense")):
            params, x, reach = large_case(2, sparse)
            objective = objective_of(x, reach)
            _, kernels = gradient(name, params, objective, matmul_dtype=matmul_dtype)
            kernel = "sparse" if sparse and name == "auto" else dense
            assert kernels == (kernel, kernel)


@pytest.mark.parametrize("kernel", BY_HAND)
def test_the_exact_mean_over_prefixes_has_autograds_gradient(kernel):
    """The reach that training takes with `prefixes="expected"`."""
    params, x, _ = large_case(3, sparse=True, dtype=torch.float64)
    reach = torch.stack([expected_reach(400, 10), expected_reach(400, 3)])
    ours, _ = gradient(kernel, params, objective_of(x, reach, 0.3))
    expected, _ = gradient("autograd", params, objective_of(x, reach, 0.3))
    assert_all_close(ours, expected, rtol=1e-8, atol=1e-11)
