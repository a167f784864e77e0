"""Absorption without ground truth: latents that fire in place of a concept's own latent.

A concept is a set of token ids. One half of the rows is used to choose a latent for each concept,
its detector, and to find the latents that are more specific than the detector. On the other half we
count how often the detector is silent on a token of the concept while a more specific latent fires.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.cache_reader import ActivationCache, Batch
from sae import SAE, seeded_generator

STREAM_HALVES = 30  # the stream of random numbers that splits the rows into halves
MIN_FIRES = 5  # tokens that a latent must fire on for its precision to be trusted


class Detectors(NamedTuple):
    """For each concept, the latents that are chosen on the first half of the rows."""

    latent: Tensor  # int64 [n_concepts]: the detector
    precision: Tensor  # float64 [n_concepts], of the detector; nan if it never fired
    recall: Tensor  # float64 [n_concepts], of the detector; nan if no token is in the concept
    specific: Tensor  # bool [n_concepts, n_latents]: latents more specific than the detector


def choose_detectors(
    fired: Tensor,
    hits: Tensor,
    n_members: Tensor,
    min_precision: float,
    min_fires: int = MIN_FIRES,
) -> Detectors:
    """Chooses a detector for each concept, and the latents that are more specific than it.

    Let n_C be the number of tokens in concept C, n_j the number on which latent j fires, and h_Cj
    the number for which both is true. As a classifier of "the token is in C", latent j has

        precision_Cj = h_Cj / n_j,   recall_Cj = h_Cj / n_C,   F1_Cj = 2 h_Cj / (n_j + n_C)

    The detector D(C) is the latent with the highest F1, the first of them on a tie. Latent j is
    *more specific* if precision_Cj >= min_precision, n_j >= min_fires, and recall_Cj < recall_CD:
    the tokens that it fires on are in the concept, but they are fewer of the concept's tokens.

    fired: [n_latents], n_j; hits: [n_concepts, n_latents], h_Cj; n_members: [n_concepts], n_C.
    """
    fired, hits, n_members = fired.double(), hits.double(), n_members.double()
    precision = hits / fired  # nan where a latent never fired
    f1 = 2 * hits / (fired + n_members[:, None]).clamp(min=1)
    latent = f1.max(1, keepdim=True).indices  # [n_concepts, 1]
    specific = (precision >= min_precision) & (fired >= min_fires) & (hits < hits.gather(1, latent))
    return Detectors(
        latent[:, 0],
        precision.gather(1, latent)[:, 0],
        (hits.gather(1, latent) / n_members[:, None])[:, 0],
        specific,
    )


def count_absorbed(
    fires: Tensor, is_member: Tensor, detectors: Detectors
) -> tuple[Tensor, Tensor, Tensor]:
    """How many of a concept's tokens its detector misses, and how many of those are absorbed.

    Token i of concept C is *missed* if the detector is silent. It is *absorbed* if, in addition, a
    more specific latent fires:

        miss_C       = #{i in C : a_iD = 0} / n_C
        absorption_C = #{i in C : a_iD = 0 and a_ij > 0 for some j specific to C} / n_C

    A high absorption means that the concept is spread over latents for its parts. There may be a
    general latent with holes; or there is none, and the "detector" is only the largest part. The
    detector's recall and the miss rate tell these apart. A latent that fires on everything is not a
    more specific one, because its precision is low.

    fires: bool [n, n_latents]; is_member: bool [n_concepts, n]. Returns the numbers of tokens, of
    missed and of absorbed ones, int64 [n_concepts] each, which can be summed over batches.
    """
    silent = ~fires[:, detectors.latent].T  # [n_concepts, n]
    missed = is_member & silent
    instead = detectors.specific.float() @ fires.float().T > 0  # [n_concepts, n]
    return is_member.sum(1), missed.sum(1), (missed & instead).sum(1)


def halves(n_rows: int, seed: int) -> Tensor:
    """Which rows are in the first half: bool [n_rows]; n_rows // 2 of them, drawn by `seed`."""
    order = torch.randperm(n_rows, generator=seeded_generator(seed, STREAM_HALVES))
    first = torch.zeros(n_rows, dtype=torch.bool)
    first[order[: n_rows // 2]] = True
    return first


class ConceptCounts:
    """How often each latent of an SAE fires on the first half of the rows: overall, and on tokens
    of each concept.

    members: bool [n_concepts, d_vocab], the token ids that belong to each concept; first_half:
    bool [n_rows].
    """

    def __init__(self, n_latents: int, members: Tensor, first_half: Tensor):
        """The counts are on the device of `members`, and `first_half` must be there, too."""
        self.members, self.first_half = members, first_half
        self.hits = members.new_zeros(len(members), n_latents, dtype=torch.float64)  # on members
        self.fired = members.new_zeros(n_latents, dtype=torch.int64)
        self.n_members = members.new_zeros(len(members), dtype=torch.int64)

    def add(self, fires: Tensor, batch: Batch) -> None:
        """Counts where latents fire. fires: bool [n, n_latents], on the activations of `batch`."""
        chosen = self.first_half[batch.rows]  # [n]
        fires, is_member = fires[chosen], self.members[:, batch.tok_ids[chosen]]
        self.fired += fires.sum(0)
        self.hits += is_member.float() @ fires.float()  # counts below 2^24: exact
        self.n_members += is_member.sum(1)


@torch.inference_mode()
def absorption(
    counted: Sequence[tuple[SAE, ConceptCounts]],
    cache: ActivationCache,
    concepts: Sequence[str],
    min_precision: float,
    batch_size: int,
) -> list[list[dict[str, Any]]]:
    """For each SAE and each concept, the absorption on the second half of the rows.

    counted: the SAEs with their counts on the first half, which choose the detectors; concepts:
    their names; batch_size: must be the one that the counts were made with, so that activations are
    the same bit for bit. Scores are None for a concept without tokens in one of the halves.
    """
    if not concepts:
        return [[] for _ in counted]
    chosen = [
        choose_detectors(first.fired, first.hits, first.n_members, min_precision)
        for _, first in counted
    ]
    counts = [torch.zeros(3, len(concepts), dtype=torch.int64) for _ in counted]
    for batch in cache.sequential(batch_size, counted[0][0].W_dec.device):
        for (sae, first), detectors, count in zip(counted, chosen, counts, strict=True):
            second = ~first.first_half[batch.rows]
            fires = sae.encode(batch.acts)[second] > 0
            is_member = first.members[:, batch.tok_ids[second]]
            count += torch.stack(count_absorbed(fires, is_member, detectors)).cpu()
    return [
        [
            concept_result(name, i, detectors, int(first.n_members[i]), count[:, i].tolist())
            for i, name in enumerate(concepts)
        ]
        for (_, first), detectors, count in zip(counted, chosen, counts, strict=True)
    ]


def concept_result(
    name: str, i: int, detectors: Detectors, n_chosen_on: int, counts: Sequence[int]
) -> dict[str, Any]:
    """The entry of concept i in evaluation.json. counts: what `count_absorbed` returns for it."""
    n, missed, absorbed = counts
    has_detector = bool(detectors.precision[i] > 0)
    is_known = n > 0 and has_detector
    return {
        "concept": name,
        "tokens_chosen_on": n_chosen_on,
        "tokens": n,
        "detector": int(detectors.latent[i]) if has_detector else None,
        "precision": float(detectors.precision[i]) if has_detector else None,
        "recall": float(detectors.recall[i]) if has_detector else None,
        "specific_latents": int(detectors.specific[i].sum()),
        "miss_rate": missed / n if is_known else None,
        "absorption": absorbed / n if is_known else None,
    }


def mean_absorption(concepts: Sequence[dict[str, Any]]) -> float | None:
    """The unweighted mean over the concepts that have an absorption; None if none has."""
    rates = [concept["absorption"] for concept in concepts if concept["absorption"] is not None]
    return float(np.mean(rates)) if rates else None
