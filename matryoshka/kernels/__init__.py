"""The gradient of the Matryoshka loss: by autograd, or written out, which is many times faster.

A latent enters the loss of sae.py only through its *reach* s_j, the total weight of the prefix
lengths that contain it. Two latents occur together in min(s_i, s_j) of the prefixes. So with x less
b_dec, a the activations, d_j row j of W_dec, and p_j = sparsity_weight * s_j the *price* of latent
j, the loss of a sample is

    ||x||^2 - 2 sum_j s_j a_j <d_j, x> + sum_ij min(s_i, s_j) a_i a_j <d_i, d_j>
            + sum_j p_j a_j ||d_j||

No prefix need be formed, and everything follows from the residual of latent j: the mean, over the
prefixes that contain it, of what they decode to less x,

    r_j = sum_i min(s_i, s_j) a_i d_i - s_j x
    d loss / d a_j = 2 <d_j, r_j> + p_j ||d_j||
    d loss / d d_j = 2 a_j r_j    + p_j a_j d_j / ||d_j||

Of an *unhedged* objective that is the encoder's gradient alone; the decoder has that of s_j = 1,
the full reconstruction (matryoshka/unhedged.py).

Each module has one way to compute this, and all agree to rounding:

`autograd`   PyTorch's gradient of `sae.matryoshka_loss`. Slow, and right for whatever is new.
`all_pairs`  forms no residual, but all pairs of latents: small dictionaries, by the hundred.
`by_prefix`  one residual a prefix and sample: dense products, for activations that are still dense.
             On a GPU in bfloat16, all products of a kind are one grouped product.
`sparse`     one residual for each run of active latents of equal reach: only the encoder's product
             is dense. This is what training on a CPU is, but for its beginning.

`write_gradient` takes one of them by `choose`, and says which it took.
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
