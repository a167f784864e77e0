"""Dead latents, which have stopped firing: the auxiliary loss, and resampling."""

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
    by_level: bool  # whether each prefix has one, or the whole SAE


def add_auxiliary_gradient(
    grads: Params,
    params: Params,
    objective: Objective,
    dead: Tensor,
    auxiliary: Auxiliary,
    known_acts: Acts | None = None,
) -> None:
    """Adds the gradient of the auxiliary loss for each SAE that has dead latents.

    Let e = x - x_hat be the SAE's error, held fixed, and e_hat its reconstruction from dead latents
    alone: for each sample, from the d_model / 2 of them with the largest positive pre-activations.
    The loss is

        weight * mean ||e - e_hat||^2 / mean ||e - mean(e)||^2

    as in Gao et al. 2024 (arXiv 2406.04093, appendix A.2) and Bussmann et al. 2025. With
    `by_level`, each prefix has such a loss, of the weight divided by the number of prefixes. There
    e is the error of that prefix, and only the dead latents that the prefix adds to the one before
    reconstruct it. dead: bool [n_saes, n_latents]. known_acts: the activations, if the stack is one
    SAE and they have been computed.
    """
    for i in range(len(dead)):
        if dead[i].any():
            x, p = objective.x[i], params.one(i)
            acts = known_acts or _acts(objective, p, i)
            # bool [n_latents] each: the latents that each prefix adds
            levels = _levels(objective, i) if auxiliary.by_level else [torch.ones_like(dead[i])]
            error, weight = x - p.b_dec, auxiliary.weight / len(levels)  # error [batch, d_model]
            for level in levels:
                error = error - _decoded(acts, p.W_dec, level)
                _add_gradient(grads.one(i), p, x, error, level & dead[i], weight)


def _acts(objective: Objective, params: Params, i: int) -> Acts:
    """The activations of SAE i, whose parameters are `params`, on the batch."""
    acts = objective.acts(params, objective.x[i] @ params.W_enc.T + params.b_enc).T
    return Acts(acts.shape, acts, None)  # [n_latents, batch]


def _decoded(acts: Acts, W_dec: Tensor, group: Tensor) -> Tensor:
    """What the latents in `group`, bool [n_latents], decode to: [batch, d_model]."""
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
    """For each prefix, which latents it adds to the one before: bool [n_latents]."""
    reach = objective.reach[i]
    return [reach == value for value in sorted(set(reach.tolist()), reverse=True)]


def _add_gradient(
    grads: Params, params: Params, x: Tensor, error: Tensor, dead: Tensor, weight: float
) -> None:
    """Adds the gradient of one such loss of one SAE: its latents `dead`, bool [n_latents],
    reconstruct `error` [batch, d_model]. An error without variance is not divided by it."""
    index = dead.nonzero()[:, 0]  # [n_dead]
    variance = (error - error.mean(0)).square().sum(1).mean()
    rounding = (8 * torch.finfo(error.dtype).eps) ** 2 * error.square().sum(1).mean()
    if not len(index) or not variance > rounding:
        return
    W_dec = params.W_dec[index]
    acts = (x @ params.W_enc[index].T + params.b_enc[0, index]).relu_()  # [batch, n_dead]
    k = max(1, x.shape[1] // 2)
    if len(index) > k:
        least_kept = acts.topk(k, dim=1).values[:, -1:]
        acts = torch.where(acts >= least_kept, acts, 0)
    g_error_hat = (acts @ W_dec - error) * (2 * weight / (len(x) * variance))  # [batch, d_model]
    g_acts = (g_error_hat @ W_dec.T) * (acts > 0)  # [batch, n_dead]
    grads.W_dec.index_add_(0, index, acts.T @ g_error_hat)
    grads.W_enc.index_add_(0, index, g_acts.T @ x)
    grads.b_enc[0].index_add_(0, index, g_acts.sum(0))


def resample(
    state: Mapping[str, Tensor],
    params: Params,
    objective: Objective,
    dead: Tensor,
    generators: Sequence[torch.Generator],
) -> None:
    """Starts dead latents anew along the errors of samples that are reconstructed badly.

    Each dead latent draws a sample, with probabilities proportional to squared errors, without
    replacement. The direction of the sample's error becomes that of the latent's decoder row, with
    the mean norm of the live latents' rows, and of its encoder column, with a fifth of the mean
    norm of theirs. Its bias becomes 0, as do Adam's moments (Bricken et al. 2023, "Towards
    monosemanticity", appendix). Its threshold, for jumprelu, becomes the geometric mean of theirs.
    If there are more dead latents than samples, only the first are moved. An SAE whose latents are
    all dead stays as it is.

    state: that of the trainer, changed in place. dead: bool [n_saes, n_latents]. generators: one
    for each SAE.
    """
    for i in range(len(dead)):
        index = dead[i].nonzero()[: objective.x.shape[1], 0]  # [n_moved]
        if not len(index) or dead[i].all():
            continue
        x, p = objective.x[i], params.one(i)
        everything = torch.ones_like(dead[i])
        error = x - p.b_dec - _decoded(_acts(objective, p, i), p.W_dec, everything)
        squared = error.square().sum(1).double().cpu() + 1e-30  # [batch]
        if not squared.isfinite().all():  # training has diverged, which is reported elsewhere
            continue
        drawn = torch.multinomial(squared, len(index), generator=generators[i]).to(x.device)
        u = torch.nn.functional.normalize(error[drawn], dim=1)  # [n_moved, d_model]
        _move(state, params, i, index, u, ~dead[i])
        state["silent"][i, index] = 0


def _move(
    state: Mapping[str, Tensor], params: Params, i: int, index: Tensor, u: Tensor, alive: Tensor
) -> None:
    """Starts the latents `index` [n_moved] of SAE i anew along u [n_moved, d_model]; see
    `resample`. alive: bool [n_latents]."""
    d_model, n_latents = params.W_dec.shape[2], params.W_dec.shape[1]
    p = params.one(i)
    row = u * p.W_dec[alive].norm(dim=1).mean()
    column = u * (0.2 * p.W_enc[alive].norm(dim=1).mean())
    starts = {"params": (column, row), "adam_mean": (0 * u, 0 * u), "adam_square": (0 * u, 0 * u)}
    for name, (encoder, decoder) in starts.items():
        one = Params.of(state[name], d_model, n_latents).one(i)
        one.W_enc[index], one.W_dec[index], one.b_enc[0, index] = encoder, decoder, 0
        if one.log_threshold.numel():
            of_others = one.log_threshold[0, alive].mean() if name == "params" else 0
            one.log_threshold[0, index] = of_others
