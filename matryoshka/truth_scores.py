"""The scores of SynthSAEBench: how well an SAE finds features that are known.

They are those of Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), as SAELens's
`sae_lens.synthetic` defines them. A latent represents the feature whose direction, or its negative,
is nearest to its decoder row:

    nearest_j = argmax_f |cosine(W_dec_j, direction_f)|

Samples are added batch by batch. Counts are integers; sums are in float64.
"""

import torch
from torch import Tensor

from matryoshka.metrics import decoder_cosines, match_latents

MIN_NORM = 1e-6  # samples with a norm below this, in the data's units, have no shrinkage


def mean_correlation(cosines: Tensor) -> Tensor:
    """MCC: the mean |cosine| of latents and features in the best one-to-one matching.

        MCC = max over injective m of  mean_f |cosine_{m(f), f}|    (the Hungarian method)

    The mean is over min(n_latents, n_features) pairs. cosines: [n_latents, n_features], from
    `metrics.decoder_cosines`. Returns float64 [], between 0 and 1. Raises `ValueError` if a cosine
    is nan or infinite.
    """
    size = cosines.abs().double()
    matched = match_latents(size)  # [n_features]
    features = (matched >= 0).nonzero()[:, 0]
    return size[matched[features], features].mean()


def nearest_features(cosines: Tensor) -> Tensor:
    """The feature that each latent represents: argmax_f |cosine_jf|.

    cosines: [n_latents, n_features], from `metrics.decoder_cosines`. Returns int64 [n_latents].
    """
    return cosines.abs().argmax(1)


def uniqueness(nearest: Tensor) -> float:
    """The number of features that latents represent, divided by the number of latents.

    It is 1 if no two latents represent the same feature. nearest: int64 [n_latents], from
    `nearest_features`. Latents that never fire count, too.
    """
    return int((torch.bincount(nearest) > 0).sum()) / len(nearest)


class TruthScores:
    """The scores of one SAE, over samples that are added batch by batch."""

    def __init__(self, W_dec: Tensor, directions: Tensor):
        """W_dec: [n_latents, d_model]; directions: [n_features, d_model], of any norms.

        Raises `ValueError` if d_model differs, or a value is not finite.
        """
        cosines = decoder_cosines(W_dec.detach(), directions)
        self.mcc = float(mean_correlation(cosines))
        self.nearest = nearest_features(cosines)  # [n_latents]
        zeros = torch.zeros_like(self.nearest)
        # The numbers of samples on which a latent, its feature, and both are active: [n_latents].
        self.fired, self.true, self.both = zeros, zeros.clone(), zeros.clone()
        self._ratios = torch.zeros((), dtype=torch.float64, device=W_dec.device)
        self._n_ratios = torch.zeros((), dtype=torch.int64, device=W_dec.device)

    def add(self, acts: Tensor, is_active: Tensor, x: Tensor, x_hat: Tensor) -> None:
        """Adds n samples.

        acts: [n, n_latents]; is_active: bool [n, n_features], the features that are active; x and
        x_hat: [n, d_model], in the same units.
        """
        fires, is_true = acts > 0, is_active[:, self.nearest]  # [n, n_latents] both
        self.fired += fires.sum(0)
        self.true += is_true.sum(0)
        self.both += (fires & is_true).sum(0)
        norms, norms_hat = x.double().norm(dim=1), x_hat.double().norm(dim=1)
        counts = norms > MIN_NORM
        self._ratios += (norms_hat[counts] / norms[counts]).sum()
        self._n_ratios += counts.sum()

    def summary(self) -> dict[str, float]:
        """The scores over all added samples.

        A latent is a detector of the feature that it represents, with

            precision = P(feature | latent)    recall = P(latent | feature)
            F1 = 2 precision recall / (precision + recall)

        Each is 0 if it is not defined; the scores are means over all latents. "shrinkage" is the
        mean of ||x_hat_i|| / ||x_i|| over the samples that are not 0, and 0 if all are.
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
    """The mean of parts / wholes, both int64 [n_latents]; a ratio is 0 if its whole is 0."""
    return float((parts.double() / wholes.clamp(min=1)).mean())
