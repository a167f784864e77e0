"""The gradient of the Matryoshka loss: by autograd, or written out, which is many times faster.

A latent enters the loss of sae.py only through its *reach* s_j, the total weight of the prefix
lengths that contain it. Two latents occur together in min(s_i, s_j) of the prefixes. Let x stand
for the scaled input minus b_dec, a for the activations, d_j for row j of W_dec, and
p_j = sparsity_weight * s_j for the *price* of latent j. Then the loss of one sample is

    ||x||^2 - 2 sum_j s_j a_j <d_j, x> + sum_ij min(s_i, s_j) a_i a_j <d_i, d_j>
            + sum_j p_j a_j ||d_j||

So no prefix has to be formed. The gradient follows from the residual r_j of each latent, which is
the weighted sum of x_hat - x over the prefixes that contain latent j:

    r_j = sum_i min(s_i, s_j) a_i d_i - s_j x
    d loss / d a_j = 2 <d_j, r_j> + p_j ||d_j||
    d loss / d d_j = 2 a_j r_j    + p_j a_j d_j / ||d_j||

The gradients of W_enc and b_enc follow by the chain rule: an activation has slope 1 in its
pre-activation where it is not 0, and slope 0 where it is. The gradient of b_dec is 2 r for reach 1.

In an *unhedged* objective only the encoder has this gradient. The decoder has the gradient for
s_j = 1, the full reconstruction (matryoshka/unhedged.py).

Each module computes it in another way, and all agree up to rounding:

`autograd`   PyTorch's gradient of `sae.matryoshka_loss`: slow, and right for any new activation.
`all_pairs`  computes all pairs of latents and no residuals: for stacks of small SAEs.
`by_prefix`  computes one residual for each prefix and sample, by dense products: for activations
             that are still dense. On a GPU in bfloat16 these are grouped products.
`sparse`     computes one residual for each sample and reach that has active latents. Only the
             encoder's product is dense. On a CPU, most steps of a large SAE's training take it.

`write_gradient` computes it by the kernel that `choose` returns, and says which that was.
"""

from matryoshka.kernels.dispatch import Gradient, losses, write_gradient
from matryoshka.kernels.layout import MatmulDtype, Objective, Params, Stats, Workspace

__all__ = [
    "Gradient",
    "MatmulDtype",
    "Objective",
    "Params",
    "Stats",
    "Workspace",
    "losses",
    "write_gradient",
]
