"""Metrics of one SAE, as pure functions; sums are in float64.

Samples may have any leading dimensions, as [batch, seq, d_model] has: they all count alike.
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
    Returns float64 []; 0 is perfect, 1 is as good as the mean. Where the samples are all the same
    there is no variance and FVU is not defined: inf is returned, or nan if they are reconstructed
    exactly, or there are none. Raises `ValueError` where the shapes differ.
    """
    if x.shape != x_hat.shape or x.dim() < 1:
        raise ValueError(f"x is {list(x.shape)}, x_hat {list(x_hat.shape)}: they must be equal")
    x, x_hat = x.reshape(-1, x.shape[-1]).double(), x_hat.reshape(-1, x.shape[-1])
    centred = x - x[:1]  # exactly 0 where all are the same, which x - mean is not
    centred = centred - centred.mean(0)
    return sum_of_squares(x - x_hat) / sum_of_squares(centred)


def sum_of_squares(x: Tensor) -> Tensor:
    """Over all elements, squared and summed in float64: []."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def squared_norms(x: Tensor) -> Tensor:
    """Of vectors x [..., d_model], squared and summed in float64: [...]."""
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
    """How often latents fire: how many latents there are by the logarithm of their frequency.

    fired: int64 [n_latents], the number of samples on which each fires, of n samples in all.
    Returns "log10_edges", those of 80 bins from 1e-8 to 1, each a tenth of a power of ten wide;
    "counts", the latents in each bin, of which the first has the rarer ones as well; and "never",
    the number of latents that never fire.
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
    """How well each latent's direction points along each feature's.

        cosine_jf = W_dec_j . directions_f / (||W_dec_j|| ||directions_f||), 0 where a norm is 0

    W_dec: [n_latents, d_model]; directions: [n_features, d_model]. (For an encoder's cosines, pass
    W_enc transposed.) Returns float64 [n_latents, n_features], between -1 and 1 but for rounding.
    Raises `ValueError` where d_model differs.
    """
    if W_dec.shape[-1] != directions.shape[-1]:
        raise ValueError(
            f"W_dec is {list(W_dec.shape)}, directions {list(directions.shape)}: "
            "their last dimension must be equal"
        )
    return _unit_rows(W_dec) @ _unit_rows(directions).mT


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1, in float64; rows of zeros stay so. However small: no underflow."""
    rows = rows.double()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def best_cosine(cosines: Tensor) -> Tensor:
    """Each feature's highest cosine with any latent: max_j cosine_jf.

    cosines: [n_latents, n_features], of `decoder_cosines`. Returns [n_features].
    """
    return cosines.amax(-2)


def clean_features(best: Tensor, threshold: float = 0.9) -> Tensor:
    """How many features some latent points along: #{f : best_f > threshold}.

    best: [n_features], of `best_cosine`. Returns int64 []. The write-up's threshold is 0.9.
    """
    return (best > threshold).sum(-1)


def match_latents(cosines: Tensor) -> Tensor:
    """Each feature's latent, under the one-to-one matching of the highest total cosine.

        argmax over injective m of sum_f cosine_{m(f), f}    (the Hungarian method, on the CPU)

    cosines: [n_latents, n_features]. Returns int64 [n_features] on the device of `cosines`; with
    more features than latents, n_features - n_latents features have none: -1.
    Raises `ValueError` where a cosine is nan or infinite.
    """
    from scipy.optimize import linear_sum_assignment  # only here: its import takes most of a second

    latents, features = linear_sum_assignment(
        cosines.detach().double().cpu().numpy(), maximize=True
    )
    matched = torch.full((cosines.shape[1],), -1)
    matched[torch.from_numpy(features)] = torch.from_numpy(latents)
    return matched.to(cosines.device)


def highest_cosines(W_dec: Tensor, chunk: int = 1024) -> Tensor:
    """How alike decoder directions are: each latent's highest cosine to another latent.

        max over k != j of  W_dec_j . W_dec_k / (||W_dec_j|| ||W_dec_k||)

    W_dec: [n_latents, d_model], n_latents at least 2. `chunk` rows are compared with all at a time.
    Returns float64 [n_latents].
    """
    unit = _unit_rows(W_dec)
    best = []
    for start in range(0, len(unit), chunk):
        cosines = unit[start : start + chunk] @ unit.T  # [chunk, n_latents]
        cosines.diagonal(start).fill_(-torch.inf)  # not with itself
        best.append(cosines.amax(1))
    return torch.cat(best)


# ------------------------------------------------------------------- a feature tree that is known


def absorption_rate(
    acts: Tensor, features: Tensor, parent_of: Sequence[int | None], matched: Tensor
) -> Tensor:
    """How often a child feature is active while its parent's latent stays silent.

        rate_f = #{i : features_if > 0 and acts_{i, m(p(f))} <= 0} / #{i : features_if > 0}

    Here p(f) is the parent of f and m its matched latent. The parent is active on all of these
    samples, so a latent for it should fire on each: where it does not, the child's has absorbed
    it.

    acts: [n, n_latents]; features: [n, n_features], the true activations of the same samples;
    parent_of: each feature's parent or None, as `FeatureTree.parent`; matched: int64 [n_features],
    of `match_latents`, -1 for no latent.
    Returns float64 [n_features], between 0 and 1; nan where f has no parent, the parent has no
    matched latent, or f was never active. Raises `ValueError` where the numbers of samples or of
    features differ.
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
    """1, 2, 4, ... below n_latents, and n_latents."""
    return [2**k for k in range((n_latents - 1).bit_length())] + [n_latents]


def prefix_errors(sae: SAE, x: Tensor, acts: Tensor, prefixes: Sequence[int]) -> Tensor:
    """What is left when only the first m latents reconstruct: ||x_i - x_hat_i(m)||^2.

    x: [n, d_model]; acts: [n, n_latents]; prefixes: the lengths m, which rise. Each latent is
    decoded once: what a prefix adds is taken off what the one before it left.
    Returns float64 [n_prefixes, n], in the squared units of x.
    """
    left = x - sae.decode(acts, 0)  # [n, d_model]
    errors, done = [], 0
    for prefix in prefixes:
        left = left - acts[:, done:prefix] @ sae.W_dec[done:prefix] / sae.scale
        errors.append(squared_norms(left))
        done = prefix
    return torch.stack(errors)
