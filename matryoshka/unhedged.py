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

from matryoshka.kernels import Params


def tie(params: Params) -> None:
    """Turns each latent's encoder w_j to its decoder's direction u_j, in place: <w_j, u_j> u_j."""
    u = torch.nn.functional.normalize(params.W_dec, dim=-1)
    length = (params.W_enc * u).sum(dim=-1, keepdim=True)
    torch.mul(length, u, out=params.W_enc)
