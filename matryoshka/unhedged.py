"""Training that does not hedge: first find the features, then keep them apart by prefixes.

If the encoder and the decoder both learn from the prefixes, a parent's direction takes in parts of
those children that short prefixes lack (feature hedging, Chanin et al. 2025, arXiv 2505.11756). If
both learn from the full reconstruction, a parent falls silent where a child is active (absorption).
An unhedged training has two parts:

1. *Tied.* The loss is that of a vanilla SAE, the full reconstruction. After each step, every
   latent's encoder is projected on the direction of its decoder, so that only its length and its
   bias are its own. Absorption needs an encoder that points away from the child; there is none.
2. *By prefixes.* The encoder is free, and learns from the prefixes. The decoder still learns from
   the full reconstruction:

       gradient of W_dec, b_dec:  of the loss of one prefix, all latents, activations held fixed
       gradient of W_enc, b_enc:  of the loss of the prefixes, decoder held fixed

The second part is a game of two players, not the descent of one loss. If features are orthogonal,
the SAE that has found them is an equilibrium of the game, up to the sparsity loss. For if all
activations are right, the residual of latent j is r_j = sum_i (min(s_i, s_j) - s_j) a_i d_i. Only
latents of smaller reach contribute to it, so <d_j, r_j> = 0. There are other equilibria: any SAE
whose latents are orthogonal where they are active together, and which reconstructs everything.
"""

import torch
from torch import Tensor

from matryoshka.kernels import Params


def along_decoder(W_enc: Tensor, W_dec: Tensor, out: Tensor | None = None) -> Tensor:
    """Each latent's encoder w_j, projected on its decoder's direction u_j: <w_j, u_j> u_j.

    All tensors are [..., n_latents, d_model], one row for each latent. `out` may be W_enc.
    """
    u = torch.nn.functional.normalize(W_dec, dim=-1)
    length = (W_enc * u).sum(dim=-1, keepdim=True)  # [..., n_latents, 1]
    return torch.mul(length, u, out=out)


def tie(params: Params) -> None:
    """Projects each latent's encoder on its decoder's direction, in place."""
    along_decoder(params.W_enc, params.W_dec, out=params.W_enc)
