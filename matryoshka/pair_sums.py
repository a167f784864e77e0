"""How pairs of latents fire together, summed over a cache from what fires, and not densely."""

import torch
from torch import Tensor

from matryoshka.hierarchy import Pairs

MAX_LATENTS = 8192  # three matrices of this size squared in float64 are 1.6 GB
PAIRS_AT_ONCE = 2**17  # small enough for a cache, and bounds the memory of a batch


class Firings:
    """What fires in a batch: token `token[i]` of the batch, latent `latent[i]`, how strongly.

    In order of the token, then of the latent; the three are [n_firings].
    """

    def __init__(self, acts: Tensor):
        """acts: [n, n_latents]."""
        self.n_tokens, self.n_latents = acts.shape
        self.token, self.latent = acts.nonzero(as_tuple=True)
        self.value = acts[self.token, self.latent]


class PairSums:
    """Sums over all pairs of latents that fire on a token: memory grows with n_latents squared.

    Two sums are the halves of one complex number, since most of the time goes into reaching a
    place in memory: `_together` has, at [i, j] with i < j, how often both fire and the sum of
    a_i a_j; `_masked` the sums of a_i^2 and of a_j^2 over these tokens.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu"):
        self.n_latents, self.n_tokens = n_latents, 0

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._together, self._masked = (zeros(n_latents**2, torch.complex128) for _ in range(2))
        self.fired, self.squares, self.largest = (zeros(n_latents, torch.float64) for _ in range(3))

    def add(self, firings: Firings) -> None:
        """Adds a batch."""
        latent, value = firings.latent, firings.value.double()
        self.n_tokens += firings.n_tokens
        self.fired.index_add_(0, latent, torch.ones_like(value))
        self.squares.index_add_(0, latent, value.square())
        self.largest.scatter_reduce_(0, latent, value, "amax")
        # Latent by latent: the places of its pairs are one row of the matrices, which stays in
        # the processor's cache. Token by token they would be all over memory.
        firsts = latent.argsort(stable=True)
        n_later = _n_later(firings)[firsts]
        ends = n_later.cumsum(0)
        start, n = 0, len(latent)
        while start < n:  # as many firings as make PAIRS_AT_ONCE pairs, and at least one
            done = int(ends[start - 1]) if start else 0
            limit = ends.new_tensor(done + PAIRS_AT_ONCE)
            stop = max(start + 1, int(torch.searchsorted(ends, limit, right=True)))
            self._add_pairs(latent, value, firsts[start:stop], n_later[start:stop])
            start = stop

    def _add_pairs(self, latent: Tensor, value: Tensor, firsts: Tensor, n_later: Tensor) -> None:
        """Adds the pairs of the firings `firsts` with the `n_later` ones that follow each."""
        first = firsts.repeat_interleave(n_later)
        begins = (n_later.cumsum(0) - n_later).repeat_interleave(n_later)
        second = first + 1 + torch.arange(len(first), device=latent.device) - begins
        a, b = value[first], value[second]
        place = latent[first] * self.n_latents + latent[second]
        self._together.scatter_add_(0, place, torch.complex(torch.ones_like(a), a * b))
        self._masked.scatter_add_(0, place, torch.complex(a.square(), b.square()))

    def pairs(self) -> Pairs:
        """What was summed so far."""
        shape = self.n_latents, self.n_latents
        together, masked = self._together.view(shape), self._masked.view(shape)
        both, products = (upper + upper.T for upper in (together.real, together.imag))
        masked = masked.real + masked.imag.T
        both.diagonal().copy_(self.fired)
        products.diagonal().copy_(self.squares)
        masked.diagonal().copy_(self.squares)
        return Pairs(self.n_tokens, self.fired, self.largest, both, products, masked)


def _n_later(firings: Firings) -> Tensor:
    """How many latents of the same token come after each firing: int64 [n_firings]."""
    per_token = torch.bincount(firings.token, minlength=firings.n_tokens)
    ends = per_token.cumsum(0)[firings.token]
    return ends - 1 - torch.arange(len(ends), device=ends.device)
