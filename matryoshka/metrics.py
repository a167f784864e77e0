"""Metrics of one SAE, as pure functions; sums are in float64.

Samples may have any leading dimensions, such as [batch, seq, d_model].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import SAE


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """The fraction of variance unexplained, against the variance of the same samples.

        FVU = sum_i ||x_i - x_hat_i||^2 / sum_i ||x_i - mean(x)||^2

    x, x_hat: [..., d_model], of any float dtype, in the same units.
    Returns float64 []; 0 is perfect, 1 is as good as the mean. If all samples are the same, FVU is
    not defined; then this returns inf, or nan if they are reconstructed exactly. It returns nan if
    there are no samples. Raises `ValueError` if the shapes differ.
    """
    if x.shape != x_hat.shape or x.dim() < 1:
        raise ValueError(f"x is {list(x.shape)}, x_hat {list(x_hat.shape)}: they must be equal")
    x, x_hat = x.reshape(-1, x.shape[-1]).double(), x_hat.reshape(-1, x.shape[-1])
    centred = x - x[:1]  # exactly 0 if all samples are the same; x - mean(x) is not, after rounding
    centred = centred - centred.mean(0)
    return sum_of_squares(x - x_hat) / sum_of_squares(centred)


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of all elements, in float64: []."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def squared_norms(x: Tensor) -> Tensor:
    """The squared norm of each vector of x [..., d_model], in float64: [...]."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norms.square()


def l0(acts: Tensor) -> Tensor:
    """How many latents fire on a sample, on average: mean_i #{j : acts_ij > 0}.

    acts: [..., n_latents], of any dtype. Returns float64 [], in latents a sample.
    """
    return (acts > 0).sum().double() / acts.shape[:-1].numel()


def dead_share(acts: Tensor) -> Tensor:
    """The share of latents that never fire on these samples: mean_j [max_i acts_ij <= 0].

    acts: [..., n_latents], of any dtype. Returns float64 [], between 0 and 1.
    """
    return 1 - (acts > 0).reshape(-1, acts.shape[-1]).any(0).double().mean()


def density_histogram(fired: Tensor, n: int) -> dict[str, Any]:
    """A histogram of the latents by the logarithm of how often they fire.

    fired: int64 [n_latents], the number of samples on which each latent fires, of n samples.
    Returns "log10_edges", the edges of 80 bins from 1e-8 to 1, each 0.1 wide in log10; "counts",
    the latents in each bin, where the first bin also has rarer ones; and "never", the number of
    latents that never fire.
    """
    edges = np.arange(-80, 1) / 10
    frequencies = fired[fired > 0].cpu().numpy() / n
    counts, _ = np.histogram(np.log10(frequencies).clip(edges[0], 0), edges)
    return {
        "log10_edges": edges.tolist(),
        "counts": counts.tolist(),
        "never": int((fired == 0).sum()),
    }


# ------------------------------------------------------------------------------------- directions


