"""Tokens in their context: windows of a cache's rows, and what a latent does in them."""

from typing import NamedTuple

import numpy as np
import torch

from matryoshka.cache_reader import ActivationCache
from matryoshka.top_examples import BATCH_SIZE, strengths
from sae import SAE

Array = np.ndarray


class Text(NamedTuple):
    """Every token of a cache, and where its rows begin."""

    tok_ids: Array  # int32 [n_tokens], -1 where there is none
    rows: Array  # int32 [n_tokens], in the dataset
    positions: Array  # int32 [n_tokens], in the row
    begins: Array  # int64 [n_rows + 1]: tokens begins[i] up to begins[i + 1] are of one row

    @staticmethod
    def of(cache: ActivationCache) -> "Text":
        """That of a cache; its activations are not read."""
        columns = (column.int().numpy() for column in cache.tokens(0, cache.n_tokens))
        tok_ids, rows, positions = columns
        changes = np.flatnonzero(np.diff(rows)) + 1
        begins = np.concatenate([[0], changes, [cache.n_tokens]])
        return Text(tok_ids, rows, positions, begins)

    def windows(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """From where up to where the context of each of `tokens` [n] goes: int64 [n] each.

        That is lengths[i, 0] tokens, the token and lengths[i, 1] tokens, as far as they are of its
        row.
        """
        row = np.searchsorted(self.begins, tokens, side="right") - 1
        start = np.maximum(tokens - lengths[:, 0], self.begins[row])
        return start, np.minimum(tokens + lengths[:, 1] + 1, self.begins[row + 1])


class Wanted(NamedTuple):
    """Examples to be put in context."""

    latents: Array  # int64 [n]
    tokens: Array  # int64 [n]
    lengths: Array  # int64 [n, 2]: how many tokens before and after


class Windows(NamedTuple):
    """Contexts of examples, an example an item; `values` one after another."""

    latents: Array  # int64 [n]
    tokens: Array  # int64 [n]: the token that the context is of
    starts: Array  # int64 [n]
    stops: Array  # int64 [n]
    places: Array  # int64 [n + 1]: the values of item i are places[i] up to places[i + 1]
    values: Array  # float32 [places[-1]]: what the latent does on each token of the context


@torch.inference_mode()
def contexts(
    sae: SAE,
    cache: ActivationCache,
    text: Text,
    wanted: Wanted,
    device: torch.device | str = "cpu",
) -> Windows:
    """The contexts of tokens, with the activations of a latent in each: a pass over the cache."""
    latents, tokens, lengths = wanted
    starts, stops = text.windows(tokens, lengths)
    places = np.concatenate([[0], np.cumsum(stops - starts)])
    which = np.repeat(np.arange(len(tokens)), stops - starts)
    every = np.arange(places[-1]) - places[which] + starts[which]
    order = np.argsort(every, kind="stable")
    sorted_tokens, columns = every[order], latents[which[order]]
    found = np.empty(len(every), dtype=np.float32)
    done = begin = 0
    for batch in cache.sequential(BATCH_SIZE, device):
        stop = int(np.searchsorted(sorted_tokens, begin + len(batch.acts)))
        if stop > done:
            acts = strengths(sae, batch.acts)
            at = (
                torch.from_numpy(of).to(device)
                for of in (sorted_tokens[done:stop] - begin, columns[done:stop])
            )
            found[done:stop] = acts[tuple(at)].float().cpu().numpy()
        done, begin = stop, begin + len(batch.acts)
    values = np.empty_like(found)
    values[order] = found
    return Windows(latents, tokens, starts, stops, places, values)
