"""The activations of one SAE that is too large for `all_pairs`, as [n_latents, batch].

A latent's activations are contiguous in memory, so that latents can be read in any order.
"""

import numpy as np
import torch
from torch import Tensor

from matryoshka.kernels import jumprelu
from matryoshka.kernels.layout import (
    Acts,
    MatmulDtype,
    Objective,
    Params,
    SparseActs,
    Workspace,
    pick,
)

# `guess_bound` looks at every 61st score, and aims at 1.25 times as many scores as are kept.
SAMPLE_EVERY, MARGIN = 61, 1.25


def encode(
    params: Params, x: Tensor, objective: Objective, matmul_dtype: MatmulDtype, workspace: Workspace
) -> Acts:
    """The activations of one SAE on x [batch, d_model], in x's dtype."""
    preacts = pre_activations(params, x, matmul_dtype, workspace)  # [n_latents, batch]
    is_batchtopk = objective.activation == "batchtopk"
    if is_batchtopk and preacts.device.type == "cpu":
        # `sae.batchtopk` sorts n_latents x batch scores, which takes longer than the whole step
        n_kept = max(1, round(objective.k * len(x)))
        return keep_largest(preacts, params.W_dec.norm(dim=1), n_kept, workspace)
    gate = objective.gate(params)
    near = jumprelu.near(preacts.T, gate.threshold, objective.bandwidth)
    acts = objective.acts(params, preacts.T, gate).T
    least = None
    if is_batchtopk and gate.norms is not None:
        least = smallest_kept(acts, gate.norms.T)
    return Acts(acts.shape, acts, None, None if near is None else near.T, least)


def pre_activations(
    params: Params, x: Tensor, matmul_dtype: MatmulDtype, workspace: Workspace
) -> Tensor:
    """The transpose of x W_enc + b_enc: [n_latents, batch]."""
    W_enc, b_enc = params.W_enc, params.b_enc.T
    preacts = workspace.empty("acts", x, len(W_enc), len(x))
    if matmul_dtype == "float32":
        torch.addmm(b_enc, W_enc, x.T, out=preacts)
    else:
        rounded = workspace.empty("W_enc", x.bfloat16(), *W_enc.shape).copy_(W_enc)
        product = workspace.empty("product", rounded, *preacts.shape)
        preacts.copy_(torch.mm(rounded, x.bfloat16().T, out=product)).add_(b_enc)
    return preacts


def keep_largest(preacts: Tensor, norms: Tensor, n: int, workspace: Workspace) -> Acts:
    """The activations that `sae.batchtopk` keeps: those of the n largest scores a_j ||d_j||.

    From a sample of the scores follows a bound that somewhat more than n of them exceed; the n
    largest are among these. If fewer exceed it, all positive scores are taken instead.
    preacts [n_latents, batch], norms [n_latents].
    """
    bound = guess_bound(preacts, norms, n)
    # slightly lower, so that rounding in the division loses none
    latent, sample, a = above(preacts, bound * (1 - 1e-5) / norms, workspace)
    if len(a) < n and bound > 0:
        latent, sample, a = above(preacts, torch.zeros_like(norms), workspace)
    scores = a * pick(norms, latent)
    least = scores.topk(n, sorted=False).values.amin() if len(a) > n else scores.new_zeros(())
    kept = ((scores >= least) & (scores > 0)).nonzero()[:, 0]
    latent, sample, a, scores = (pick(part, kept) for part in (latent, sample, a, scores))
    least = scores.amin() if len(scores) else least
    return Acts(preacts.shape, None, SparseActs(latent, sample, a), None, least)


def guess_bound(preacts: Tensor, norms: Tensor, n: int) -> Tensor:
    """A bound [] >= 0 that about MARGIN * n of the scores exceed, estimated from a sample."""
    index = torch.arange(0, preacts.numel(), SAMPLE_EVERY)
    scores = pick(preacts.view(-1), index) * pick(norms, index // preacts.shape[1])
    n_above = min(len(scores), int(MARGIN * n / SAMPLE_EVERY) + 8)
    bound: Tensor = scores.topk(n_above, sorted=False).values.amin().clamp_min(0)
    return bound


def above(preacts: Tensor, bounds: Tensor, workspace: Workspace) -> SparseActs:
    """The pre-activations above their latent's bound, [n_latents], as a list."""
    mask = workspace.empty("above", preacts.new_empty(0, dtype=torch.bool), *preacts.shape)
    torch.gt(preacts, bounds[:, None], out=mask)
    index = torch.from_numpy(np.flatnonzero(mask.numpy()))  # half the time of torch.nonzero
    latent = index // preacts.shape[1]
    return SparseActs(latent, index - latent * preacts.shape[1], pick(preacts.view(-1), index))


def smallest_kept(acts: Tensor, norms: Tensor) -> Tensor:
    """The smallest a_j ||d_j|| that is not 0, or infinity if all are: [...].

    acts are [..., n_latents, batch] or the transpose; norms broadcast to them.
    """
    scores = torch.where(acts > 0, acts * norms, torch.inf)
    return scores.amin(dim=(-2, -1))
