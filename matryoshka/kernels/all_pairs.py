"""The gradient from all pairs of latents, for a whole stack of small SAEs at once.

With G = W_dec W_dec^T, C = acts^T acts and shared_ij = min(s_i, s_j), the derivative of the loss's
quadratic term with respect to acts is 2 acts (shared * G), and to W_dec it is 2 (shared * C) W_dec.
"""

import torch
from torch import Tensor

from matryoshka.kernels import jumprelu
from matryoshka.kernels.encode import smallest_kept
from matryoshka.kernels.layout import (
    MIN_NORM,
    Objective,
    Params,
    Stats,
    sparsity_slopes,
    zero_where_silent,
)


def write(grads: Params, params: Params, objective: Objective) -> Stats:
    """Writes the gradient; see `write_gradient`."""
    W_enc, b_enc, W_dec, b_dec, _ = params
    x, batch = objective.x, objective.x.shape[1]  # x [n_saes, batch, d_model]
    ones = x.new_ones(len(x), 1, batch)  # a product with it sums over the batch, without a copy
    # [n_saes, n_latents, 1] each. The gradient's factor 2 / batch is in the reach from here on.
    reach = objective.reach[..., None] * (2 / batch)
    price = objective.price[..., None] / batch

    preacts = torch.baddbmm(b_enc, x, W_enc.mT)  # [n_saes, batch, n_latents]
    gate = objective.gate(params)
    near = jumprelu.near(preacts, gate.threshold, objective.bandwidth)
    acts = objective.acts(params, preacts, gate)  # [n_saes, batch, n_latents]
    x_centred = x - b_dec
    shared = torch.minimum(reach, reach.mT)  # [n_saes, n_latents, n_latents]
    W_dec_reached = W_dec * reach
    gram = torch.bmm(W_dec, W_dec.mT)  # [n_saes, n_latents, n_latents]
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # [n_saes, n_latents]

    slope, length_slope = sparsity_slopes(acts, norms[:, None], objective.sparsity)
    sparsity_gradient = price.mT * norms[:, None] * slope  # broadcasts to the shape of acts

    g_acts = torch.baddbmm(sparsity_gradient, acts, gram * shared)  # [n_saes, batch, n_latents]
    g_acts.baddbmm_(x_centred, W_dec_reached.mT, alpha=-1)
    if near is not None and gate.threshold is not None:
        near = near.to(x.dtype)
        slopes = gate.threshold * torch.bmm(ones, g_acts * near) + price.mT * torch.bmm(ones, near)
        gradient = jumprelu.log_threshold_gradient(slopes, gate.threshold, objective.bandwidth)
        grads.log_threshold.copy_(gradient)
    zero_where_silent(g_acts, acts)
    torch.bmm(g_acts.mT, x, out=grads.W_enc)
    torch.bmm(ones, g_acts, out=grads.b_enc)

    if objective.unhedged:  # the rest is the decoder's gradient, which has reaches of its own
        of_decoder = objective.of_decoder
        reach = of_decoder.reach[..., None] * (2 / batch)
        price = of_decoder.price[..., None] / batch
        shared, W_dec_reached = torch.minimum(reach, reach.mT), W_dec * reach
    shrink = torch.bmm(ones, length_slope).mT * price / norms.clamp_min(MIN_NORM)[..., None]
    correlation = torch.bmm(acts.mT, acts)  # [n_saes, n_latents, n_latents]
    linear = torch.bmm(acts.mT, x_centred).mul_(-reach).addcmul_(W_dec, shrink)
    torch.baddbmm(linear, correlation * shared, W_dec, out=grads.W_dec)
    sum_acts, sum_x = torch.bmm(ones, acts), torch.bmm(ones, x_centred)
    torch.baddbmm(sum_x, sum_acts, W_dec_reached, beta=-2 / batch, out=grads.b_dec)

    # the norm of order 0 counts what is not zero, without a copy in another dtype
    l0 = torch.linalg.vector_norm(acts, ord=0, dim=(1, 2)) / batch
    mean_square = correlation.diagonal(dim1=1, dim2=2) * norms.square() / batch
    least = None
    if objective.activation == "batchtopk":
        least = smallest_kept(acts.mT, norms[..., None])  # [n_saes]
    return Stats(l0, mean_square, ("all_pairs",) * len(x), least)


def loss_of(params: Params, x: Tensor, i: int, objective: Objective) -> Tensor:
    """SAE i's loss on x [batch, d_model], averaged over the batch: [].

    It is computed as at the head of kernels/__init__.py. That takes no longer with more prefixes,
    but holds matrices [n_latents, n_latents].
    """
    acts = objective.acts(params, x @ params.W_enc.T + params.b_enc)
    x_centred, reach = x - params.b_dec, objective.reach[i]
    shared = torch.minimum(reach[:, None], reach) * (params.W_dec @ params.W_dec.T)
    fit = torch.addmm((x_centred @ params.W_dec.T) * (-2 * reach), acts, shared).mul_(acts).sum()
    cost = acts * params.W_dec.norm(dim=1)
    if objective.sparsity == "log":
        cost = ((cost + 0.1) / 0.1).log()
    elif objective.sparsity == "l0":
        cost = (acts > 0).to(acts.dtype)
    sparsity_loss = (cost @ objective.price[i]).sum()
    loss: Tensor = (x_centred.square().sum() + fit + sparsity_loss) / len(x)
    return loss
