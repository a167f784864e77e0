"""The data that a page or another tool shows about each latent, computed by pure functions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka.cache_reader import ActivationCache
from matryoshka.contexts import Text, Wanted, Windows, contexts
from matryoshka.example_files import Relations
from matryoshka.language_models import LanguageModel
from matryoshka.prefix_draws import expected_reach, width_reach
from matryoshka.top_examples import N_A_QUANTILE, N_QUANTILES, N_TOP, Examples, quantile_examples
from sae import SAE

N_RANDOM = 5  # random firings that are shown
LONG, SHORT = (12, 7), (6, 3)  # tokens shown before and after: the strongest, and other examples
N_TOKENS = 5  # most characteristic tokens that are shown
N_SIMILAR = 10
N_OUTPUTS, N_OUTPUT_BINS = 10, 40
LATENTS_AT_ONCE = 64

Array = np.ndarray


class OneSAE(NamedTuple):
    """An SAE of a run, with what was collected about its latents."""

    name: str
    sae: SAE
    sha256: str  # of its file
    examples: Examples
    relations: Relations


def reach_of(sae: SAE) -> Array:
    """The expected share of the training prefixes that contain each latent: float64 [n_latents].

    1 for each if the SAE's file does not say what its prefixes were.
    """
    widths, n_prefixes = sae.about.get("widths"), sae.about.get("n_prefixes", 1)
    if widths:
        return width_reach(sae.n_latents, widths, sae.about.get("width_weights") or ()).numpy()
    if n_prefixes > 1:
        return expected_reach(sae.n_latents, n_prefixes).numpy()
    return np.ones(sae.n_latents)


# ---------------------------------------------------------------------------------------- examples


def chosen_examples(examples: Examples) -> Iterator[tuple[int, str, int]]:
    """Yields (latent, kind, token) for every example that is shown, latent by latent.

    Kinds are "top"; "q0" to "q9", from the lowest quantile to the highest; and "random".
    """
    for latent in range(len(examples.fired)):
        tokens = examples.top_tokens[latent]
        yield from ((latent, "top", int(token)) for token in tokens[tokens >= 0])
        for k, part in enumerate(quantile_examples(examples, latent)):
            yield from ((latent, f"q{k}", token) for token, _ in part)
        tokens = examples.sample_tokens[latent, :N_RANDOM]
        yield from ((latent, "random", int(token)) for token in tokens[tokens >= 0])


MAX_EXAMPLES = N_TOP + N_QUANTILES * N_A_QUANTILE + N_RANDOM  # examples of one latent


class Shown(NamedTuple):
    """The examples of all latents in context; latent j has first[j] to first[j + 1] - 1."""

    kinds: list[str]
    windows: Windows
    first: Array  # int64 [n_latents + 1]


def shown_examples(
    one: OneSAE, cache: ActivationCache, text: Text, device: torch.device | str
) -> Shown:
    """All examples that are shown, with activations on their contexts; reads the whole cache."""
    chosen = list(chosen_examples(one.examples))
    latents = np.array([latent for latent, _, _ in chosen], dtype=np.int64)
    kinds = [kind for _, kind, _ in chosen]
    lengths = np.array([LONG if kind == "top" else SHORT for kind in kinds]).reshape(-1, 2)
    tokens = np.array([token for _, _, token in chosen], dtype=np.int64)
    windows = contexts(one.sae, cache, text, Wanted(latents, tokens, lengths), device)
    first = np.searchsorted(latents, np.arange(one.sae.n_latents + 1))
    return Shown(kinds, windows, first)


# --------------------------------------------------------------------- what names a latent: tokens


def characteristic_tokens(examples: Examples, text: Text, latent: int) -> list[int]:
    """Up to N_TOKENS token ids that distinguish a latent from the rest of the text, best first.

    Let s_t be the share of token id t in the summed activation of the latent's sample, and q_t its
    share in the whole text. The ids with the largest s_t log(s_t / q_t) > 0 are returned; summed
    over t, this is the relative entropy of s to q. If t occurs n times in the sample, s_t is
    multiplied by 1 - 1 / sqrt(n), which lowers it by about a standard error; so a token that occurs
    once is not returned, unless every token of the sample occurs once.
    """
    tokens, values = examples.sample_tokens[latent], examples.sample_values[latent]
    ids = text.tok_ids[tokens[tokens >= 0]]
    if not len(ids) or ids.min() < 0:
        return []
    unique, where, times = np.unique(ids, return_inverse=True, return_counts=True)
    share = np.bincount(where, values[tokens >= 0])
    share = share / share.sum() * (1 - (times.max() > 1) / np.sqrt(times)).clip(1e-300)
    of_text = examples.token_counts[unique] / examples.token_counts.sum()
    scores = share * np.log(share / of_text)
    best = np.argsort(-scores, kind="stable")[:N_TOKENS]
    return [int(unique[i]) for i in best if scores[i] > 0]


# ------------------------------------------------------------------------------------- directions


def similar_latents(W_dec: Tensor, others: Tensor, k: int, is_same: bool) -> tuple[Array, Array]:
    """For each row of `W_dec`, the k rows of `others` with the highest cosine, and the cosines.

    Returns int64 and float32 [n_latents, at most k]. is_same: `others` are the same rows, and a row
    is not its own neighbour.
    """
    unit, of_others = F.normalize(W_dec.float(), dim=1), F.normalize(others.float(), dim=1)
    k = min(k, len(others) - is_same)
    found, cosines = [], []
    for start in range(0, len(unit), 1024):
        part = unit[start : start + 1024] @ of_others.T
        if is_same:
            part.diagonal(start).fill_(-2.0)
        best = part.topk(k, dim=1)
        found.append(best.indices.cpu().numpy())
        cosines.append(best.values.cpu().numpy())
    return np.concatenate(found), np.concatenate(cosines)


class Outputs(NamedTuple):
    """The effects of n latents on the model's output tokens."""

    promoted: Array  # int64 [n, N_OUTPUTS] token ids, the most promoted first
    promoted_by: Array  # float32 [n, N_OUTPUTS]
    suppressed: Array  # int64 [n, N_OUTPUTS] token ids, the most suppressed first
    suppressed_by: Array  # float32 [n, N_OUTPUTS]
    low: Array  # float32 [n]: where the histogram over the whole vocabulary begins
    width: Array  # float32 [n]: the width of its bins
    counts: Array  # int64 [n, N_OUTPUT_BINS]


