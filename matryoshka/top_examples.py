"""Collects what each latent fires on: its strongest tokens, a random sample, and a histogram.

An activation here is a_j ||d_j|| / s, the length of the vector that latent j adds to the
reconstruction, in the units of the data. It does not depend on how an SAE divides this length
between encoder and decoder.

One pass over a cache is enough, with memory that grows with the number of latents but not of
tokens. The strongest tokens are found by merging each batch with those kept so far. A firing's key
is a hash of the seed, the token and the latent; a latent's sample is its firings with the lowest
keys. This is a uniform sample that depends neither on the batches nor on their order. The width of
a histogram's bins is a power of two; for a larger activation, it is doubled and pairs of bins are
merged.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_reader import ActivationCache
from matryoshka.errors import UserError
from matryoshka.hierarchy import Pairs
from matryoshka.pair_sums import MAX_LATENTS, Firings, PairSums
from sae import SAE

N_TOP, TOP_A_ROW = 20, 2  # strongest tokens that are kept, and the most of them from one row
N_SAMPLE = 100  # firings in a latent's sample
N_QUANTILES, N_A_QUANTILE = 10, 5  # quantiles of activations, and examples of each
N_BINS = 64
BATCH_SIZE = 4096  # activations encoded at once

Array = np.ndarray


class Examples(NamedTuple):
    """What was collected about one SAE on one cache. A token is a number, its index in the cache.

    If a latent fires too seldom to fill a list, the list ends with tokens -1 and activations 0.
    """

    n_tokens: int
    fired: Array  # int64 [n_latents]: tokens on which each fires
    total: Array  # float64 [n_latents]: the sum of its activations
    largest: Array  # float32 [n_latents]
    top_tokens: Array  # int64 [n_latents, N_TOP], strongest first
    top_values: Array  # float32 [n_latents, N_TOP]
    sample_tokens: Array  # int64 [n_latents, N_SAMPLE], in random order
    sample_values: Array  # float32 [n_latents, N_SAMPLE]
    histogram: Array  # int64 [n_latents, N_BINS]: bin k counts from k to (k + 1) times the width
    bin_width: Array  # float32 [n_latents], a power of two; 0 if the latent never fires
    token_counts: Array  # int64 [highest token id + 1]: how often each id is in the cache


class Collector:
    """Collects `Examples` of one SAE, batch by batch in the cache's order."""

    def __init__(self, n_latents: int, seed: int = 0):
        self.n_latents, self.seed, self.n_tokens = n_latents, seed, 0
        self.fired = np.zeros(n_latents, dtype=np.int64)
        self.total = np.zeros(n_latents)
        self.top = _Kept(n_latents, N_TOP, TOP_A_ROW)
        self.sample = _Kept(n_latents, N_SAMPLE, 0)
        self.histogram = np.zeros((n_latents, N_BINS), dtype=np.int64)
        self.exponent = np.full(n_latents, _NO_BINS)
        self.largest = np.zeros(n_latents, dtype=np.float32)
        self.token_counts = np.zeros(0, dtype=np.int64)

    def add(self, firings: Firings, tok_ids: Tensor, rows: Tensor) -> None:
        """Adds a batch's firings, its token ids, and its rows in the dataset: int64 [n] each."""
        latent, value = firings.latent, firings.value
        token, row = firings.token + self.n_tokens, rows.cpu().numpy()[firings.token]
        self.fired += np.bincount(latent, minlength=self.n_latents)
        self.total += np.bincount(latent, value.astype(np.float64), self.n_latents)
        self._add_to_histogram(latent, value)
        self.top.add(_Some(latent, -value, token, value, row))
        self.sample.add(_Some(latent, _keys(self.seed, latent, token), token, value, token))
        self._count_tokens(tok_ids.cpu().numpy())
        self.n_tokens += firings.n_tokens

    def _add_to_histogram(self, latent: Array, value: Array) -> None:
        np.maximum.at(self.largest, latent, value)
        wanted = np.where(self.largest > 0, np.frexp(self.largest / N_BINS)[1], _NO_BINS)
        for j in np.flatnonzero(wanted > self.exponent):
            if self.exponent[j] != _NO_BINS:
                self.histogram[j] = _halved(self.histogram[j], int(wanted[j] - self.exponent[j]))
        self.exponent = wanted
        bins = np.ldexp(value, -self.exponent[latent]).astype(np.int64)
        counts = np.bincount(latent * N_BINS + bins, minlength=self.histogram.size)
        self.histogram += counts.reshape(self.histogram.shape)

    def _count_tokens(self, tok_ids: Array) -> None:
        counts = np.bincount(tok_ids[tok_ids >= 0], minlength=len(self.token_counts))
        counts[: len(self.token_counts)] += self.token_counts
        self.token_counts = counts

    def examples(self) -> Examples:
        """The collected examples."""
        never = self.exponent == _NO_BINS
        self.top.merge()
        self.sample.merge()
        return Examples(
            n_tokens=self.n_tokens,
            fired=self.fired,
            total=self.total,
            largest=self.largest,
            top_tokens=self.top.token,
            top_values=self.top.value,
            sample_tokens=self.sample.token,
            sample_values=self.sample.value,
            histogram=self.histogram,
            bin_width=np.where(never, 0, np.ldexp(1.0, self.exponent)).astype(np.float32),
            token_counts=self.token_counts,
        )


_NO_BINS = -1000  # the exponent of a latent that has not fired


class _Some(NamedTuple):
    """Some firings, arrays [n]; a lower key is better."""

    latent: Array
    key: Array
    token: Array
    value: Array
    row: Array

    def take(self, which: Array) -> "_Some":
        return _Some(*(column[which] for column in self))


