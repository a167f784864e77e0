"""The gradient by PyTorch, of the loss as sae.py has it: the slow way, for whatever is new."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.kernels.encode import least_let_through
from matryoshka.kernels.jumprelu import count, jump
from matryoshka.kernels.layout import Objective, Params, Stats
from sae import Sparsity, matryoshka_loss


def write(grads: Params, params: Params, objective: Objective) -> Stats:
    """Writes the gradient; see `write_gradient`."""
    l0s, mean_squares, leasts = [], [], []
    for i in range(len(objective.x)):
        parts, l0, mean_square, least = _gradient(i, params.one(i), objective)
        for grad, part in zip(grads.one(i), parts, strict=True):
            grad.copy_(part)
        l0s.append(l0)
        mean_squares.append(mean_square)
        leasts.append(least)
    kernels = ("autograd",) * len(l0s)
    of_batchtopk = torch.stack(leasts) if objective.activation == "batchtopk" else None
    return Stats(torch.stack(l0s), torch.stack(mean_squares), kernels, of_batchtopk)


def loss_of(params: Params, x: Tensor, i: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """SAE i's loss on x [batch, d_model], and its activations [batch, n_latents]."""
    acts, sparsity = activations(params, x, objective)
    order = objective.reach[i].argsort(descending=True, stable=True)
    ends = objective.ends_of(i).tolist()
    ranked = objective.reach[i, order]
    # A latent's price is the sparsity weight times its reach.
    weight = objective.price[i, order[0]] / objective.reach[i, order[0]]
    loss = matryoshka_loss(
        x,
        acts[:, order],
        params.W_dec[order],
        params.b_dec[0],
        [0, *ends],  # what the lengths lack of a weight of 1 is the bias alone's
        [1 - float(ranked[0]), *length_weights(ranked, ends)],
        weight,
        sparsity if isinstance(sparsity, str) else sparsity[:, order],
    )
    return loss, acts


def _unhedged_loss(
    params: Params, x: Tensor, i: int, objective: Objective
) -> tuple[Tensor, Tensor]:
    """As `loss_of`, what has the gradients of an unhedged step: the prefixes' loss, in which the
    decoder is held, and that of the full reconstruction, in which the activations are. Its value
    is no loss.
    """
    W_dec, b_dec = params.W_dec.detach(), params.b_dec.detach()
    of_encoder, acts = loss_of(params._replace(W_dec=W_dec, b_dec=b_dec), x, i, objective)
    held = [part.detach() for part in (params.W_enc, params.b_enc, params.log_threshold)]
    fixed = Params(held[0], held[1], params.W_dec, params.b_dec, held[2])
    of_decoder, _ = loss_of(fixed, x, i, objective.of_decoder)
    return of_encoder + of_decoder, acts


def activations(
    params: Params, x: Tensor, objective: Objective
) -> tuple[Tensor, Tensor | Sparsity]:
    """Activations [batch, n_latents], and what matryoshka_loss takes as their sparsity."""
    preacts = x @ params.W_enc.T + params.b_enc
    if objective.activation == "jumprelu":
        threshold, bandwidth = params.log_threshold[0].exp(), objective.bandwidth
        return jump(preacts, threshold, bandwidth), count(preacts, threshold, bandwidth)
    assert objective.sparsity != "l0"
    return objective.acts(params, preacts), objective.sparsity


def length_weights(ranked: Tensor, ends: list[int]) -> list[float]:
    """The weights of the lengths `ends` at which latents have the reaches `ranked`, which fall."""
    shares = ranked[[end - 1 for end in ends]].double()
    return (shares - torch.cat([shares[1:], shares.new_zeros(1)])).tolist()


@torch.inference_mode(False)
def _gradient(
    i: int, params: Params, objective: Objective
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
    """SAE i's gradient, as `params` are; L0 []; mean square of a_j ||d_j|| [n_latents], and the
    least that is not 0 [].

    Tensors made in inference mode cannot be differentiated, so all are copied first.
    """
    leaves = Params(*(part.clone().requires_grad_() for part in params))
    objective = objective.copied()
    with torch.enable_grad():
        of_step = _unhedged_loss if objective.unhedged else loss_of
        loss, acts = of_step(leaves, objective.x[i], i, objective)
        parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    acts, norms = acts.detach(), leaves.W_dec.detach().norm(dim=1)
    mean_square, least = (acts * norms).square().mean(0), least_let_through(acts, norms)
    return parts, (acts > 0).sum().to(acts.dtype) / len(acts), mean_square, least