@torch.inference_mode()
def output_effects(sae: SAE, model: LanguageModel) -> Outputs:
    """What a decoder direction of length 1 adds to the logits, through the last norm and the head.

    Let f(x) be the log-probabilities of the model if its last residual stream is x. The effect is
    f(d_j / ||d_j||) - f(0), minus its mean over the vocabulary. For a model without a last norm
    (TinyModel) this is exactly d_j W_head / ||d_j||, centred, in nats for each unit of length. With
    a last norm, it is the logits of the normed direction, whose length the norm sets. The model
    must have a head.
    """
    directions = F.normalize(sae.W_dec.detach().float(), dim=1)
    parts = []
    zero = _log_probs(model, torch.zeros_like(directions[:1]))
    for start in range(0, len(directions), LATENTS_AT_ONCE):
        effect = _log_probs(model, directions[start : start + LATENTS_AT_ONCE]) - zero
        parts.append(_outputs(effect - effect.mean(1, keepdim=True)))
    return Outputs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _log_probs(model: LanguageModel, x: Tensor) -> Tensor:
    """Log-probabilities [n, d_vocab] if x [n, d_model] is the last residual stream of n rows."""
    stream = x[:, None].to(model.device)
    return model.forward_from(stream, model.n_layers)[:, 0].float()


def _outputs(effect: Tensor) -> Outputs:
    """The largest and smallest effects, and a histogram of all. effect: [n, d_vocab]."""
    k = min(N_OUTPUTS, effect.shape[1])
    most, least = effect.topk(k, dim=1), (-effect).topk(k, dim=1)
    low, high = effect.amin(1), effect.amax(1)
    width = ((high - low) / N_OUTPUT_BINS).clamp(min=1e-12)
    bins = ((effect - low[:, None]) / width[:, None]).long().clamp(0, N_OUTPUT_BINS - 1)
    counts = torch.zeros(len(effect), N_OUTPUT_BINS, dtype=torch.int64, device=effect.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins))
    columns = (most.indices, most.values, least.indices, -least.values, low, width, counts)
    return Outputs(*(column.cpu().numpy() for column in columns))
