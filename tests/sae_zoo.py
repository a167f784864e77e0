"""Random SAEs of every activation function, for tests of conversion."""

import torch
from torch import Tensor

from sae import SAE, seeded_generator

D_MODEL, N_LATENTS = 16, 20


def any_sae(activation: str, seed: int, k: int = 4) -> SAE:
    """A dead latent, a decoder row of zeros, rows and inputs of tiny to huge scales."""
    generator = seeded_generator(seed, 5)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = 10.0 ** (torch.randint(-6, 7, (), generator=generator).item())
    W_dec = rand(N_LATENTS, D_MODEL) * 10 ** (0.5 * rand(N_LATENTS, 1))
    W_dec[3] = 0
    b_enc = 0.3 * rand(N_LATENTS)
    b_enc[5] = -1e3  # never fires
    tensors = {
        "W_enc": rand(D_MODEL, N_LATENTS) / D_MODEL**0.5,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "b_dec": rand(D_MODEL),
        "mean_norm": torch.tensor(scale),
    }
    about = {"n_prefixes": 5, "name": "matryoshka"} if seed % 2 else {"widths": [4, 10, N_LATENTS]}
    if activation == "jumprelu":
        tensors["threshold"] = rand(N_LATENTS).abs()
    if activation == "batchtopk":
        tensors["threshold"] = 0.7 / W_dec.norm(dim=1).clamp(min=1e-8)
    return SAE.from_tensors(tensors, activation, about, k if "topk" in activation else None)


def inputs(sae: SAE, seed: int, n: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [n, d_model] of the norm that the SAE was trained on, off the origin."""
    x = torch.randn(n + 1, sae.d_model, generator=seeded_generator(seed, 6))
    x = (x[1:] + x[0]) * float(sae.mean_norm) / sae.d_model**0.5
    return x.to(dtype)
