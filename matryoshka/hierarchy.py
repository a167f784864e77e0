"""Which latent is whose parent: how they fire together, a forest, and the toy's true tree.

A parent is of an earlier level than its child: of a shorter prefix. With n_j the tokens on which
latent j fires, n_pc those on which both do, n all tokens, and a_j measured times ||d_j||:

    P(p | c) = n_pc / n_c      how often the parent fires where the child does
    P(c | p) = n_pc / n_p      the other way: rarely, where the parent is the more general
    excess   = (P(p | c) - n_p / n) / (1 - n_p / n)      1: always; 0: as often as chance would
    directed = cos(a_p, a_c on tokens where c fires) * max a_c / max a_p

The excess is P(p | c) less what a latent that fires on half of all tokens has with any other. The
last is how the method's author links latents in his trees: the masked cosine of "Towards
Monosemanticity", of activations and not of decoder rows, in one direction (N. Nabeshima, in a
comment on "Matryoshka Sparse Autoencoders", 2024).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.metrics import prefix_lengths
from sae import SAE

THRESHOLD = 0.6  # of a parent's excess; the author's, of his directed measure


class Pairs(NamedTuple):
    """How latents fire together, over `n_tokens` tokens. Sums over batches add up.

    Activations are times the length of their decoder row, so that latents can be compared.
    """

    n_tokens: int
    fired: Tensor  # float64 [n_latents]: n_j
    largest: Tensor  # float64 [n_latents]: max a_j
    both: Tensor  # float64 [n_latents, n_latents]: n_pc
    products: Tensor  # float64 [n_latents, n_latents]: the sum of a_p a_c
    masked: Tensor  # float64 [n_latents, n_latents]: the sum of a_p^2 where c fires, at [p, c]


def pairs_of(acts: Tensor) -> Pairs:
    """Of acts [n, n_latents], densely: for a toy's latents. Sums are in float64."""
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
    """The prefix lengths that part an SAE's latents into levels, the last of them n_latents.

    Those that it was trained at, where its file has them ("widths"). Sampled prefixes may end
    anywhere: then 1, 2, 4, ... And one level for an SAE trained at one prefix: its latents have no
    order that means anything.
    """
    widths = sae.about.get("widths")
    if widths:
        return sorted({*(int(w) for w in widths if 0 < int(w) < sae.n_latents), sae.n_latents})
    if sae.about.get("n_prefixes") == 1:
        return [sae.n_latents]
    return prefix_lengths(sae.n_latents)


def levels_of(widths: Sequence[int]) -> Tensor:
    """Each latent's level, from 0: int64 [n_latents]. Latent j is of level k where
    widths[k - 1] <= j < widths[k]."""
    latents = torch.arange(widths[-1])
    return torch.bucketize(latents, torch.tensor(widths), right=True)


# ---------------------------------------------------------------------------- parents and children


def parent_given_child(pairs: Pairs) -> Tensor:
    """P(p | c): float64 [n_latents, n_latents] at [p, c], 0 where c never fires."""
    return pairs.both / pairs.fired.clamp(min=1)


def excess(pairs: Pairs) -> Tensor:
    """P(p | c) above chance: float64 [n_latents, n_latents] at [p, c], at most 1; 0 where c never
    fires or p always does."""
    base = (pairs.fired / pairs.n_tokens)[:, None]  # [n_latents, 1]
    above = (parent_given_child(pairs) - base) / (1 - base).clamp(min=1e-300)
    return torch.where((base < 1) & (pairs.fired > 0), above, 0.0)


def directed(pairs: Pairs) -> Tensor:
    """The author's directed measure: float64 [n_latents, n_latents] at [p, c], 0 where the two
    never fire together."""
    squares = pairs.masked.diagonal()  # of a_c, over the tokens where c fires
    cosine = pairs.products / (pairs.masked * squares).sqrt().clamp(min=1e-300)
    ratio = pairs.largest / pairs.largest[:, None].clamp(min=1e-300)
    return torch.where(pairs.both > 0, cosine * ratio, 0.0)


def may_be_parent(pairs: Pairs, level: Tensor) -> Tensor:
    """bool [n_latents, n_latents] at [p, c]: p is of an earlier level, and fires more widely.

    Where all latents are of one level, firing more widely is all that there is.
    """
    wider = pairs.fired[:, None] > pairs.fired
    return wider & (level[:, None] < level) if bool(level.any()) else wider


def forest(pairs: Pairs, level: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Each latent's parent, int64 [n_latents], -1 where it has none.

    Of those that may be its parent and whose excess is at least `threshold`, the one that overlaps
    with it most, by P(p | c) P(c | p): in a chain of three, the middle one and not the widest.
    level: int64 [n_latents].
    """
    eligible = may_be_parent(pairs, level) & (excess(pairs) >= threshold)
    return best_parent(overlap(pairs), eligible)


def directed_forest(pairs: Pairs, level: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """As `forest`, by the author's measure: the parent of the highest `directed` over 0.6."""
    scores = directed(pairs)
    return best_parent(scores, may_be_parent(pairs, level) & (scores >= threshold))


def overlap(pairs: Pairs) -> Tensor:
    """P(p | c) P(c | p), the squared cosine between where the two fire: float64, symmetric."""
    return parent_given_child(pairs) * parent_given_child(pairs).T


def best_parent(scores: Tensor, eligible: Tensor) -> Tensor:
    """Each column's eligible row of the highest score, the first on a tie: int64, -1 for none."""
    best = torch.where(eligible, scores, -torch.inf).max(0)
    return torch.where(best.values > -torch.inf, best.indices, -1)


def as_json(pairs: Pairs, sae: SAE, threshold: float = THRESHOLD) -> dict[str, Any]:
    """The forest of an SAE as JSON has it: "levels", and an object a latent that has a parent."""
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
    """Each latent's feature, int64 [n_latents], -1 for none: the one that it is matched to, where
    the cosine between them is over `threshold`, so that the feature is clean.

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
    """How a forest of latents compares with the true tree: edges "found", "wrong" and "missing".

    An edge of the tree joins a feature to its nearest ancestor that is a feature: a node that is
    not read out has no direction that a latent could find, so it is no end of an edge. An edge of
    the forest is found where its two latents stand for the ends of an edge of the tree, and wrong
    where they stand for anything else or one of them for nothing: a latent of "the parent without
    its children" under its parent is wrong. Edges of the tree that are not found are missing.

    parents: int64 [n_latents], of `forest`; features: int64 [n_latents], of `stands_for`;
    tree_parent: of `FeatureTree.parent`.
    """
    true = {(p, c) for c, p in enumerate(tree_parent) if p is not None}
    drawn = [
        (int(features[parent]), int(features[child]))
        for child, parent in enumerate(parents.tolist())
        if parent >= 0
    ]
    found = sum(edge in true for edge in drawn)
    return {"found": found, "wrong": len(drawn) - found, "missing": len(true) - found}
