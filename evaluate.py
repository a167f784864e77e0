"""Every metric, as a pure function.

Leading dimensions `...` are independent SAEs, scored together. Statistics are summed in float64.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """The fraction of variance unexplained, against the variance of the same samples.

        FVU = sum_i ||x_i - x_hat_i||^2 / sum_i ||x_i - mean(x)||^2

    x: [..., n, d]; x_hat: [..., n, d], in the units of x. Either may lack leading dimensions.
    Returns float64 [...]; 0 is perfect, 1 is as good as the mean. Where the samples are all the
    same it is inf, or nan if they are also reconstructed. Raises `ValueError` where n or d differ.
    """
    if x.shape[-2:] != x_hat.shape[-2:]:
        raise ValueError(f"x is {list(x.shape)}, x_hat {list(x_hat.shape)}: [n, d] must be equal")
    return _sum_of_squares(x - x_hat) / _sum_of_squares(x - x.mean(-2, True, dtype=torch.float64))


def _sum_of_squares(x: Tensor) -> Tensor:
    """Over the last two dimensions, squared and summed in float64."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64).square()


def l0(acts: Tensor) -> Tensor:
    """How many latents fire on a sample, on average: mean_i #{j : acts_ij > 0}.

    acts: [..., n, n_latents]. Returns float64 [...], in latents a sample.
    """
    return (acts > 0).sum((-2, -1)).double() / acts.shape[-2]


def dead_share(acts: Tensor) -> Tensor:
    """The share of latents that never fire on these samples: mean_j [max_i acts_ij <= 0].

    acts: [..., n, n_latents]. Returns float64 [...], within [0, 1].
    """
    return 1 - (acts > 0).any(-2).double().mean(-1)


def decoder_cosines(W_dec: Tensor, directions: Tensor) -> Tensor:
    """How well each latent's direction points along each feature's.

        cosine_jf = W_dec_j . directions_f / (||W_dec_j|| ||directions_f||), 0 where a norm is 0

    W_dec: [..., n_latents, d]; directions: [..., n_features, d]. (An encoder's cosines: pass
    W_enc transposed.) Returns float64 [..., n_latents, n_features], within [-1, 1] but for
    rounding. Raises `ValueError` where d differs.
    """
    if W_dec.shape[-1] != directions.shape[-1]:
        raise ValueError(
            f"W_dec is {list(W_dec.shape)}, directions {list(directions.shape)}: "
            "their last dimension must be equal"
        )
    return _unit_rows(W_dec) @ _unit_rows(directions).mT


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1, in float64; rows of zeros stay so."""
    rows = rows.double()
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def best_cosine(cosines: Tensor) -> Tensor:
    """Each feature's highest cosine with any latent: max_j cosine_jf.

    cosines: [..., n_latents, n_features], of `decoder_cosines`. Returns [..., n_features].
    """
    return cosines.amax(-2)


def clean_features(best: Tensor, threshold: float = 0.9) -> Tensor:
    """How many features some latent points along: #{f : best_f > threshold}.

    best: [..., n_features], of `best_cosine`. Returns int64 [...]. The write-up's threshold is 0.9.
    """
    return (best > threshold).sum(-1)


def match_latents(cosines: Tensor) -> Tensor:
    """Each feature's latent, under the one-to-one matching of the highest total cosine.

        argmax over injective m of sum_f cosine_{m(f), f}    (the Hungarian method, on the CPU)

    cosines: [..., n_latents, n_features]. Returns int64 [..., n_features] on the device of
    `cosines`; with more features than latents, n_features - n_latents features have none: -1.
    Raises `ValueError` where a cosine is nan or infinite.
    """
    *leading, n_latents, n_features = cosines.shape
    flat = cosines.detach().double().cpu().reshape(-1, n_latents, n_features)
    matched = torch.full((len(flat), n_features), -1)
    for row, one in zip(matched, flat, strict=True):
        latents, features = linear_sum_assignment(one.numpy(), maximize=True)
        row[torch.from_numpy(features)] = torch.from_numpy(latents)
    return matched.reshape(*leading, n_features).to(cosines.device)


def absorption_rate(
    acts: Tensor, features: Tensor, parent_of: Sequence[int | None], matched: Tensor
) -> Tensor:
    """How often a child feature is active while its parent's latent stays silent.

        rate_f = #{i : features_if > 0 and acts_{i, m(p(f))} <= 0} / #{i : features_if > 0}

    with p(f) the parent of f and m its matched latent. The parent is active on all of these
    samples, so a latent for it should fire on each: where it does not, the child's has absorbed
    it.

    acts: [..., n, n_latents]; features: [n, n_features], or [..., n, n_features] with the leading
    dimensions of `acts`, the true activations of the same samples; parent_of: per feature its
    parent's index or None, as `FeatureTree.parent`; matched: int64 [..., n_features], of
    `match_latents`, -1 for no latent.
    Returns float64 [..., n_features], within [0, 1]; nan where f has no parent, the parent has no
    matched latent, or f was never active. Raises `ValueError` where the numbers of samples or of
    features differ.
    """
    n_features = len(parent_of)
    if acts.shape[-2] != features.shape[-2]:
        raise ValueError(f"{acts.shape[-2]} samples of acts, {features.shape[-2]} of features")
    if not n_features == features.shape[-1] == matched.shape[-1]:
        raise ValueError(
            f"parent_of has {n_features} features, features {features.shape[-1]}, "
            f"matched {matched.shape[-1]}"
        )
    rates = torch.full(
        (*acts.shape[:-2], n_features), torch.nan, dtype=torch.float64, device=acts.device
    )
    for child, parent in enumerate(parent_of):
        if parent is None:
            continue
        latent = matched[..., parent].expand(acts.shape[:-2])  # [...]
        column = latent.clamp(min=0)[..., None, None].expand(*acts.shape[:-1], 1)
        silent = acts.gather(-1, column)[..., 0] <= 0  # [..., n]
        active = features[..., child] > 0  # [..., n]
        rate = (active & silent).sum(-1).double() / active.sum(-1)  # 0 / 0 is nan
        rates[..., child] = torch.where(latent >= 0, rate, torch.nan)
    return rates
