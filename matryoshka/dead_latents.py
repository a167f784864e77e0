"""Latents that have stopped firing: the loss that lets them learn, and starting them anew."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.kernels import Objective, Params
from matryoshka.kernels.layout import Acts
from matryoshka.kernels.sparse import csr, starts_of


class Auxiliary(NamedTuple):
    """The settings of the auxiliary loss."""

    weight: float
    by_level: bool  # of each prefix, or of the whole SAE


def add_auxiliary_gradient(
    grads: Params,
    params: Params,
    objective: Objective,
    dead: Tensor,
    how: Auxiliary,
    known: Acts | None = None,
) -> None:
    """Adds the gradient of the auxiliary loss of each SAE that has dead latents.

    With e = x - x_hat what an SAE leaves, held fixed, and e_hat what its dead latents make of it
    (the d_model / 2 of them with the largest pre-activations over 0), the loss is

        weight * mean ||e - e_hat||^2 / mean ||e - mean(e)||^2

    Gao et al. 2024 (arXiv 2406.04093, appendix A.2), as Bussmann et al. 2025 use it. by_level: one
    such loss for each prefix, divided by their number: e is what that prefix leaves, and only the
    dead latents that it adds explain it. dead: bool [n_saes, n_latents]; known: the activations
    of a stack of one SAE, where they were computed already.
    """
    for i in range(len(dead)):
        if dead[i].any():
            x, p = objective.x[i], params.one(i)
            acts = known or _acts(objective, p, i)
            groups = _levels(objective, i) if how.by_level else [torch.ones_like(dead[i])]
            left, share = x - p.b_dec, how.weight / len(groups)
            for group in groups:
                left = left - _decoded(acts, p.W_dec, group)
                _add(grads.one(i), p, x, left, group & dead[i], share)


def _acts(objective: Objective, params: Params, i: int) -> Acts:
    """One SAE's activations on the batch."""
    acts = objective.acts(params, objective.x[i] @ params.W_enc.T + params.b_enc).T
    return Acts(acts.shape, acts, None)


def _decoded(acts: Acts, W_dec: Tensor, group: Tensor) -> Tensor:
    """What the latents of a group, bool [n_latents], decode to: [batch, d_model]."""
    if acts.dense is not None:
        return acts.dense[group].T @ W_dec[group]
    assert acts.sparse is not None
    latent, sample, a = acts.sparse
    by_sample = sample.argsort(stable=True)
    latent, sample = latent[by_sample], sample[by_sample]
    a = a[by_sample] * group[latent]
    decoded: Tensor = csr(starts_of(sample, acts.shape[1]), latent, a, len(W_dec)) @ W_dec
    return decoded


def _levels(objective: Objective, i: int) -> list[Tensor]:
    """Which latents each prefix adds to the one before it: bool [n_latents] each."""
    reach = objective.reach[i]
    return [reach == value for value in sorted(set(reach.tolist()), reverse=True)]


def _add(
    grads: Params, params: Params, x: Tensor, left: Tensor, dead: Tensor, weight: float
) -> None:
    """One SAE's, of the latents `dead` [n_latents], for what is `left` [batch, d_model]."""
    index = dead.nonzero()[:, 0]
    variance = (left - left.mean(0)).square().sum(1).mean()
    rounding = (8 * torch.finfo(left.dtype).eps) ** 2 * left.square().sum(1).mean()
    if not len(index) or not variance > rounding:
        return
    W_dec = params.W_dec[index]
    acts = (x @ params.W_enc[index].T + params.b_enc[0, index]).relu_()  # [batch, n_dead]
    k = max(1, x.shape[1] // 2)
    if len(index) > k:
        smallest = acts.topk(k, dim=1).values[:, -1:]
        acts = torch.where(acts >= smallest, acts, 0)
    error = (acts @ W_dec - left) * (2 * weight / (len(x) * variance))
    slopes = (error @ W_dec.T) * (acts > 0)
    grads.W_dec.index_add_(0, index, acts.T @ error)
    grads.W_enc.index_add_(0, index, slopes.T @ x)
    grads.b_enc[0].index_add_(0, index, slopes.sum(0))


def resample(
    state: Mapping[str, Tensor],
    params: Params,
    objective: Objective,
    dead: Tensor,
    generators: Sequence[torch.Generator],
) -> None:
    """Starts dead latents anew along samples that are reconstructed badly.

    A sample is drawn with a probability proportional to its squared error, without replacement; its
    error's direction becomes the latent's decoder row, at the mean norm of the other rows, and a
    fifth of the other latents' mean norm its encoder column; its bias is 0, and so are Adam's
    moments (Bricken et al. 2023, "Towards monosemanticity", appendix). A threshold of jumprelu
    becomes the others' mean. Of more dead latents than there are samples, the first are taken; an
    SAE whose latents are all dead is left as it is. state: a trainer's, changed in place; dead:
    bool [n_saes, n_latents]; generators: one an SAE.
    """
    d_model, n_latents = params.W_dec.shape[2], params.W_dec.shape[1]
    for i in range(len(dead)):
        index = dead[i].nonzero()[: objective.x.shape[1], 0]
        if not len(index) or dead[i].all():
            continue
        x, p = objective.x[i], params.one(i)
        everything = torch.ones_like(dead[i])
        error = x - p.b_dec - _decoded(_acts(objective, p, i), p.W_dec, everything)
        chances = error.square().sum(1).double().cpu() + 1e-30
        if not chances.isfinite().all():  # it has diverged, which is noticed elsewhere
            continue
        drawn = torch.multinomial(chances, len(index), generator=generators[i]).to(x.device)
        u = torch.nn.functional.normalize(error[drawn], dim=1)
        alive = ~dead[i]
        of_rows = p.W_dec[alive].norm(dim=1).mean()
        of_columns = 0.2 * p.W_enc[alive].norm(dim=1).mean()
        starts = {"params": (u * of_columns, u * of_rows), "adam_mean": (0 * u, 0 * u)}
        for name, (columns, rows) in (starts | {"adam_square": (0 * u, 0 * u)}).items():
            one = Params.of(state[name], d_model, n_latents).one(i)
            one.W_enc[index], one.W_dec[index], one.b_enc[0, index] = columns, rows, 0
            if one.log_threshold.numel():
                of_others = one.log_threshold[0, alive].mean() if name == "params" else 0
                one.log_threshold[0, index] = of_others
        state["silent"][i, index] = 0
