"""PyTorch's gradient of the loss in sae.py: slow, and right for any new activation function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka.kernels.encode import smallest_kept
from matryoshka.kernels.jumprelu import count, jump
from matryoshka.kernels.layout import Objective, Params, Stats
from sae import Sparsity, matryoshka_loss


def write(grads: Params, params: Params, objective: Objective) -> Stats:
    """Writes the gradient; see `write_gradient`."""
    l0s, mean_squares, least_kept = [], [], []
    for i in range(len(objective.x)):
        parts, l0, mean_square, least = _gradient(i, params.one(i), objective)
        for grad, part in zip(grads.one(i), parts, strict=True):
            grad.copy_(part)
        l0s.append(l0)
        mean_squares.append(mean_square)
        least_kept.append(least)
    kernels = ("autograd",) * len(l0s)
    of_batchtopk = torch.stack(least_kept) if objective.activation == "batchtopk" else None
    return Stats(torch.stack(l0s), torch.stack(mean_squares), kernels, of_batchtopk)


def loss_of(params: Params, x: Tensor, i: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """SAE i's loss [] on x [batch, d_model], and its activations [batch, n_latents]."""
    acts, sparsity = activations(params, x, objective)
    order = objective.reach[i].argsort(descending=True, stable=True)  # [n_latents]
    sorted_reach = objective.reach[i, order]
    ends = objective.ends_of(i).tolist()
    # a latent's price is the sparsity weight times its reach
    sparsity_weight = objective.price[i, order[0]] / objective.reach[i, order[0]]
    loss = matryoshka_loss(
        x,
        acts[:, order],
        params.W_dec[order],
        params.b_dec[0],
        [0, *ends],  # length 0, b_dec alone, has the weight that the other lengths lack of 1
        [1 - float(sorted_reach[0]), *length_weights(sorted_reach, ends)],
        sparsity_weight,
        sparsity if isinstance(sparsity, str) else sparsity[:, order],
    )
    return loss, acts


def _unhedged_loss(
    params: Params, x: Tensor, i: int, objective: Objective
) -> tuple[Tensor, Tensor]:
    """What to differentiate in an unhedged step, and the activations [batch, n_latents].

    It is the sum of the prefixes' loss with the decoder held fixed and the full reconstruction's
    loss with the encoder held fixed. Its gradient is that of the step, but no loss has its value.
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
    """Activations [batch, n_latents], and the argument `sparsity` of matryoshka_loss for them."""
    preacts = x @ params.W_enc.T + params.b_enc
    if objective.activation == "jumprelu":
        threshold, bandwidth = params.log_threshold[0].exp(), objective.bandwidth
        return jump(preacts, threshold, bandwidth), count(preacts, threshold, bandwidth)
    assert objective.sparsity != "l0"
    return objective.acts(params, preacts), objective.sparsity


def length_weights(sorted_reach: Tensor, ends: list[int]) -> list[float]:
    """The weight of each prefix length in `ends`, from the falling reaches [n_latents]: the reach
    of the last latent that it contains, less that of the next."""
    reaches = sorted_reach[[end - 1 for end in ends]].double()
    return (reaches - torch.cat([reaches[1:], reaches.new_zeros(1)])).tolist()


@torch.inference_mode(False)
def _gradient(
    i: int, params: Params, objective: Objective
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
    """SAE i's gradient, shaped as `params`; its L0 []; of a_j ||d_j|| the mean square [n_latents]
    and the smallest that is not 0 [].

    Autograd cannot use tensors made in inference mode, so all of them are copied first.
    """
    leaves = Params(*(part.clone().requires_grad_() for part in params))
    objective = objective.copied()
    with torch.enable_grad():
        of_step = _unhedged_loss if objective.unhedged else loss_of
        loss, acts = of_step(leaves, objective.x[i], i, objective)
        parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    acts, norms = acts.detach(), leaves.W_dec.detach().norm(dim=1)
    mean_square, least = (acts * norms).square().mean(0), smallest_kept(acts, norms)
    return parts, (acts > 0).sum().to(acts.dtype) / len(acts), mean_square, least
