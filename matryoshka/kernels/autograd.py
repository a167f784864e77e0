"""The gradient by PyTorch, of the loss as sae.py has it: the slow way, for whatever is new."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.kernels.layout import Objective, Params, Stats
from sae import ACTIVATIONS, matryoshka_loss


def write(grads: Params, params: Params, objective: Objective) -> Stats:
    """Writes the gradient; see `write_gradient`."""
    l0s, mean_squares = [], []
    for i in range(len(objective.x)):
        parts, l0, mean_square = _gradient(i, params.one(i), objective)
        for grad, part in zip(grads.one(i), parts, strict=True):
            grad.copy_(part)
        l0s.append(l0)
        mean_squares.append(mean_square)
    kernels = ("autograd",) * len(l0s)
    return Stats(torch.stack(l0s), torch.stack(mean_squares), kernels)


def loss_of(params: Params, x: Tensor, i: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """SAE i's loss on x [batch, d_model], and its activations [batch, n_latents]."""
    acts = ACTIVATIONS[objective.activation](x @ params.W_enc.T + params.b_enc)
    order = objective.reach[i].argsort(descending=True, stable=True)
    ends = objective.ends_of(i).tolist()
    # A latent's price is the sparsity weight times its reach, and the largest reach is 1.
    weight = objective.price[i, order[0]] / objective.reach[i, order[0]]
    loss = matryoshka_loss(
        x,
        acts[:, order],
        params.W_dec[order],
        params.b_dec[0],
        ends,
        length_weights(objective.reach[i, order], ends),
        weight,
        objective.sparsity,
    )
    return loss, acts


def length_weights(ranked: Tensor, ends: list[int]) -> list[float]:
    """The weights of the lengths `ends` at which latents have the reaches `ranked`, which fall."""
    shares = ranked[[end - 1 for end in ends]].double()
    return (shares - torch.cat([shares[1:], shares.new_zeros(1)])).tolist()


@torch.inference_mode(False)
def _gradient(
    i: int, params: Params, objective: Objective
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """SAE i's gradient, as `params` are; L0 []; mean square of a_j ||d_j|| [n_latents].

    Tensors made in inference mode cannot be differentiated, so all are copied first.
    """
    leaves = Params(*(part.clone().requires_grad_() for part in params))
    objective = objective.copied()
    with torch.enable_grad():
        loss, acts = loss_of(leaves, objective.x[i], i, objective)
        parts = torch.autograd.grad(loss, leaves)
    acts = acts.detach()
    mean_square = (acts * leaves.W_dec.detach().norm(dim=1)).square().mean(0)
    return parts, (acts > 0).sum().to(acts.dtype) / len(acts), mean_square
