"""The hierarchy of latents: which latents fire together, the forest of parents, the true tree.

A parent belongs to an earlier level than its child, that is, to a shorter prefix. Let n_j be the
number of tokens on which latent j fires, n_pc the number on which both p and c fire, n the number
of all tokens, and a_j the activations times ||d_j||. The measures are

    P(p | c) = n_pc / n_c      how often the parent fires where the child does
    P(c | p) = n_pc / n_p      how often the child fires where the parent does: less often
    excess   = (P(p | c) - n_p / n) / (1 - n_p / n)      1: always; 0: as often as by chance
    directed = cos(a_p, a_c on tokens where c fires) * max a_c / max a_p

The excess corrects P(p | c) for chance: a latent that fires on half of all tokens has a P(p | c) of
about 1/2 with every unrelated latent. The directed measure is how the method's author links latents
in his trees: the masked cosine of "Towards Monosemanticity" between activations, not decoder rows,
in one direction (N. Nabeshima, in a comment on "Matryoshka Sparse Autoencoders", 2024).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.metrics import prefix_lengths
from sae import SAE

THRESHOLD = 0.6  # least excess of a parent; the author uses 0.6 for his directed measure


class Pairs(NamedTuple):
    """Sums over `n_tokens` tokens that tell how latents fire together.

    Activations a_j are multiplied by ||d_j||, so that latents can be compared.
    """

    n_tokens: int
    fired: Tensor  # float64 [n_latents]: n_j
    largest: Tensor  # float64 [n_latents]: max a_j
    both: Tensor  # float64 [n_latents, n_latents]: n_pc
    products: Tensor  # float64 [n_latents, n_latents]: the sum of a_p a_c
    masked: Tensor  # float64 [n_latents, n_latents]: the sum of a_p^2 where c fires, at [p, c]


def pairs_of(acts: Tensor) -> Pairs:
    """The sums for acts [n, n_latents], with dense products, which suits a toy's few latents."""
    acts = acts.double()
    fires = (acts > 0).double()
    return Pairs(
        n_tokens=len(acts),
        fired=fires.sum(0),
        largest=acts.amax(0),
        both=fires.T @ fires,
        products=acts.T @ acts,
        masked=acts.square().T @ fires,
    )


# ----------------------------------------------------------------------------------------- levels


def level_widths(sae: SAE) -> list[int]:
    """The prefix lengths that divide an SAE's latents into levels; the last is n_latents.

    They are those that the SAE was trained at, if its file has them ("widths"). Sampled prefixes
    may end anywhere; then they are 1, 2, 4, ... An SAE trained at one prefix has one level, because
    the order of its latents has no meaning.
    """
    widths = sae.about.get("widths")
    if widths:
        return sorted({*(int(w) for w in widths if 0 < int(w) < sae.n_latents), sae.n_latents})
    if sae.about.get("n_prefixes") == 1:
        return [sae.n_latents]
    return prefix_lengths(sae.n_latents)


def levels_of(widths: Sequence[int]) -> Tensor:
    """Each latent's level, counted from 0: int64 [n_latents]. Latent j has level k if
    widths[k - 1] <= j < widths[k]."""
    latents = torch.arange(widths[-1])
    return torch.bucketize(latents, torch.tensor(widths), right=True)


# ---------------------------------------------------------------------------- parents and children


def parent_given_child(pairs: Pairs) -> Tensor:
    """P(p | c) at [p, c]: float64 [n_latents, n_latents]; 0 if c never fires."""
    return pairs.both / pairs.fired.clamp(min=1)


def excess(pairs: Pairs) -> Tensor:
    """The excess of P(p | c) over chance at [p, c]: float64 [n_latents, n_latents], at most 1; 0 if
    c never fires or p always fires."""
    base = (pairs.fired / pairs.n_tokens)[:, None]  # [n_latents, 1]
    above = (parent_given_child(pairs) - base) / (1 - base).clamp(min=1e-300)
    return torch.where((base < 1) & (pairs.fired > 0), above, 0.0)


def directed(pairs: Pairs) -> Tensor:
    """The author's directed measure at [p, c]: float64 [n_latents, n_latents]; 0 if the two never
    fire together."""
    squares = pairs.masked.diagonal()  # the sum of a_c^2
    cosine = pairs.products / (pairs.masked * squares).sqrt().clamp(min=1e-300)
    ratio = pairs.largest / pairs.largest[:, None].clamp(min=1e-300)
    return torch.where(pairs.both > 0, cosine * ratio, 0.0)


