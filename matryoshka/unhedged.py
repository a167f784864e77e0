"""Training that does not hedge: first find the features, then keep them apart by prefixes.

Where the encoder and the decoder both learn from the prefixes, a parent's direction takes in its
children, as far as short prefixes lack these (feature hedging, Chanin et al. 2025, arXiv
2505.11756). Where both learn from the full reconstruction, a parent falls silent where a child is
active (absorption). An unhedged training has two parts:

1. *Tied.* The objective is the full reconstruction, as a vanilla SAE's, and after each step every
   latent's encoder is turned to its decoder's direction; a length and a bias of its own are all
   that it keeps. Absorption needs an encoder that points away from the child, and there is none.
2. *By prefixes.* The encoder is free, and learns from the prefixes, while the decoder goes on
   learning from the full reconstruction:

       gradient of W_dec, b_dec:  that of the loss of one prefix, all latents; activations held
       gradient of W_enc, b_enc:  that of the loss of the prefixes; decoder held

The second part is a game of two players, not the descent of one loss. Where features are
orthogonal, the SAE that has them is an equilibrium of it, but for the sparsity loss: where all
activations are right, the residual of latent j is r_j = sum_i (min(s_i, s_j) - s_j) a_i d_i. Only
latents of lesser reach are left in it, and <d_j, r_j> is 0. It is not the only equilibrium: there
is one wherever latents that are active together are orthogonal and reconstruct everything.
"""

import torch
from torch import Tensor

from matryoshka.kernels import Params


def along_decoder(W_enc: Tensor, W_dec: Tensor, out: Tensor | None = None) -> Tensor:
    """Each latent's encoder w_j turned to its decoder's direction u_j: <w_j, u_j> u_j.

    All three are [..., n_latents, d_model], a row a latent; `out` may be W_enc.
    """
    u = torch.nn.functional.normalize(W_dec, dim=-1)
    length = (W_enc * u).sum(dim=-1, keepdim=True)
    return torch.mul(length, u, out=out)


def tie(params: Params) -> None:
    """Turns each latent's encoder to its decoder's direction, in place."""
    along_decoder(params.W_enc, params.W_dec, out=params.W_enc)
