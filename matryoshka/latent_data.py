"""What a page or another tool shows of each latent: pure functions of an SAE and its examples."""

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

N_RANDOM = 5  # firings at random
LONG, SHORT = (12, 7), (6, 3)  # tokens before and after: of the strongest, and of the others
N_TOKENS = 5  # most characteristic tokens
N_SIMILAR = 10
N_OUTPUTS, N_OUTPUT_BINS = 10, 40
LATENTS_AT_ONCE = 64

Array = np.ndarray


class OneSAE(NamedTuple):
    """An SAE of a run, with what was collected of it."""

    name: str
    sae: SAE
    sha256: str  # of its file
    examples: Examples
    relations: Relations


def reach_of(sae: SAE) -> Array:
    """The share of the prefixes that contain each latent, as it was trained: float64 [n_latents];
    1 where the SAE's file does not say."""
    widths, n_prefixes = sae.about.get("widths"), sae.about.get("n_prefixes", 1)
    if widths:
        return width_reach(sae.n_latents, widths, sae.about.get("width_weights") or ()).numpy()
    if n_prefixes > 1:
        return expected_reach(sae.n_latents, n_prefixes).numpy()
    return np.ones(sae.n_latents)


# ---------------------------------------------------------------------------------------- examples


def chosen_examples(examples: Examples) -> Iterator[tuple[int, str, int]]:
    """(latent, kind, token) of every example that is shown, by latent.

    Kinds: "top"; "q0" to "q9", the quantiles, lowest first; "random".
    """
    for latent in range(len(examples.fired)):
        tokens = examples.top_tokens[latent]
        yield from ((latent, "top", int(token)) for token in tokens[tokens >= 0])
        for k, part in enumerate(quantile_examples(examples, latent)):
            yield from ((latent, f"q{k}", token) for token, _ in part)
        tokens = examples.sample_tokens[latent, :N_RANDOM]
        yield from ((latent, "random", int(token)) for token in tokens[tokens >= 0])


MAX_EXAMPLES = N_TOP + N_QUANTILES * N_A_QUANTILE + N_RANDOM  # of a latent


class Shown(NamedTuple):
    """The examples of all latents in context; those of latent j are first[j] to first[j + 1]."""

    kinds: list[str]
    windows: Windows
    first: Array  # int64 [n_latents + 1]


def shown_examples(
    one: OneSAE, cache: ActivationCache, text: Text, device: torch.device | str
) -> Shown:
    """Every example that is shown, with activations on its context: a pass over the cache."""
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
    """Up to N_TOKENS token ids that tell a latent from the text at large, the best first.

    With s_t the share of token id t in the activation of the latent's sample, and q_t its share in
    all of the text, they have the largest s_t log(s_t / q_t) above 0: these add up to the relative
    entropy of the one to the other. A token that is n times in the sample counts 1 - 1 / sqrt(n)
    of its share, a standard error less, so that what is there once names no latent; unless every
    token is.
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
    """For each row of `W_dec` the k rows of `others` of the highest cosine, and the cosines.

    int64 and float32 [n_latents, at most k]; is_same: a row is not its own neighbour.
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
    """What latents do to the model's output tokens, an item a latent: [n_latents, ...]."""

    promoted: Array  # int64 [n, N_OUTPUTS] token ids, the most promoted first
    promoted_by: Array  # float32
    suppressed: Array  # int64 [n, N_OUTPUTS], the most suppressed first
    suppressed_by: Array  # float32
    low: Array  # float32 [n]: where the histogram of all of them begins
    width: Array  # float32 [n], of its bins
    counts: Array  # int64 [n, N_OUTPUT_BINS]


@torch.inference_mode()
def output_effects(sae: SAE, model: LanguageModel) -> Outputs:
    """What a decoder direction of length 1 adds to the logits, through the last norm and the head.

    With f(x) the log-probabilities that the model makes of x as its last residual stream, this is
    f(d_j / ||d_j||) - f(0), less its mean over the vocabulary. Without a last norm (TinyModel)
    that is exactly d_j W_head / ||d_j||, centred, in nats an activation of 1; with one, it is the
    logits of the norm's output, whose length the norm sets. The model must have a head.
    """
    directions = F.normalize(sae.W_dec.detach().float(), dim=1)
    parts = []
    zero = _log_probs(model, torch.zeros_like(directions[:1]))
    for start in range(0, len(directions), LATENTS_AT_ONCE):
        effect = _log_probs(model, directions[start : start + LATENTS_AT_ONCE]) - zero
        parts.append(_outputs(effect - effect.mean(1, keepdim=True)))
    return Outputs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _log_probs(model: LanguageModel, x: Tensor) -> Tensor:
    """x [n, d_model] as the last residual stream of rows of one token -> [n, d_vocab]."""
    stream = x[:, None].to(model.device)
    return model.forward_from(stream, model.n_layers)[:, 0].float()


def _outputs(effect: Tensor) -> Outputs:
    """effect: [n, d_vocab]."""
    k = min(N_OUTPUTS, effect.shape[1])
    most, least = effect.topk(k, dim=1), (-effect).topk(k, dim=1)
    low, high = effect.amin(1), effect.amax(1)
    width = ((high - low) / N_OUTPUT_BINS).clamp(min=1e-12)
    bins = ((effect - low[:, None]) / width[:, None]).long().clamp(0, N_OUTPUT_BINS - 1)
    counts = torch.zeros(len(effect), N_OUTPUT_BINS, dtype=torch.int64, device=effect.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins))
    columns = (most.indices, most.values, least.indices, -least.values, low, width, counts)
    return Outputs(*(column.cpu().numpy() for column in columns))