class _Kept:
    """Keeps, for each latent, the `size` firings with the lowest keys so far, lowest first.

    If `a_row` is not 0, at most that many are from the same row. Because merging takes long, new
    firings are only merged when they are as many as those kept.
    """

    def __init__(self, n_latents: int, size: int, a_row: int):
        shape = (n_latents, size)
        self.size, self.a_row = size, a_row
        self.key = np.full(shape, np.inf)
        self.token = np.full(shape, -1, dtype=np.int64)
        self.value = np.zeros(shape, dtype=np.float32)
        self.row = np.full(shape, -1, dtype=np.int64)
        self.waiting: list[_Some] = []

    def add(self, new: _Some) -> None:
        """Adds those that may be among the lowest. Tokens must increase from call to call."""
        self.waiting.append(new.take(new.key < self.key[new.latent, -1]))
        if sum(len(some.latent) for some in self.waiting) > self.key.size:
            self.merge()

    def merge(self) -> None:
        """Merges the waiting firings with those kept."""
        held = self.key < np.inf
        latent = np.nonzero(held)[0]
        kept = _Some(latent, *(of[held] for of in (self.key, self.token, self.value, self.row)))
        every = _Some(*map(np.concatenate, zip(kept, *self.waiting, strict=True)))
        self.waiting = []
        # Waiting firings are in the order of tokens, and sorting is stable: of equal keys, the
        # first token is kept.
        if self.a_row:
            every = every.take(np.lexsort((every.key, every.row, every.latent)))
            every = every.take(_place_in_group(every.latent, every.row) < self.a_row)
        every = every.take(np.lexsort((every.key, every.latent)))
        place = _place_in_group(every.latent)
        every, place = every.take(place < self.size), place[place < self.size]
        self.key[every.latent, place] = every.key
        self.token[every.latent, place] = every.token
        self.value[every.latent, place] = every.value
        self.row[every.latent, place] = every.row


def _place_in_group(*columns: Array) -> Array:
    """Each item's index in its group, int64 [n]. A group is adjacent items with equal `columns`."""
    n = len(columns[0])
    begins = np.zeros(n, dtype=bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return np.arange(n) - np.maximum.accumulate(np.where(begins, np.arange(n), 0))


def _keys(seed: int, latent: Array, token: Array) -> Array:
    """A number in [0, 1) for each firing, a hash of seed, latent and token: float64 [n].

    The hash function is SplitMix64's (Steele, Lea, Flood 2014).
    """
    z = token.astype(np.uint64) << np.uint64(24)
    z = (z ^ latent.astype(np.uint64)) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _halved(counts: Array, times: int) -> Array:
    """A histogram [N_BINS] in which pairs of bins are merged, `times` times."""
    for _ in range(min(times, N_BINS.bit_length())):
        counts = np.concatenate([counts.reshape(-1, 2).sum(1), np.zeros(N_BINS // 2, np.int64)])
    return counts


# ------------------------------------------------------------------------------- over a whole cache


def lengths_added(sae: SAE) -> Tensor:
    """||d_j|| / s, [n_latents]: the length of what each latent adds if its activation is 1."""
    lengths: Tensor = sae.W_dec.norm(dim=1) / sae.scale
    return lengths


def strengths(sae: SAE, x: Tensor) -> Tensor:
    """a_j ||d_j|| / s, [n, n_latents], the length of what each latent adds. x: [n, d_model]."""
    return sae.encode(x).mul_(lengths_added(sae))


@torch.inference_mode()
def collect(
    sae: SAE, cache: ActivationCache, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Examples, Pairs | None]:
    """Collects examples of every latent, and how pairs of latents fire together, in one pass.

    The pairs are None if there are more than `MAX_LATENTS` latents. Raises `UserError` if the
    cache's width is not the SAE's, or an activation is not finite.
    """
    if cache.d_model != sae.d_model:
        raise UserError(
            f"{cache.folder} has d_model {cache.d_model}, but the SAE has d_model {sae.d_model}: "
            "give the cache of the model and layer that it was trained on"
        )
    collector = Collector(sae.n_latents, seed)
    sums = PairSums(sae.n_latents) if sae.n_latents <= MAX_LATENTS else None
    lengths = lengths_added(sae)
    with tqdm(total=cache.n_tokens, unit=" tokens", desc="examples") as bar:
        for batch in cache.sequential(BATCH_SIZE, device):
            firings = Firings(sae.encode(batch.acts), lengths)
            if not np.isfinite(firings.value).all():
                raise UserError(f"{cache.folder}: an activation is not finite; cache again")
            collector.add(firings, batch.tok_ids, batch.rows)
            if sums is not None:
                sums.add(firings)
            bar.update(firings.n_tokens)
    return collector.examples(), sums.pairs() if sums is not None else None


def quantile_examples(examples: Examples, latent: int) -> list[list[tuple[int, float]]]:
    """Up to N_A_QUANTILE firings (token, activation) from each quantile of a latent's activation.

    The quantiles, lowest first, are those of the latent's sample, which has all of its firings if
    there are no more than N_SAMPLE. A quantile's firings are its first ones in the sample, whose
    order is random.
    """
    tokens, values = examples.sample_tokens[latent], examples.sample_values[latent]
    n = int((tokens >= 0).sum())
    order = np.argsort(values[:n], kind="stable")
    quantiles = [np.sort(part)[:N_A_QUANTILE] for part in np.array_split(order, N_QUANTILES)]
    return [[(int(tokens[i]), float(values[i])) for i in part] for part in quantiles]