def decoder_cosines(W_dec: Tensor, directions: Tensor) -> Tensor:
    """The cosine of each latent's decoder row with each feature's direction.

        cosine_jf = W_dec_j . directions_f / (||W_dec_j|| ||directions_f||), 0 if a norm is 0

    W_dec: [n_latents, d_model]; directions: [n_features, d_model]. (For the cosines of an encoder,
    pass W_enc transposed.) Returns float64 [n_latents, n_features]; after rounding, a value may lie
    just outside of -1 to 1. Raises `ValueError` if d_model differs.
    """
    if W_dec.shape[-1] != directions.shape[-1]:
        raise ValueError(
            f"W_dec is {list(W_dec.shape)}, directions {list(directions.shape)}: "
            "their last dimension must be equal"
        )
    return _unit_rows(W_dec) @ _unit_rows(directions).mT


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1, in float64; rows of zeros stay zero. Tiny rows do not underflow."""
    rows = rows.double()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def best_cosine(cosines: Tensor) -> Tensor:
    """Each feature's highest cosine with any latent: max_j cosine_jf.

    cosines: [n_latents, n_features], from `decoder_cosines`. Returns [n_features].
    """
    return cosines.amax(-2)


def clean_features(best: Tensor, threshold: float = 0.9) -> Tensor:
    """The number of features that some latent points along: #{f : best_f > threshold}.

    best: [n_features], from `best_cosine`. Returns int64 []. The write-up's threshold is 0.9.
    """
    return (best > threshold).sum(-1)


def match_latents(cosines: Tensor) -> Tensor:
    """Each feature's latent in the one-to-one matching with the highest total cosine.

        argmax over injective m of sum_f cosine_{m(f), f}    (the Hungarian method, on the CPU)

    cosines: [n_latents, n_features]. Returns int64 [n_features] on the device of `cosines`. If
    there are more features than latents, n_features - n_latents features have no latent: -1.
    Raises `ValueError` if a cosine is nan or infinite.
    """
    # Imported here because it takes most of a second.
    from scipy.optimize import linear_sum_assignment

    latents, features = linear_sum_assignment(
        cosines.detach().double().cpu().numpy(), maximize=True
    )
    matched = torch.full((cosines.shape[1],), -1)
    matched[torch.from_numpy(features)] = torch.from_numpy(latents)
    return matched.to(cosines.device)


def highest_cosines(W_dec: Tensor, chunk: int = 1024) -> Tensor:
    """Each latent's highest cosine with the decoder row of another latent.

        max over k != j of  W_dec_j . W_dec_k / (||W_dec_j|| ||W_dec_k||)

    W_dec: [n_latents, d_model], n_latents at least 2. `chunk` rows at a time are compared with all.
    Returns float64 [n_latents].
    """
    unit = _unit_rows(W_dec)
    best = []
    for start in range(0, len(unit), chunk):
        cosines = unit[start : start + chunk] @ unit.T  # [chunk, n_latents]
        cosines.diagonal(start).fill_(-torch.inf)  # the cosine with itself does not count
        best.append(cosines.amax(1))
    return torch.cat(best)


# ------------------------------------------------------------------- a feature tree that is known


def absorption_rate(
    acts: Tensor, features: Tensor, parent_of: Sequence[int | None], matched: Tensor
) -> Tensor:
    """How often a child feature is active while its parent's latent stays silent.

        rate_f = #{i : features_if > 0 and acts_{i, m(p(f))} <= 0} / #{i : features_if > 0}

    Here p(f) is the parent of f, and m(p(f)) the latent matched to the parent. The parent is active
    on all samples where f is, so its latent should fire on them; where it does not, the child's
    latent has absorbed it.

    acts: [n, n_latents]; features: [n, n_features], the true activations of the same samples;
    parent_of: each feature's parent or None, as in `FeatureTree.parent`; matched: int64
    [n_features], from `match_latents`, -1 for no latent.
    Returns float64 [n_features], between 0 and 1; nan if f has no parent, its parent has no matched
    latent, or f is never active. Raises `ValueError` if the numbers of samples or features differ.
    """
    n_features = len(parent_of)
    if len(acts) != len(features):
        raise ValueError(f"{len(acts)} samples of acts, {len(features)} of features")
    if not n_features == features.shape[1] == len(matched):
        raise ValueError(
            f"parent_of has {n_features} features, features {features.shape[1]}, "
            f"matched {len(matched)}"
        )
    rates = torch.full((n_features,), torch.nan, dtype=torch.float64, device=acts.device)
    latents = matched.tolist()
    for child, parent in enumerate(parent_of):
        if parent is None or latents[parent] < 0:
            continue
        active = features[:, child] > 0  # [n]
        silent = acts[:, latents[parent]] <= 0  # [n]
        rates[child] = (active & silent).sum().double() / active.sum()  # 0 / 0 is nan
    return rates


# --------------------------------------------------------------------------------------- prefixes


def prefix_lengths(n_latents: int) -> list[int]:
    """The powers of two below n_latents, and n_latents."""
    return [2**k for k in range((n_latents - 1).bit_length())] + [n_latents]


def prefix_errors(sae: SAE, x: Tensor, acts: Tensor, prefixes: Sequence[int]) -> Tensor:
    """The squared error of reconstructing from the first m latents alone: ||x_i - x_hat_i(m)||^2.

    x: [n, d_model]; acts: [n, n_latents]; prefixes: the lengths m, increasing. Each latent is
    decoded once: a prefix's residual is that of the shorter one, minus what its further latents
    add. Returns float64 [n_prefixes, n], in the squared units of x.
    """
    left = x - sae.decode(acts, 0)  # [n, d_model]
    errors, done = [], 0
    for prefix in prefixes:
        left = left - acts[:, done:prefix] @ sae.W_dec[done:prefix] / sae.scale
        errors.append(squared_norms(left))
        done = prefix
    return torch.stack(errors)
