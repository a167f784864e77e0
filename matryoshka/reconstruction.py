"""How well SAEs reconstruct a cache of activations; sums are in float64, in one pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.absorption import ConceptCounts
from matryoshka.cache_reader import ActivationCache, Batch
from matryoshka.errors import UserError
from matryoshka.metrics import (
    density_histogram,
    prefix_errors,
    prefix_lengths,
    squared_norms,
    sum_of_squares,
)
from sae import SAE

BATCH_SIZE = 4096  # activations scored at once
FLOAT32_ROUNDING = 1e-12  # a variance below this share of the mean square may be float32 rounding
OUTLIER = 10.0  # an activation of over this times the median norm counts like OUTLIER^2 others


class Moments:
    """The number, mean and variance of activations that are added batch by batch, in float64.

    The first batch's mean is subtracted before summing. Otherwise, the variance of activations far
    from 0 would be a small difference of large sums.
    """

    n = 0

    def add(self, x: Tensor) -> None:
        """Adds x [n, d_model], of any float dtype."""
        if not len(x):
            return
        x = x.double()
        if self.n == 0:
            self._origin = x.mean(0)
            self._sum, self._squares = torch.zeros_like(self._origin), x.new_zeros(())
        self.n += len(x)
        self._sum += (x - self._origin).sum(0)
        self._squares += sum_of_squares(x - self._origin)

    @property
    def mean(self) -> Tensor:
        """The mean, float64 [d_model]. At least one activation must have been added."""
        return self._origin + self._sum / self.n

    @property
    def variance(self) -> float:
        """sum_i ||x_i - mean||^2; 0 if there are no activations."""
        return float(self._squares - self._sum.square().sum() / self.n) if self.n else 0.0

    @property
    def is_constant(self) -> bool:
        """Whether all activations are the same up to float32 rounding: then FVU is not defined."""
        if self.n == 0:
            return True
        total = self.variance + self.n * float(self.mean.square().sum())
        return not self.variance > FLOAT32_ROUNDING * total


# ------------------------------------------------------------------------------------------ norms


def norms_of(cache: ActivationCache, device: torch.device) -> Tensor:
    """The activations' norms, float64 [n_tokens]. Raises `UserError` if one is not finite."""
    batches = cache.sequential(BATCH_SIZE, device)
    norms = torch.cat([squared_norms(batch.acts).sqrt().cpu() for batch in batches])
    if not norms.isfinite().all():
        first = int((~norms.isfinite()).nonzero()[0])
        raise UserError(f"{cache.folder}: activation {first} is not finite; cache again")
    return norms


def outliers_among(norms: Tensor) -> Tensor:
    """Which of the norms [n] are over OUTLIER times their median: bool [n]."""
    median = float(np.median(norms.numpy()))
    return norms > OUTLIER * median if median > 0 else torch.zeros_like(norms, dtype=torch.bool)


def norm_spread(norms: Tensor) -> dict[str, Any]:
    """Figures that show whether a few activations dominate a sum of squares. norms: [n].

    Returns "median", in the data's units; "p99_9_over_median" and "max_over_median", the 99.9th
    percentile and the largest norm divided by the median (None if that is 0); and "outliers", the
    number of norms for which `outliers_among` is true.
    """
    median, high, largest = np.quantile(norms.numpy(), [0.5, 0.999, 1.0]).tolist()
    return {
        "median": median,
        "p99_9_over_median": high / median if median else None,
        "max_over_median": largest / median if median else None,
        "outliers": int(outliers_among(norms).sum()),
    }


# ----------------------------------------------------------------------------------- SAEs on them


class Statistics:
    """Statistics of one SAE on activations: squared errors, and how often each latent fires.

    `concepts` counts how often latents fire on the tokens of concepts.
    """

    def __init__(self, sae: SAE, concepts: ConceptCounts):
        self.sae, self.concepts = sae, concepts
        self.prefixes = prefix_lengths(sae.n_latents)
        self.n = 0  # activations
        zeros = sae.W_dec.new_zeros(len(self.prefixes), dtype=torch.float64)
        self.errors = zeros  # [n_prefixes]
        self.inlier_error = torch.zeros_like(zeros[0])  # of all latents, without outliers: []
        self.fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)  # [n_latents]

    @torch.inference_mode()
    def add(self, batch: Batch, is_outlier: Tensor) -> None:
        """Adds a batch. is_outlier: bool [n], for the activations of `batch`."""
        acts = self.sae.encode(batch.acts)  # [n, n_latents]
        errors = prefix_errors(self.sae, batch.acts, acts, self.prefixes)  # [n_prefixes, n]
        self.n += len(acts)
        self.errors += errors.sum(1)
        self.inlier_error += errors[-1, ~is_outlier].sum()
        self.fired += (acts > 0).sum(0)
        self.concepts.add(acts > 0, batch)

    def summary(self, every: Moments, inliers: Moments) -> dict[str, Any]:
        """FVU, L0, the dead share, FVU by prefix, and a histogram of how often latents fire.

        `every`: moments of all activations that were added; `inliers`: of those without outliers.
        """
        fvus = (self.errors / every.variance).tolist()
        without = None if inliers.is_constant else float(self.inlier_error) / inliers.variance
        return {
            "fvu": fvus[-1],
            "fvu_without_outliers": without,
            "l0": int(self.fired.sum()) / self.n,
            "dead_share": float((self.fired == 0).double().mean()),
            "fvu_by_prefix": {"prefix": self.prefixes, "fvu": fvus},
            "density_histogram": density_histogram(self.fired, self.n),
        }


def reconstruct(
    statistics: Sequence[Statistics],
    cache: ActivationCache,
    is_outlier: Tensor,
    device: torch.device,
) -> tuple[Moments, Moments]:
    """Adds the whole cache to `statistics`; returns its moments, and those without outliers.

    is_outlier: bool [n_tokens]. Raises `UserError` if FVU is not defined, because all activations
    are the same or a reconstruction is not finite.
    """
    is_outlier = is_outlier.to(device)
    every, inliers = Moments(), Moments()
    with tqdm(total=cache.n_tokens, unit=" tokens", desc="reconstruction") as bar:
        for batch in cache.sequential(BATCH_SIZE, device):
            outliers = is_outlier[every.n : every.n + len(batch.acts)]
            every.add(batch.acts)
            inliers.add(batch.acts[~outliers])
            for one in statistics:
                one.add(batch, outliers)
            bar.update(len(batch.acts))
    if every.is_constant:
        raise UserError(f"{cache.folder}: its activations are all the same: FVU is not defined")
    if not all(one.errors.isfinite().all() for one in statistics):
        raise UserError(f"an SAE's reconstructions of {cache.folder} are not finite")
    return every, inliers
