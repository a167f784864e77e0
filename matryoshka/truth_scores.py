"""How well an SAE finds features that are known, by the scores of SynthSAEBench.

Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), as SAELens's `sae_lens.synthetic` defines them.
A latent stands for the feature whose direction is nearest to its decoder row, whichever way that
points:

    nearest_j = argmax_f |cosine(W_dec_j, direction_f)|

Counts are whole numbers, sums are in float64; samples are added batch by batch.
"""

import torch
from torch import Tensor

from matryoshka.metrics import decoder_cosines, match_latents

MIN_NORM = 1e-6  # of a sample, in the data's units: below it there is no shrinkage to speak of


def mean_correlation(cosines: Tensor) -> Tensor:
    """MCC: the mean |cosine| of latents and features, matched one to one so that it is highest.

        MCC = max over injective m of  mean_f |cosine_{m(f), f}|    (the Hungarian method)

    The mean is over min(n_latents, n_features) pairs. cosines: [n_latents, n_features], of
    `metrics.decoder_cosines`. Returns float64 [], between 0 and 1.
    Raises `ValueError` where a cosine is nan or infinite.
    """
    size = cosines.abs().double()
    matched = match_latents(size)  # [n_features]
    features = (matched >= 0).nonzero()[:, 0]
    return size[matched[features], features].mean()


def nearest_features(cosines: Tensor) -> Tensor:
    """The feature that each latent stands for: argmax_f |cosine_jf|.

    cosines: [n_latents, n_features], of `metrics.decoder_cosines`. Returns int64 [n_latents].
    """
    return cosines.abs().argmax(1)


def uniqueness(nearest: Tensor) -> float:
    """How many features latents stand for, over how many latents there are; 1: each for its own.

    nearest: int64 [n_latents], of `nearest_features`. Latents that never fire count, too.
    """
    return int((torch.bincount(nearest) > 0).sum()) / len(nearest)


class TruthScores:
    """The scores of one SAE, over samples that are added batch by batch."""

    def __init__(self, W_dec: Tensor, directions: Tensor):
        """W_dec: [n_latents, d_model]; directions: [n_features, d_model], of any norms.

        Raises `ValueError` where d_model differs, or a value is not finite.
        """
        cosines = decoder_cosines(W_dec.detach(), directions)
        self.mcc = float(mean_correlation(cosines))
        self.nearest = nearest_features(cosines)  # [n_latents]
        zeros = torch.zeros_like(self.nearest)
        # samples on which each latent, its feature, and both are active: int64 [n_latents]
        self.fired, self.true, self.both = zeros, zeros.clone(), zeros.clone()
        self._ratios = torch.zeros((), dtype=torch.float64, device=W_dec.device)
        self._n_ratios = torch.zeros((), dtype=torch.int64, device=W_dec.device)

    def add(self, acts: Tensor, is_active: Tensor, x: Tensor, x_hat: Tensor) -> None:
        """Adds n samples: acts [n, n_latents]; is_active, bool [n, n_features], whether a feature
        is; x and x_hat [n, d_model], in the same units."""
        fires, is_true = acts > 0, is_active[:, self.nearest]  # [n, n_latents] both
        self.fired += fires.sum(0)
        self.true += is_true.sum(0)
        self.both += (fires & is_true).sum(0)
        norms, norms_hat = x.double().norm(dim=1), x_hat.double().norm(dim=1)
        counts = norms > MIN_NORM
        self._ratios += (norms_hat[counts] / norms[counts]).sum()
        self._n_ratios += counts.sum()

    def summary(self) -> dict[str, float]:
        """The scores of what was added.

        With a latent as a detector of the feature that it stands for,

            precision = P(feature | latent)    recall = P(latent | feature)
            F1 = 2 precision recall / (precision + recall)

        each 0 where it is not defined, and the mean over all latents. "shrinkage" is the mean of
        ||x_hat_i|| / ||x_i|| over the samples that are not 0, and 0 where all are.
        """
        return {
            "mcc": self.mcc,
            "f1": _mean_share(2 * self.both, self.fired + self.true),
            "precision": _mean_share(self.both, self.fired),
            "recall": _mean_share(self.both, self.true),
            "uniqueness": uniqueness(self.nearest),
            "shrinkage": float(self._ratios / self._n_ratios.clamp(min=1)),
        }


def _mean_share(parts: Tensor, wholes: Tensor) -> float:
    """The mean of parts / wholes, int64 [n_latents] both; 0 where a whole is 0."""
    return float((parts.double() / wholes.clamp(min=1)).mean())
