"""Tokens in their context: windows of a cache's rows, and the activations of a latent in them."""

from typing import NamedTuple

import numpy as np
import torch

from matryoshka.cache_reader import ActivationCache
from matryoshka.top_examples import BATCH_SIZE, strengths
from sae import SAE

Array = np.ndarray


class Text(NamedTuple):
    """All tokens of a cache, and where its rows begin."""

    tok_ids: Array  # int32 [n_tokens], -1 if the cache has no token ids
    rows: Array  # int32 [n_tokens], in the dataset
    positions: Array  # int32 [n_tokens], in the row
    begins: Array  # int64 [n_rows + 1]: tokens begins[i] up to begins[i + 1] are one row

    @staticmethod
    def of(cache: ActivationCache) -> "Text":
        """The text of a cache. Its activations are not read."""
        columns = (column.int().numpy() for column in cache.tokens(0, cache.n_tokens))
        tok_ids, rows, positions = columns
        changes = np.flatnonzero(np.diff(rows)) + 1
        begins = np.concatenate([[0], changes, [cache.n_tokens]])
        return Text(tok_ids, rows, positions, begins)

    def windows(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """The start and the stop of the context of each of `tokens` [n]: int64 [n] each.

        The context of token i has lengths[i, 0] tokens before it and lengths[i, 1] after it, or
        fewer where its row begins or ends.
        """
        row = np.searchsorted(self.begins, tokens, side="right") - 1
        start = np.maximum(tokens - lengths[:, 0], self.begins[row])
        return start, np.minimum(tokens + lengths[:, 1] + 1, self.begins[row + 1])


class Wanted(NamedTuple):
    """Latents and tokens whose contexts are wanted."""

    latents: Array  # int64 [n]
    tokens: Array  # int64 [n]
    lengths: Array  # int64 [n, 2]: how many tokens before and after


class Windows(NamedTuple):
    """Contexts of n examples, with the latents' activations in them one after another."""

    latents: Array  # int64 [n]
    tokens: Array  # int64 [n]: the token in whose context we are
    starts: Array  # int64 [n]: the first token of the context
    stops: Array  # int64 [n]: one past its last token
    places: Array  # int64 [n + 1]: the values of example i are places[i] up to places[i + 1]
    values: Array  # float32 [places[-1]]: the latent's activation on each token of the context


@torch.inference_mode()
def contexts(
    sae: SAE,
    cache: ActivationCache,
    text: Text,
    wanted: Wanted,
    device: torch.device | str = "cpu",
) -> Windows:
    """The wanted contexts, with the activations of the latent in each. Reads the cache once."""
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
                torch.from_numpy(index).to(device)
                for index in (sorted_tokens[done:stop] - begin, columns[done:stop])
            )
            found[done:stop] = acts[tuple(at)].float().cpu().numpy()
        done, begin = stop, begin + len(batch.acts)
    values = np.empty_like(found)
    values[order] = found
    return Windows(latents, tokens, starts, stops, places, values)