def may_be_parent(pairs: Pairs, level: Tensor) -> Tensor:
    """Whether p has an earlier level than c and fires on more tokens: bool [n_latents, n_latents],
    at [p, c]. If all latents have the same level, only the number of tokens counts."""
    wider = pairs.fired[:, None] > pairs.fired
    return wider & (level[:, None] < level) if bool(level.any()) else wider


def forest(pairs: Pairs, level: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Each latent's parent: int64 [n_latents], -1 if it has none.

    Of the latents that `may_be_parent` and whose excess is at least `threshold`, the parent is the
    one with the largest `overlap`. In a chain of three, the most specific latent therefore gets the
    middle one and not the most general one. level: int64 [n_latents].
    """
    eligible = may_be_parent(pairs, level) & (excess(pairs) >= threshold)
    return best_parent(overlap(pairs), eligible)


def directed_forest(pairs: Pairs, level: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Like `forest`, by the author's measure: the parent has the highest `directed`, which must be
    at least `threshold`."""
    scores = directed(pairs)
    return best_parent(scores, may_be_parent(pairs, level) & (scores >= threshold))


def overlap(pairs: Pairs) -> Tensor:
    """P(p | c) P(c | p), which is the squared cosine between the two latents' firings as vectors of
    0 and 1: float64 [n_latents, n_latents], symmetric."""
    return parent_given_child(pairs) * parent_given_child(pairs).T


def best_parent(scores: Tensor, eligible: Tensor) -> Tensor:
    """For each column, the eligible row with the highest score, the first on a tie: int64
    [n_latents], -1 if no row is eligible."""
    best = torch.where(eligible, scores, -torch.inf).max(0)
    return torch.where(best.values > -torch.inf, best.indices, -1)


def as_json(pairs: Pairs, sae: SAE, threshold: float = THRESHOLD) -> dict[str, Any]:
    """The forest of an SAE as JSON: "threshold", "widths", "n_tokens", and "edges", with an object
    for each latent that has a parent."""
    widths = level_widths(sae)
    parents = forest(pairs, levels_of(widths).to(pairs.fired.device), threshold)
    W_dec = sae.W_dec.detach().to(pairs.fired.device)
    cosines = torch.nn.functional.cosine_similarity(W_dec, W_dec[parents.clamp(min=0)])
    given, above, author = parent_given_child(pairs), excess(pairs), directed(pairs)
    edges = [
        {
            "latent": child,
            "parent": parent,
            "p_parent_given_child": float(given[parent, child]),
            "p_child_given_parent": float(given[child, parent]),
            "excess": float(above[parent, child]),
            "directed": float(author[parent, child]),
            "cosine": float(cosines[child]),
        }
        for child, parent in enumerate(parents.tolist())
        if parent >= 0
    ]
    return {"threshold": threshold, "widths": widths, "n_tokens": pairs.n_tokens, "edges": edges}


# -------------------------------------------------------------------------------- the toy's truth


def stands_for(cosines: Tensor, matched: Tensor, threshold: float) -> Tensor:
    """Each latent's feature: int64 [n_latents], -1 for none. It is the feature that the latent is
    matched to, if the cosine between them is over `threshold`, so that the feature is clean.

    cosines: [n_latents, n_features]; matched: int64 [n_features], of `metrics.match_latents`.
    """
    features = torch.full((len(cosines),), -1)
    for feature, latent in enumerate(matched.tolist()):
        if latent >= 0 and cosines[latent, feature] > threshold:
            features[latent] = feature
    return features


def tree_edges(
    parents: Tensor, features: Tensor, tree_parent: Sequence[int | None]
) -> dict[str, int]:
    """Compares a forest of latents with the true tree: the numbers of edges that are "found",
    "wrong" and "missing".

    An edge of the tree joins a feature to its nearest ancestor that is a feature. (A node that is
    not read out has no direction that a latent could find.) An edge of the forest is found if its
    two latents stand for the two ends of an edge of the tree, and otherwise it is wrong. For
    example, a latent for "the parent without its children" stands for no feature, so that an edge
    to it is wrong. Edges of the tree that are not found are missing.

    parents: int64 [n_latents], from `forest`; features: int64 [n_latents], from `stands_for`;
    tree_parent: `FeatureTree.parent`.
    """
    true = {(p, c) for c, p in enumerate(tree_parent) if p is not None}
    drawn = [
        (int(features[parent]), int(features[child]))
        for child, parent in enumerate(parents.tolist())
        if parent >= 0
    ]
    found = sum(edge in true for edge in drawn)
    return {"found": found, "wrong": len(drawn) - found, "missing": len(true) - found}
