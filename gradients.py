"""The gradient of the prefix loss, written out: one function, one line of mathematics, three ways.

With x less b_dec, a = ReLU(x W_enc + b_enc), d_j a row of W_dec, s_j the reach of latent j, and
p_j = sparsity_weight * s_j, the loss of a sample is

    ||x||^2 - 2 sum_j s_j a_j <d_j, x> + sum_ij min(s_i, s_j) a_i a_j <d_i, d_j>
            + sum_j p_j a_j ||d_j||

and everything follows from the residual that latent j meets, the mean over prefixes of what those
that contain j have over or left to explain,

    r_j = sum_i min(s_i, s_j) a_i d_i - s_j x
    d loss / d a_j = 2 <d_j, r_j> + p_j ||d_j||
    d loss / d d_j = 2 a_j r_j    + p_j a_j d_j / ||d_j||

`gram`    forms no residual: all pairs of latents, for small dictionaries stacked by the hundred.
`blocks`  one residual a prefix and sample: dense products, for activations that are still dense.
`runs`    one residual for each run of active latents of equal reach: only the encoder's product is
          dense. What training is, but for its beginning.

In bfloat16, or where it is asked for, blocks are `grouped`: all products of a kind are one grouped
product, whose edges are data. So nothing waits for a GPU, and no shape depends on the prefixes: a
step can be replayed as one CUDA graph.

Products in bfloat16 round their operands and results to 8 bits of mantissa; what is learnt, its
gradient and all else stay in float32. In `runs` that is the encoder's product alone, and in `gram`
none.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

Sparsity = Literal["l1", "log"]
Products = Literal["float32", "bfloat16"]
Way = Literal["gram", "blocks", "runs", "grouped", "dense"]

SMALL = 256  # latents up to which `gram` serves
MOST_BLOCKS = 128  # reaches up to which blocks serve where activations are dense, else `gram`
# Shares of active latents up to which `runs` is faster: with few reaches, and with more than that;
# with dense products in bfloat16, the latter for any number.
SPARSE, FEW, SPARSE_OF_MANY = 0.1, 32, 0.04
MOST_PAIRS = 2**26  # of runs that meet in a batch, up to which `runs` serves: a GiB of indices


class Params(NamedTuple):
    """What is learnt, or its gradient: views of one flat tensor [n_saes, n_params]."""

    W_enc: Tensor  # [n_saes, n_latents, d_model]: a row a latent, as in W_dec
    b_enc: Tensor  # [n_saes, 1, n_latents]
    W_dec: Tensor  # [n_saes, n_latents, d_model]
    b_dec: Tensor  # [n_saes, 1, d_model]

    @classmethod
    def of(cls, flat: Tensor, d_model: int, n_latents: int) -> "Params":
        shapes = [(n_latents, d_model), (1, n_latents), (n_latents, d_model), (1, d_model)]
        parts = flat.split([math.prod(shape) for shape in shapes], dim=1)
        return cls(*(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)))

    def slice(self, which: slice) -> "Params":
        """Some of the SAEs, still as a stack."""
        return Params(*(tensor[which] for tensor in self))

    def one(self, i: int) -> "Params":
        """SAE i by itself: tensors without the leading dimension."""
        return Params(*(tensor[i] for tensor in self))


class Stats(NamedTuple):
    """What a step learns of the activations on its way."""

    l0: Tensor  # [n_saes], active latents a sample
    mean_square: Tensor  # [n_saes, n_latents], of a_j ||d_j||


class Workspace:
    """Memory that is used again from call to call.

    On a CPU, the fresh pages of large tensors can cost more than the arithmetic on them. A GPU's
    allocator keeps its pages, and a CUDA graph its own memory: there, every tensor is a fresh one.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of that shape, uninitialised, as good as `name` is not asked for again."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        n, held = math.prod(shape), self._held.get(name, like[:0].flatten())
        if held.numel() < n or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._held[name] = like.new_empty(n + n // 8)
        return held[:n].view(shape)


def write_gradient(
    grads: Params,
    params: Params,
    x: Tensor,
    reach: Tensor,
    price: Tensor,
    sparsity: Sparsity = "l1",
    ends: Sequence[Tensor] | None = None,
    way: Way | None = None,
    workspace: Workspace | None = None,
    products: Products = "float32",
) -> Stats:
    """Writes the gradient of the loss above, a mean over the batch, into `grads`.

    x [n_saes, batch, d_model] is already scaled; reach [n_saes, n_latents] belongs to the latents
    as they are stored, in whatever order, its maximum 1; price [n_saes, n_latents] is
    sparsity_weight * reach. `sparsity` is "l1", or "log": log((a ||d|| + 0.1) / 0.1) in place of
    a ||d||. ends: of each SAE, how many latents have each reach or a higher one, from the highest
    down, as integers [n_reaches]; None counts them, for which a GPU has to be waited for, as it has
    where `blocks` finds them there.

    The ways differ in rounding alone; None takes the one that is fastest here, and "dense" that
    which a GPU takes, where activations are sparse, too. A workspace that is passed again saves a
    CPU the pages of large intermediate tensors. Dense products are in float32 whatever is asked
    for with up to SMALL latents or more than MOST_BLOCKS reaches; in bfloat16 `blocks` are grouped,
    which raises RuntimeError where d_model or the batch is not a multiple of 8.
    """
    if way == "gram" or (way in (None, "dense") and reach.shape[1] <= SMALL):
        return _gram(grads, params, x, reach, price, sparsity)
    stats, workspace = [], workspace or Workspace()
    for i in range(len(x)):
        p, own = params.one(i), count_ends(reach[i]) if ends is None else ends[i]
        acts = _encode(p, x[i], products, workspace)
        signs = torch.sign(acts, out=workspace.empty("signs", x, *acts.shape))
        n_active = signs.sum(dim=1).sum(dtype=torch.float64)
        l0 = (n_active / x.shape[1]).to(x.dtype)
        rest = (grads.one(i), p, x[i], reach[i], price[i], sparsity, workspace)
        if way == "runs" or (way is None and _is_sparse(n_active, acts, len(own), products)):
            mean_square = _runs(acts, *rest)
        elif way in (None, "dense") and len(own) > MOST_BLOCKS:
            one = slice(i, i + 1)
            given = (grads.slice(one), params.slice(one), x[one], reach[one], price[one])
            l0, mean_square = (tensor[0] for tensor in _gram(*given, sparsity))
        else:
            grouped = way == "grouped" or products == "bfloat16"
            mean_square = _blocks(acts, *rest, own, products, grouped)
        stats.append(Stats(l0, mean_square))
    return Stats(*map(torch.stack, zip(*stats, strict=True)))


def count_ends(reach: Tensor) -> Tensor:
    """How many latents have each reach or a higher one, from the highest down: [n_reaches]."""
    ranked = reach.sort(descending=True).values
    return torch.unique_consecutive(ranked, return_counts=True)[1].cumsum(0)


def _encode(params: Params, x: Tensor, products: Products, workspace: Workspace) -> Tensor:
    """acts [n_latents, batch] in x's dtype, from x [batch, d_model] of one SAE.

    A row a latent: what belongs to one lies together, and can be read out of order.
    """
    W_enc, b_enc = params.W_enc, params.b_enc.T
    acts = workspace.empty("acts", x, len(W_enc), len(x))
    if products == "float32":
        return torch.addmm(b_enc, W_enc, x.T, out=acts).relu_()
    x = x.bfloat16()
    rounded = workspace.empty("W_enc", x, *W_enc.shape).copy_(W_enc)
    product = torch.mm(rounded, x.T, out=workspace.empty("product", x, *acts.shape))
    return acts.copy_(product).add_(b_enc).relu_()


def _is_sparse(n_active: Tensor, acts: Tensor, n_reaches: int, products: Products) -> bool:
    """Whether few enough of acts [n_latents, batch] are active for `runs`.

    Never so on a GPU: reading that number would cost it more.
    """
    if acts.device.type != "cpu":
        return False
    n_latents, batch = acts.shape
    active = float(n_active) / batch  # a sample
    n_pairs = batch * min(active, n_reaches) ** 2
    share = SPARSE if n_reaches <= FEW and products == "float32" else SPARSE_OF_MANY
    return active <= share * n_latents and n_pairs <= MOST_PAIRS


def _sparsity_slopes(acts: Tensor, norms: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """f'(a ||d||) and a f'(a ||d||), for f the identity or the logarithm; shapes broadcast."""
    if sparsity == "l1":
        return torch.ones_like(norms), acts
    slope = 1 / (acts * norms + 0.1)
    return slope, acts * slope


def _through_relu(g_acts: Tensor, acts: Tensor) -> None:
    """Sets the gradient of activations to 0 where those are 0, in place."""
    torch.ops.aten.threshold_backward.grad_input(g_acts, acts, 0, grad_input=g_acts)


def _gram(
    grads: Params, params: Params, x: Tensor, reach: Tensor, price: Tensor, sparsity: Sparsity
) -> Stats:
    """All pairs of latents. With G = W_dec W_dec^T, C = acts^T acts and meet_ij = min(s_i, s_j),
    the quadratic term's derivative is 2 acts (meet * G) to acts, and 2 (meet * C) W_dec to W_dec.
    """
    W_enc, b_enc, W_dec, b_dec = params
    batch = x.shape[1]
    ones = x.new_ones(len(x), 1, batch)  # sums over the batch are products: no copies
    reach, price = (
        reach[..., None] * (2 / batch),
        price[..., None] / batch,
    )  # [n_saes, n_latents, 1]

    acts = torch.baddbmm(b_enc, x, W_enc.mT).relu_()  # [n_saes, batch, n_latents]
    x_centred = x - b_dec
    meet = torch.minimum(reach, reach.mT)  # [n_saes, n_latents, n_latents]
    gram = torch.bmm(W_dec, W_dec.mT)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # [n_saes, n_latents]
    W_dec_reached = W_dec * reach

    slope, paid = _sparsity_slopes(acts, norms[:, None], sparsity)
    slope = price.mT * norms[:, None] * slope
    pull = torch.bmm(ones, paid).mT * price / norms[..., None]

    g_acts = torch.baddbmm(slope, acts, gram * meet).baddbmm_(x_centred, W_dec_reached.mT, alpha=-1)
    _through_relu(g_acts, acts)
    torch.bmm(g_acts.mT, x, out=grads.W_enc)
    torch.bmm(ones, g_acts, out=grads.b_enc)

    correlation = torch.bmm(acts.mT, acts)  # [n_saes, n_latents, n_latents]
    linear = torch.bmm(acts.mT, x_centred).mul_(-reach).addcmul_(W_dec, pull)
    torch.baddbmm(linear, correlation * meet, W_dec, out=grads.W_dec)
    sum_acts, sum_x = torch.bmm(ones, acts), torch.bmm(ones, x_centred)
    torch.baddbmm(sum_x, sum_acts, W_dec_reached, beta=-2 / batch, out=grads.b_dec)

    # ord 0 counts what is not zero, without a copy in another dtype
    l0 = torch.linalg.vector_norm(acts, ord=0, dim=(1, 2)) / batch
    return Stats(l0, correlation.diagonal(dim1=1, dim2=2) * norms.square() / batch)


def _blocks(
    acts: Tensor,
    grads: Params,
    params: Params,
    x: Tensor,
    reach: Tensor,
    price: Tensor,
    sparsity: Sparsity,
    workspace: Workspace,
    ends: Tensor,
    products: Products,
    grouped: bool,
) -> Tensor:
    """One residual a block of latents of equal reach: r, what the prefixes that contain it have
    over, in the mean.

    The latents are sorted by reach, so that a block is a slice. One SAE: no leading dimension, and
    acts [n_latents, batch]. -> mean square of a_j ||d_j||.
    """
    batch, dtype = len(x), torch.bfloat16 if products == "bfloat16" else x.dtype
    ranked, order = reach.sort(descending=True, stable=True)
    W_dec: Tensor = params.W_dec
    where: slice | Tensor = slice(None)
    if len(ends) > 1:
        acts = torch.index_select(acts, 0, order, out=workspace.empty("ranked", acts, *acts.shape))
        W_dec, price, where = W_dec[order], price[order], order

    norms = W_dec.norm(dim=1)
    slope, paid = _sparsity_slopes(acts, norms[:, None], sparsity)
    slope = slope * (price * norms / batch)[:, None]  # [n_latents, batch], or [n_latents, 1]
    g_acts = workspace.empty("g_acts", x, *acts.shape).copy_(slope)
    g_W_dec = W_dec * (paid.sum(1) * price / norms / batch)[:, None]
    add = _add_grouped if grouped else _add_sliced
    total = add(
        g_acts, g_W_dec, acts.to(dtype), W_dec.to(dtype), params.b_dec - x, ranked, ends, workspace
    )
    _through_relu(g_acts, acts)

    grads.W_enc[where] = (g_acts.to(dtype) @ x.to(dtype)).to(x.dtype)
    grads.b_enc[0, where] = g_acts.sum(1)
    grads.W_dec[where] = g_W_dec
    grads.b_dec[0] = total
    mean_square = torch.empty_like(reach)
    mean_square[where] = acts.square_().sum(1) / batch * norms.square()
    return mean_square


def _add_sliced(
    g_acts: Tensor,
    g_W_dec: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    before: Tensor,
    ranked: Tensor,
    ends: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Adds 2 <d_j, r> / batch to g_acts and the sum of 2 a_j r / batch to g_W_dec, block by block:
    r = suffix sums of what prefixes have over, `before` the first latent -x. -> the first block's
    sum of 2 r / batch, [d_model]."""
    batch, sizes = len(before), ends.diff(prepend=ends.new_zeros(1)).tolist()
    # of each prefix, [n_blocks]; read one by one: an index would have to be copied to a GPU first
    shares = torch.stack([ranked[end - 1] for end in ends.tolist()])
    weights = -shares.diff(append=shares.new_zeros(1))
    residuals = workspace.empty("residuals", before, len(sizes), *before.shape)
    blocks = list(zip(residuals, acts.split(sizes), W_dec.split(sizes), strict=True))
    for residual, a, d in blocks:
        before = torch.addmm(before, a.T, d, out=residual)
    residuals[-1].mul_(weights[-1] * (2 / batch))
    for k in reversed(range(len(sizes) - 1)):
        torch.addcmul(residuals[k + 1], residuals[k], weights[k] * (2 / batch), out=residuals[k])
    for (residual, a, d), g_a, g_d in zip(
        blocks, g_acts.split(sizes), g_W_dec.split(sizes), strict=True
    ):
        g_a.addmm_(d, residual.T)
        g_d.addmm_(a, residual)
    return residuals[0].sum(0)


def _add_grouped(
    g_acts: Tensor,
    g_W_dec: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    before: Tensor,
    ranked: Tensor,
    ends: Tensor,
    workspace: Workspace,
) -> Tensor:
    """`_add_sliced`, with all blocks at once: r_k = sum_q min(s_k, s_q) (what block q decodes to),
    x taken off the first block, which every other meets at its own reach."""
    batch, n_blocks = len(before), len(ends)
    ends = ends.to(acts.device, torch.int32)
    residuals = grouped_mm(acts.T, W_dec, offs=ends)  # by itself, each: [n_blocks, batch, d_model]
    residuals[0] += before
    if n_blocks > 1:
        # Reaches are counted in prefixes: whole numbers where those are sampled, and not rounded.
        counts = ranked[ends - 1] * n_blocks
        meet = torch.minimum(counts, counts[:, None]).to(acts.dtype)  # [n_blocks, n_blocks]
        mixed = workspace.empty("mixed", acts, *residuals.shape)
        torch.mm(meet, residuals.flatten(1), out=mixed.flatten(1))
        residuals = mixed
    scale = 2 / (batch * n_blocks)
    g_acts.add_(grouped_mm(W_dec, residuals.mT, offs=ends), alpha=scale)
    g_W_dec.add_(grouped_mm(acts, residuals, offs=ends), alpha=scale)
    return residuals[0].sum(0, dtype=g_acts.dtype) * scale


def _runs(
    acts: Tensor,
    grads: Params,
    params: Params,
    x: Tensor,
    reach: Tensor,
    price: Tensor,
    sparsity: Sparsity,
    workspace: Workspace,
) -> Tensor:
    """One residual a run: active latents of a sample that have the same reach.

    Everything but the encoder is a product with a sparse matrix of few entries a sample. One SAE:
    no leading dimension, and acts [n_latents, batch]. -> mean square of a_j ||d_j||.
    """
    W_dec, batch, n_latents = params.W_dec, len(x), len(reach)
    rank = torch.empty_like(reach, dtype=torch.int64)
    rank[reach.argsort(descending=True, stable=True)] = torch.arange(n_latents, device=x.device)
    latent, sample = acts.nonzero(as_tuple=True)  # [n_active] each, by latent
    by_rank = (sample * n_latents + rank[latent]).argsort()
    by_latent = torch.empty_like(by_rank)
    by_latent[by_rank] = torch.arange(len(by_rank), device=x.device)
    latent_starts = _starts(latent, n_latents)
    # From here on by sample, and within each the furthest reach first.
    latent, sample = latent[by_rank], sample[by_rank]
    a, s = acts[latent, sample], reach[latent]

    first = torch.ones_like(sample, dtype=torch.bool)  # of its run
    first[1:] = (sample[1:] != sample[:-1]) | (s[1:] != s[:-1])
    run_of = first.cumsum(0) - 1  # [n_active]
    run_sample, run_reach = sample[first], s[first]  # [n_runs]
    starts = _starts(sample, batch)  # of each sample, in [n_active]
    by_run, by_sample = (
        _csr(begin, latent, a, n_latents) for begin in (_starts(run_of, len(run_sample)), starts)
    )

    # met_r = sum_q min(s_r, s_q) (what run q decodes to) over the runs q of r's sample. The other
    # half of the residual, s_r x, enters below without ever being written down.
    n_runs, d_model = len(run_sample), x.shape[1]
    decoded = workspace.empty("decoded", x, n_runs, d_model)
    torch.addmm(decoded, by_run, W_dec, beta=0, out=decoded)
    met = workspace.empty("met", x, n_runs, d_model)
    torch.addmm(met, _mix_runs(run_sample, run_reach, batch), decoded, beta=0, out=met)

    norms = W_dec.norm(dim=1)
    x_centred = x - params.b_dec
    slope, paid = _sparsity_slopes(a, norms[latent], sparsity)
    g_a = torch.sparse.sampled_addmm(by_run, met, W_dec.T, beta=0).values()
    g_a -= s * torch.sparse.sampled_addmm(by_sample, x_centred, W_dec.T, beta=0).values()
    g_a = g_a.mul_(2).add_(price[latent] * norms[latent] * slope).div_(batch)

    def per_latent(rows: Tensor, values: Tensor, n_rows: int) -> Tensor:
        return _csr(latent_starts, rows[by_latent], values[by_latent], n_rows)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(reach).index_add_(0, latent, values)

    torch.mul(W_dec, (total(paid) * price / norms / batch)[:, None], out=grads.W_dec)
    grads.W_dec.addmm_(per_latent(run_of, a, len(met)), met, alpha=2 / batch)
    grads.W_dec.addmm_(per_latent(sample, s * a, batch), x_centred, alpha=-2 / batch)
    torch.addmm(grads.W_enc, per_latent(sample, g_a, batch), x, beta=0, out=grads.W_enc)
    grads.b_enc[0] = total(g_a)
    grads.b_dec[0] = ((total(a) * reach) @ W_dec - x_centred.sum(0)) * (2 / batch)
    return total(a * a) / batch * norms.square()


def _mix_runs(run_sample: Tensor, run_reach: Tensor, batch: int) -> Tensor:
    """min(s_r, s_q) for all pairs of runs of the same sample: sparse [n_runs, n_runs]."""
    n_pairs = torch.bincount(run_sample, minlength=batch)[run_sample]  # of each run
    pair_starts = n_pairs.cumsum(0) - n_pairs
    run = torch.repeat_interleave(n_pairs)  # [n_pairs]
    starts = _starts(run_sample, batch)
    other = torch.arange(len(run), device=run.device) + (starts[run_sample] - pair_starts)[run]
    weights = torch.minimum(run_reach[run], run_reach[other])
    return _csr(pair_starts, other, weights, len(run_sample))


def _starts(index: Tensor, size: int) -> Tensor:
    """Where each of 0 .. size - 1 begins in `index`, once that is sorted: [size]."""
    counts = torch.bincount(index, minlength=size)
    return counts.cumsum(0) - counts


def _csr(row_starts: Tensor, columns: Tensor, values: Tensor, n_columns: int) -> Tensor:
    """A sparse matrix in CSR form, int32 indices: half the bytes, and what MKL wants."""
    ends = torch.cat([row_starts, row_starts.new_tensor([len(columns)])])
    shape = (len(row_starts), n_columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            ends.int(), columns.int(), values, shape, check_invariants=False
        )
