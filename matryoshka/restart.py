"""Restarting the last latent of an SAE where the residual is worth more than that latent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from matryoshka.kernels import Objective, Params


def restart_last(
    state: Mapping[str, Tensor], params: Params, last: Tensor, objective: Objective
) -> None:
    """Moves each SAE's last latent if the residual of the batch is worth more than the latent.

    A latent that fires on none of a feature's samples gets no gradient from them. So a feature that
    no latent has found stays lost, while the last latent may serve something smaller: in the toy,
    the error that hedging makes where a parent is active without a child. A latent is worth its
    running mean square of a_j ||d_j||. Let u be the direction of the largest residual in the
    batch. Along u, the residuals r are worth the mean of relu(<u, r>)^2. If that is more, the
    latent starts anew: its encoder and its decoder are u, its bias and Adam's moments are 0.

    state: that of the trainer, changed in place. params: views of its parameters. last [n_saes, 1]:
    the index of each SAE's last latent. objective: that of the step.
    """
    x = objective.x  # [n_saes, batch, d_model]
    d_model, n_latents = x.shape[2], state["mean_square"].shape[1]
    acts = objective.acts(params, torch.baddbmm(params.b_enc, x, params.W_enc.mT))
    residual = x - params.b_dec - torch.bmm(acts, params.W_dec)  # [n_saes, batch, d_model]
    size, worst = residual.norm(dim=2).max(dim=1)  # [n_saes] each
    u = residual.take_along_dim(worst[:, None, None], dim=1) / size[:, None, None]
    worth = torch.bmm(residual, u.mT).clamp_min_(0).square().mean(dim=1)  # [n_saes, 1]

    moves = worth > state["mean_square"].gather(1, last)  # bool [n_saes, 1]
    rows = last[..., None].expand_as(u)  # [n_saes, 1, d_model]
    for name, row in (("params", u), ("adam_mean", 0 * u), ("adam_square", 0 * u)):
        part = Params.of(state[name], d_model, n_latents)
        for tensor in (part.W_enc, part.W_dec):
            tensor.scatter_(1, rows, torch.where(moves[..., None], row, tensor.gather(1, rows)))
        bias = part.b_enc[:, 0]
        bias.scatter_(1, last, bias.gather(1, last) * ~moves)
        if part.log_threshold.shape[-1]:  # jumprelu's starts at the geometric mean of all
            threshold = part.log_threshold[:, 0]
            start = threshold.mean(dim=1, keepdim=True) if name == "params" else 0 * worth
            threshold.scatter_(1, last, torch.where(moves, start, threshold.gather(1, last)))
    if "silent" in state:
        state["silent"].scatter_(1, last, state["silent"].gather(1, last) * ~moves)
    worth = torch.where(moves, worth, state["mean_square"].gather(1, last))
    state["mean_square"].scatter_(1, last, worth)
