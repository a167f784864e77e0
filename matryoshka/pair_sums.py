"""Sums over a cache of how pairs of latents fire together, computed from the firings alone."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from matryoshka.hierarchy import Pairs

MAX_LATENTS = 8192  # three float64 matrices [8192, 8192] take 1.6 GB
WAITING = 2**21  # firings that are collected before their pairs are summed
PAIRS_AT_ONCE = 2**18  # pairs summed at once: few enough for the processor's cache

Array = np.ndarray


class Firings:
    """The firings of a batch: on token `token[i]`, latent `latent[i]` fires with `value[i]`.

    They are sorted by token, then by latent. Arrays [n_firings]: int64, int64 and float32.
    """

    def __init__(self, acts: Tensor, factor: Tensor | None = None):
        """acts: [n, n_latents], on any device. factor: [n_latents], multiplies the values."""
        self.n_tokens, self.n_latents = acts.shape
        fires = (acts != 0).flatten()  # NaN counts, too
        # NumPy's flatnonzero takes a third of the time of PyTorch's nonzero on a CPU.
        place = fires.nonzero()[:, 0] if fires.is_cuda else np.flatnonzero(fires.numpy())
        places = torch.as_tensor(place, device=acts.device)
        value = acts.flatten()[places]
        if factor is not None:
            value = value * factor[places % self.n_latents]
        self.token, self.latent = np.divmod(places.cpu().numpy(), self.n_latents)
        self.value = value.float().cpu().numpy()


class PairSums:
    """Sums over all pairs of latents that fire on the same token; memory is O(n_latents^2).

    Only some rows of the matrices are summed at a time, so that they stay in the processor's cache.
    Since each round passes over all rows, many batches are collected for it. NumPy's `bincount` is
    several times as fast as PyTorch's `scatter_add_`.
    """

    def __init__(self, n_latents: int):
        self.n_latents, self.n_tokens = n_latents, 0
        self._waiting: list[Firings] = []
        # At [i, j] with i < j: how often both fire, and the sum of a_i a_j.
        self._both, self._products = (np.zeros((n_latents, n_latents)) for _ in range(2))
        self._masked = np.zeros((n_latents, n_latents))  # at [i, j]: the sum of a_i^2 where j fires
        self._fired, self._squares, self._largest = (np.zeros(n_latents) for _ in range(3))

    def add(self, firings: Firings) -> None:
        """Adds the firings of a batch."""
        latent, value = firings.latent, firings.value.astype(np.float64)
        self.n_tokens += firings.n_tokens
        self._fired += np.bincount(latent, minlength=self.n_latents)
        self._squares += np.bincount(latent, value**2, self.n_latents)
        np.maximum.at(self._largest, latent, value)
        self._waiting.append(firings)
        if sum(len(some.latent) for some in self._waiting) >= WAITING:
            self._sum_waiting()

    def _sum_waiting(self) -> None:
        """Adds the pairs of the collected batches to the sums."""
        if not self._waiting:
            return
        latent = np.concatenate([some.latent for some in self._waiting])
        value = np.concatenate([some.value for some in self._waiting]).astype(np.float64)
        n_later = np.concatenate([_n_later(some) for some in self._waiting])
        self._waiting = []
        by_latent = latent.argsort(kind="stable")
        n_pairs = np.bincount(latent, n_later, self.n_latents)
        starts = np.append(0, np.bincount(latent, minlength=self.n_latents).cumsum())
        for low, high in _blocks(n_pairs):
            firsts = by_latent[starts[low] : starts[high]]
            self._add_pairs(low, high, latent, value, firsts, n_later[firsts])

    def _add_pairs(
        self, low: int, high: int, latent: Array, value: Array, firsts: Array, n_later: Array
    ) -> None:
        """Adds the pairs of each firing of `firsts` with the later firings on the same token.

        `firsts` are indices of firings of latents `low` to `high` - 1. Firing i pairs with the next
        `n_later` entries of `latent` and `value` after it.
        """
        begins = n_later.cumsum() - n_later
        second = np.arange(n_later.sum()) + np.repeat(firsts + 1 - begins, n_later)
        row = (latent[firsts] - low) * self.n_latents
        place = np.repeat(row, n_later) + latent[second]
        a, b = np.repeat(value[firsts], n_later), value[second]

        def summed(weights: Array | None) -> Array:
            size = (high - low) * self.n_latents
            return np.bincount(place, weights, size).reshape(-1, self.n_latents)

        self._both[low:high] += summed(None)
        self._products[low:high] += summed(a * b)
        self._masked[low:high] += summed(a * a)
        self._masked[:, low:high] += summed(b * b).T

    def pairs(self) -> Pairs:
        """The sums. Nothing can be added afterwards, because the matrices are not copied.

        Copies would be slow: touching memory for the first time costs more than the sums do.
        """
        self._sum_waiting()
        for upper in (self._both, self._products):
            _mirror(upper)
        np.fill_diagonal(self._both, self._fired)
        np.fill_diagonal(self._products, self._squares)
        np.fill_diagonal(self._masked, self._squares)
        sums = (self._fired, self._largest, self._both, self._products, self._masked)
        return Pairs(self.n_tokens, *map(torch.from_numpy, sums))


def _mirror(upper: Array, size: int = 256) -> None:
    """Copies the part above the diagonal below it, `size` columns at a time."""
    for start in range(0, len(upper), size):
        upper[start:, start : start + size] += upper[start : start + size, start:].T


def _n_later(firings: Firings) -> Array:
    """For each firing, how many later firings are on the same token: int64 [n_firings]."""
    ends = np.bincount(firings.token, minlength=firings.n_tokens).cumsum()[firings.token]
    return ends - 1 - np.arange(len(ends))


def _blocks(n_pairs: Array) -> Iterator[tuple[int, int]]:
    """Yields ranges of latents with at most PAIRS_AT_ONCE pairs together, or of one latent."""
    ends, low = n_pairs.cumsum(), 0
    while low < len(n_pairs):
        done = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        yield low, high
        low = high
