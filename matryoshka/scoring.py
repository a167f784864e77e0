"""Every metric, as a pure function, and a command that scores the SAEs of a TinyStories run.

    python cache_activations.py --split validation --out cache/validation
    python evaluate.py --run runs/tinystories --cache cache/validation

The pure functions come first; leading dimensions `...` are independent SAEs, scored together.
Below them is the language-model half: what streams over a cache of tokens not trained on, and what
splices reconstructions into the model. Statistics are summed in float64.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka import cache as cache_activations
from matryoshka.cache import PAD, ActivationCache
from matryoshka.command_line import (
    main_guard,
    parse,
    pick_device,
    require_not_negative,
    require_positive,
    setting,
    table,
)
from matryoshka.environment import environment
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_json
from matryoshka.tiny_model import TinyModel
from sae import SAE, seeded_generator


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """The fraction of variance unexplained, against the variance of the same samples.

        FVU = sum_i ||x_i - x_hat_i||^2 / sum_i ||x_i - mean(x)||^2

    x: [..., n, d]; x_hat: [..., n, d], in the units of x. Either may lack leading dimensions, and
    be of any float format. (Sequences [batch, seq, d] would be `batch` separate answers: flatten
    them to [batch * seq, d].)
    Returns float64 [...]; 0 is perfect, 1 is as good as the mean. Where the samples are all the
    same there is no variance and FVU is not defined: inf is returned, or nan if they are also
    reconstructed, or there are none. Raises `ValueError` where n or d differ, or there is no n.
    """
    if x.shape[-2:] != x_hat.shape[-2:] or x.dim() < 2:
        raise ValueError(f"x is {list(x.shape)}, x_hat {list(x_hat.shape)}: [n, d] must be equal")
    x = x.double()
    centred = x - x[..., :1, :]  # exactly 0 where all are the same, which x - mean is not
    centred = centred - centred.mean(-2, True)
    return _sum_of_squares(x - x_hat) / _sum_of_squares(centred)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Over the last two dimensions, squared and summed in float64."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64).square()


def l0(acts: Tensor) -> Tensor:
    """How many latents fire on a sample, on average: mean_i #{j : acts_ij > 0}.

    acts: [..., n, n_latents], of any format. Returns float64 [...], in latents a sample.
    """
    return (acts > 0).sum((-2, -1)).double() / acts.shape[-2]


def dead_share(acts: Tensor) -> Tensor:
    """The share of latents that never fire on these samples: mean_j [max_i acts_ij <= 0].

    acts: [..., n, n_latents]. Returns float64 [...], within [0, 1].
    """
    return 1 - (acts > 0).any(-2).double().mean(-1)


def decoder_cosines(W_dec: Tensor, directions: Tensor) -> Tensor:
    """How well each latent's direction points along each feature's.

        cosine_jf = W_dec_j . directions_f / (||W_dec_j|| ||directions_f||), 0 where a norm is 0

    W_dec: [..., n_latents, d]; directions: [..., n_features, d]. (An encoder's cosines: pass
    W_enc transposed.) Returns float64 [..., n_latents, n_features], within [-1, 1] but for
    rounding. Raises `ValueError` where d differs.
    """
    if W_dec.shape[-1] != directions.shape[-1]:
        raise ValueError(
            f"W_dec is {list(W_dec.shape)}, directions {list(directions.shape)}: "
            "their last dimension must be equal"
        )
    return _unit_rows(W_dec) @ _unit_rows(directions).mT


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1, in float64; rows of zeros stay so. However small: no underflow."""
    rows = rows.double()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def best_cosine(cosines: Tensor) -> Tensor:
    """Each feature's highest cosine with any latent: max_j cosine_jf.

    cosines: [..., n_latents, n_features], of `decoder_cosines`. Returns [..., n_features].
    """
    return cosines.amax(-2)


def clean_features(best: Tensor, threshold: float = 0.9) -> Tensor:
    """How many features some latent points along: #{f : best_f > threshold}.

    best: [..., n_features], of `best_cosine`. Returns int64 [...]. The write-up's threshold is 0.9.
    """
    return (best > threshold).sum(-1)


def match_latents(cosines: Tensor) -> Tensor:
    """Each feature's latent, under the one-to-one matching of the highest total cosine.

        argmax over injective m of sum_f cosine_{m(f), f}    (the Hungarian method, on the CPU)

    cosines: [..., n_latents, n_features]. Returns int64 [..., n_features] on the device of
    `cosines`; with more features than latents, n_features - n_latents features have none: -1.
    Raises `ValueError` where a cosine is nan or infinite.
    """
    from scipy.optimize import linear_sum_assignment  # only here: most of a second

    *leading, n_latents, n_features = cosines.shape
    flat = cosines.detach().double().cpu().reshape(-1, n_latents, n_features)
    matched = torch.full((len(flat), n_features), -1)
    for row, one in zip(matched, flat, strict=True):
        latents, features = linear_sum_assignment(one.numpy(), maximize=True)
        row[torch.from_numpy(features)] = torch.from_numpy(latents)
    return matched.reshape(*leading, n_features).to(cosines.device)


def absorption_rate(
    acts: Tensor, features: Tensor, parent_of: Sequence[int | None], matched: Tensor
) -> Tensor:
    """How often a child feature is active while its parent's latent stays silent.

        rate_f = #{i : features_if > 0 and acts_{i, m(p(f))} <= 0} / #{i : features_if > 0}

    with p(f) the parent of f and m its matched latent. The parent is active on all of these
    samples, so a latent for it should fire on each: where it does not, the child's has absorbed
    it.

    acts: [..., n, n_latents]; features: [n, n_features], or [..., n, n_features] with the leading
    dimensions of `acts`, the true activations of the same samples; parent_of: per feature its
    parent's index or None, as `FeatureTree.parent`; matched: int64 [..., n_features], of
    `match_latents`, -1 for no latent.
    Returns float64 [..., n_features], within [0, 1]; nan where f has no parent, the parent has no
    matched latent, or f was never active. Raises `ValueError` where the numbers of samples or of
    features differ.
    """
    n_features = len(parent_of)
    if acts.shape[-2] != features.shape[-2]:
        raise ValueError(f"{acts.shape[-2]} samples of acts, {features.shape[-2]} of features")
    if not n_features == features.shape[-1] == matched.shape[-1]:
        raise ValueError(
            f"parent_of has {n_features} features, features {features.shape[-1]}, "
            f"matched {matched.shape[-1]}"
        )
    rates = torch.full(
        (*acts.shape[:-2], n_features), torch.nan, dtype=torch.float64, device=acts.device
    )
    for child, parent in enumerate(parent_of):
        if parent is None:
            continue
        latent = matched[..., parent].expand(acts.shape[:-2])  # [...]
        column = latent.clamp(min=0)[..., None, None].expand(*acts.shape[:-1], 1)
        silent = acts.gather(-1, column)[..., 0] <= 0  # [..., n]
        active = features[..., child] > 0  # [..., n]
        rate = (active & silent).sum(-1).double() / active.sum(-1)  # 0 / 0 is nan
        rates[..., child] = torch.where(latent >= 0, rate, torch.nan)
    return rates


# ------------------------------------------------------------- a saved SAE on held-out activations

NAMES = ("matryoshka", "vanilla")  # NAME.safetensors in a run's folder
STREAM_HALVES = 30  # of random numbers: which rows choose absorption's latents
BATCH = 4096  # activations scored at once
ROWS_AT_ONCE = 16  # rows of a language-model pass: 16 x 128 x 10,000 log-probabilities are 82 MB
NOTHING_TO_EXPLAIN = 1e-12  # of the mean square: float32 arithmetic rounds as much
MATTERS = 0.1  # by how much FVU without outliers must differ, as a share, to be named
OUTLIER = 10.0  # times the median norm: a token as many times as heavy as OUTLIER^2 others
MIN_FIRES = 5  # of a latent whose precision is to be believed
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def prefix_lengths(n_latents: int) -> list[int]:
    """1, 2, 4, ... below n_latents, and n_latents."""
    return [2**k for k in range((n_latents - 1).bit_length())] + [n_latents]


def prefix_errors(sae: SAE, x: Tensor, acts: Tensor, prefixes: Sequence[int]) -> Tensor:
    """What is left when only the first m latents reconstruct: ||x_i - x_hat_i(m)||^2.

    x: [n, d_model]; acts: [n, n_latents], of the latents as saved: in order. prefixes: rising.
    Each latent is decoded once: what a prefix adds is taken off what the one before it left.
    Returns float64 [n_prefixes, n], in the squared units of x.
    """
    left = x - sae.decode(acts, 0)  # [n, d_model]
    errors, done = [], 0
    for prefix in prefixes:
        left = left - acts[:, done:prefix] @ sae.W_dec[done:prefix] / sae.scale
        errors.append(_squared_norms(left))
        done = prefix
    return torch.stack(errors)


def _squared_norms(x: Tensor) -> Tensor:
    """Of the rows of x [n, d], in float64: [n]."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()


def highest_cosines(W_dec: Tensor, chunk: int = 1024) -> Tensor:
    """How alike decoder directions are: each latent's highest cosine to another latent.

        max over k != j of  W_dec_j . W_dec_k / (||W_dec_j|| ||W_dec_k||)

    W_dec: [n_latents, d_model], n_latents at least 2. Returns float64 [n_latents].
    """
    unit = _unit_rows(W_dec)
    best = []
    for start in range(0, len(unit), chunk):
        cosines = unit[start : start + chunk] @ unit.T  # [chunk, n_latents]
        cosines.diagonal(start).fill_(-torch.inf)  # not with itself
        best.append(cosines.amax(1))
    return torch.cat(best)


class Moments:
    """Number, mean and variance of streamed activations, in float64.

    Sums are about the mean of the first batch: about 0, the variance of activations far from it
    would be a small difference of large sums.
    """

    n = 0

    def add(self, x: Tensor) -> None:
        """x: [n, d], of any float format."""
        x = x.double()
        if self.n == 0 and len(x):
            self.about = x.mean(0)
            self.sum, self.squares = torch.zeros_like(self.about), x.new_zeros(())
        if len(x):
            self.n += len(x)
            self.sum += (x - self.about).sum(0)
            self.squares += _sum_of_squares(x - self.about)

    @property
    def mean(self) -> Tensor:
        """float64 [d]. There must be activations."""
        return self.about + self.sum / self.n

    @property
    def variance(self) -> float:
        """sum_i ||x_i - mean||^2; 0 where there are no activations."""
        return float(self.squares - self.sum.square().sum() / self.n) if self.n else 0.0

    @property
    def is_constant(self) -> bool:
        """Whether float32 could hardly tell the activations apart: then FVU is not defined."""
        if self.n == 0:
            return True
        total = self.variance + self.n * float(self.mean.square().sum())
        return not self.variance > NOTHING_TO_EXPLAIN * total


def norms_of(cache: ActivationCache, device: torch.device) -> Tensor:
    """The activations' norms, float64 [n_tokens]. Raises `UserError` where one is not finite."""
    norms = [_squared_norms(b.acts).sqrt().cpu() for b in cache.sequential(BATCH, device)]
    found = torch.cat(norms)
    if not found.isfinite().all():
        at = int((~found.isfinite()).nonzero()[0])
        raise UserError(f"{cache.folder}: activation {at} is not finite; cache again")
    return found


def outliers_among(norms: Tensor) -> Tensor:
    """Which of the norms [n] are over OUTLIER times their median: bool [n]."""
    median = float(np.median(norms.numpy()))
    return norms > OUTLIER * median if median > 0 else torch.zeros_like(norms, dtype=torch.bool)


def norm_spread(norms: Tensor) -> dict[str, Any]:
    """What of the norms [n] tells whether a few tokens decide a sum of squares.

    Their median, in the data's units; the 99.9th percentile and the largest over that, None where
    it is 0; how many are `outliers_among` them.
    """
    median, high, largest = np.quantile(norms.numpy(), [0.5, 0.999, 1.0]).tolist()
    return {
        "median": median,
        "p99_9_over_median": high / median if median else None,
        "max_over_median": largest / median if median else None,
        "outliers": int(outliers_among(norms).sum()),
    }


class Statistics:
    """Sums over activations of one SAE on them.

    `members`: bool [n_concepts, d_vocab], which token ids belong to a concept. `first_half`: bool
    [n_rows], the rows on which absorption's latents are chosen.
    """

    def __init__(self, sae: SAE, members: Tensor, first_half: Tensor):
        device = sae.W_dec.device
        self.sae, self.prefixes = sae, prefix_lengths(sae.n_latents)
        self.members, self.first_half = members.to(device), first_half.to(device)
        self.n = 0  # activations
        self.errors = torch.zeros(len(self.prefixes), dtype=torch.float64, device=device)
        self.inlier_error = torch.zeros((), dtype=torch.float64, device=device)
        self.fired = torch.zeros(sae.n_latents, dtype=torch.int64, device=device)
        # on the first half of the rows:
        self.half_fired = torch.zeros_like(self.fired)
        self.half_hits = torch.zeros(
            len(members), sae.n_latents, dtype=torch.float64, device=device
        )  # on a concept's tokens
        self.half_members = torch.zeros(len(members), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def add(self, batch: cache_activations.Batch, is_outlier: Tensor) -> None:
        """is_outlier: bool [n], of the activations of `batch`."""
        x = batch.acts  # [n, d_model]
        acts = self.sae.encode(x)  # [n, n_latents]
        self.n += len(x)
        errors = prefix_errors(self.sae, x, acts, self.prefixes)
        self.errors += errors.sum(1)
        self.inlier_error += errors[-1, ~is_outlier].sum()
        fires = acts > 0
        self.fired += fires.sum(0)
        chosen = self.first_half[batch.rows]
        fires, is_member = fires[chosen], self.members[:, batch.tok_ids[chosen]]
        self.half_fired += fires.sum(0)
        self.half_hits += is_member.float() @ fires.float()  # counts below 2^24: exact
        self.half_members += is_member.sum(1)

    def summary(self, every: Moments, inliers: Moments) -> dict[str, Any]:
        """FVU, L0, dead share, FVU by prefix, and on how many tokens each latent fired.

        `every`, `inliers`: of the activations, and of those that are no outliers.
        """
        fvus = (self.errors / every.variance).tolist()
        alone = None if inliers.is_constant else float(self.inlier_error) / inliers.variance
        return {
            "fvu": fvus[-1],
            "fvu_without_outliers": alone,
            "l0": int(self.fired.sum()) / self.n,
            "dead_share": float((self.fired == 0).double().mean()),
            "fvu_by_prefix": {"prefix": self.prefixes, "fvu": fvus},
            "fired": self.fired.tolist(),
        }


# ------------------------------------------------------------------------------------- absorption


class Detectors(NamedTuple):
    """What is chosen on the first half of the data, a concept each."""

    latent: Tensor  # int64 [n_concepts]: the detector
    precision: Tensor  # float64 [n_concepts], of the detector, nan if it never fired
    recall: Tensor  # float64 [n_concepts], of the detector, nan if there were no tokens
    specific: Tensor  # bool [n_concepts, n_latents]: latents that may fire in its stead


def choose_detectors(
    fired: Tensor,
    hits: Tensor,
    n_members: Tensor,
    min_precision: float,
    min_fires: int = MIN_FIRES,
) -> Detectors:
    """A detector for each concept, and the latents more specific than it, from counts on tokens.

    With n_C the tokens in concept C, n_j the tokens on which latent j fires and h_Cj those of
    them in C, j as a classifier "fires iff the token is in C" has

        precision_Cj = h_Cj / n_j,   recall_Cj = h_Cj / n_C,   F1_Cj = 2 h_Cj / (n_j + n_C)

    The detector D(C) is the latent of the highest F1, the first of them on a tie. Latent j is
    *more specific* where precision_Cj >= min_precision, n_j >= min_fires, and
    recall_Cj < recall_CD: when it fires the token is in the concept, but it covers less of it.

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
    """On the other half: how many of a concept's tokens its detector misses, and of those how
    many are absorbed.

    Token i of concept C is *missed* where the detector is silent, and *absorbed* where besides a
    more specific latent fires:

        miss_C       = #{i in C : a_iD = 0} / n_C
        absorption_C = #{i in C : a_iD = 0 and a_ij > 0 for some j specific to C} / n_C

    A high rate says that the concept is scattered over latents for its parts; whether a general
    latent has holes in it, or there is none and the "detector" is only the largest part, shows in
    the detector's recall, and in the miss rate. That a latent fires at all on those tokens is not
    counted: one that fires on everything has a low precision.

    fires: bool [n, n_latents]; is_member: bool [n_concepts, n].
    Returns int64 [n_concepts] each: tokens, missed, absorbed. They add up over batches.
    """
    silent = ~fires[:, detectors.latent].T  # [n_concepts, n]
    missed = is_member & silent
    instead = detectors.specific.float() @ fires.float().T > 0  # [n_concepts, n]
    return is_member.sum(1), missed.sum(1), (missed & instead).sum(1)


def halves(n_rows: int, seed: int) -> Tensor:
    """Which rows are the first half: bool [n_rows], drawn by `seed`, n_rows // 2 of them."""
    first = torch.zeros(n_rows, dtype=torch.bool)
    first[
        torch.randperm(n_rows, generator=seeded_generator(seed, STREAM_HALVES))[: n_rows // 2]
    ] = 1
    return first


@torch.inference_mode()
def absorption(
    statistics: Sequence[Statistics],
    cache: ActivationCache,
    names: Sequence[str],
    min_precision: float,
) -> list[list[dict[str, Any]]]:
    """An SAE's list of what `count_absorbed` finds on the second half of the rows, a concept each.

    Detectors are chosen by the `statistics` of the first half. A concept that has no tokens in
    one of the halves has None for what cannot be said.
    """
    device = statistics[0].members.device
    chosen = [
        choose_detectors(s.half_fired, s.half_hits, s.half_members, min_precision)
        for s in statistics
    ]
    counts = [torch.zeros(3, len(names), dtype=torch.int64, device=device) for _ in statistics]
    for batch in cache.sequential(BATCH, device):
        other = ~statistics[0].first_half[batch.rows]
        is_member = statistics[0].members[:, batch.tok_ids[other]]
        for s, detectors, count in zip(statistics, chosen, counts, strict=True):
            fires = s.sae.encode(batch.acts)[other] > 0  # encoded as before: alike to the bit
            count += torch.stack(count_absorbed(fires, is_member, detectors))
    return [
        [
            concept_result(name, i, d, int(s.half_members[i]), count[:, i].tolist())
            for i, name in enumerate(names)
        ]
        for s, d, count in zip(statistics, chosen, counts, strict=True)
    ]


def concept_result(
    name: str, i: int, detectors: Detectors, n_chosen_on: int, counts: Sequence[int]
) -> dict[str, Any]:
    """Concept i in words: `counts` are those of `count_absorbed`."""
    n, missed, absorbed = counts
    fired = bool(detectors.precision[i] > 0)  # there is a detector
    known = n > 0 and fired
    return {
        "concept": name,
        "tokens_chosen_on": n_chosen_on,
        "tokens": n,
        "detector": int(detectors.latent[i]) if fired else None,
        "precision": float(detectors.precision[i]) if fired else None,
        "recall": float(detectors.recall[i]) if fired else None,
        "specific_latents": int(detectors.specific[i].sum()),
        "miss_rate": missed / n if known else None,
        "absorption": absorbed / n if known else None,
    }


# --------------------------------------------------------------------------------------- concepts


def load_concepts(path: Path) -> dict[str, list[int]]:
    """Each concept's token ids. Raises `UserError` where the file is not as concepts.json is."""
    try:
        concepts = json.loads(path.read_text())["concepts"]
        ids = {name: list(concept["ids"]) for name, concept in concepts.items()}
    except OSError as error:
        raise UserError(f"--concepts {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'--concepts {path}: expected {{"concepts": {{NAME: {{"ids": [...]}}}}}} '
            f"({type(error).__name__}: {error})"
        ) from None
    for name, of in ids.items():
        if not of or not all(type(i) is int for i in of):
            raise UserError(f"--concepts {path}: {name!r} needs a list of token ids, found {of}")
    if not ids:
        raise UserError(f"--concepts {path} holds no concepts")
    return ids


def membership(concepts: Mapping[str, Sequence[int]], d_vocab: int) -> Tensor:
    """Which token ids are in which concept: bool [n_concepts, d_vocab]. Raises `UserError`."""
    members = torch.zeros(len(concepts), d_vocab, dtype=torch.bool)
    for row, (name, ids) in zip(members, concepts.items(), strict=True):
        for i in ids:
            if not 0 <= i < d_vocab:
                raise UserError(
                    f"concept {name!r}: token id {i} is out of the vocabulary, 0 to {d_vocab - 1}"
                )
        row[list(ids)] = True
    return members


def write_concept_ids(path: Path, gpt2_vocabulary: Path, tiny_to_gpt2: Sequence[int]) -> None:
    """Fills in the "ids" of the "words" in concepts.json, so that scoring needs no tokenizer.

    gpt2_vocabulary: GPT-2's encoder.json (vocab.json on the hub), a dict of token text to id, in
    which a leading space is "\u0120". tiny_to_gpt2: GPT-2's id of each of TinyModel's,
    `ts_tok_ids_to_neo.pt` of the PyPI package tinymodel. A word's tokens are those whose text is
    " word", " Word" or "Word": "word" would be the ends of other words, too. Raises `UserError` for
    a word that has none.
    """
    text_of = {
        i: t.replace("\u0120", " ") for t, i in json.loads(gpt2_vocabulary.read_text()).items()
    }
    ids_of = {text_of[g]: i for i, g in enumerate(map(int, tiny_to_gpt2)) if g in text_of}
    content = json.loads(path.read_text())
    for name, concept in content["concepts"].items():
        ids = set()
        for word in concept["words"]:
            capital = word[:1].upper() + word[1:]
            forms = f" {word}", f" {capital}", capital
            found = {ids_of[form] for form in forms if form in ids_of}
            if not found:
                raise UserError(f"{path}: {name}: {word!r} is not one token of TinyModel's")
            ids |= found
        concept["ids"] = sorted(ids)
    path.write_text(concepts_text(content))


def concepts_text(content: Mapping[str, Any]) -> str:
    """concepts.json with a concept's words on one line and its ids on another."""
    concepts = ",\n".join(
        f'  {json.dumps(name)}: {{\n   "words": {json.dumps(c["words"])},\n'
        f'   "ids": {json.dumps(c["ids"])}\n  }}'
        for name, c in content["concepts"].items()
    )
    return f'{{\n "note": {json.dumps(content["note"])},\n "concepts": {{\n{concepts}\n }}\n}}\n'


# ---------------------------------------------------------------------------- the model's own loss


def next_token_loss(log_probs: Tensor, tok_ids: Tensor) -> tuple[Tensor, int]:
    """The summed loss of predicting each next token, in nats, and how many were predicted.

    log_probs: [n, seq, d_vocab]; tok_ids: [n, seq]. What stands at position t predicts the token
    at t + 1. Targets that are [PAD] do not count; a row's first token is predicted by [BEGIN], and
    counts, as does [END].
    """
    targets = tok_ids[:, 1:]
    counted = targets != PAD
    losses = -log_probs[:, :-1].gather(2, targets[..., None])[..., 0]
    return losses[counted].sum(dtype=torch.float64), int(counted.sum())


@torch.inference_mode()
def splice_losses(
    model: TinyModel,
    saes: Sequence[SAE],
    mean: Tensor,
    rows: Iterable[Tensor],
    layer: int,
    keep_begin: bool = False,
) -> dict[str, Any]:
    """The model's loss as it is, with each SAE's reconstruction in place of the residual stream
    at `layer`, and with `mean`, [d_model], in its place.

    Replaced are the positions that a cache of `keep_begin` holds: all but [PAD] and, by default,
    [BEGIN], where every row has the same activation. The loss is the mean over all targets that
    are not [PAD], those predicted from positions left alone included: these cost the same in each
    case, and do not change the share recovered

        (CE_mean - CE_sae) / (CE_mean - CE_clean)

    which is 1 where nothing is lost, 0 where the SAE does no better than the mean. rows: batches
    of [n, seq] token ids. Returns "clean", "mean" and "saes" in nats a token, "recovered" an SAE
    (None where the mean costs nothing), "predictions" and "replaced", both counts.
    """
    device = model.embed.weight.device
    mean = mean.to(device, torch.float32)
    sums = torch.zeros(2 + len(saes), dtype=torch.float64, device=device)
    n = replaced = 0
    for tok_ids in rows:
        tok_ids = tok_ids.to(device)
        residual = model.residual(tok_ids, layer)  # [n, seq, d_model]
        kept = torch.from_numpy(
            cache_activations.kept_positions(tok_ids.cpu().numpy(), keep_begin)
        ).to(device)
        x = residual[kept]  # [n_kept, d_model]
        for i, instead in enumerate([x, mean.expand_as(x), *(sae(x) for sae in saes)]):
            spliced = residual.clone()
            spliced[kept] = instead
            loss, n_targets = next_token_loss(model.forward_from(spliced, layer), tok_ids)
            sums[i] += loss
        n += n_targets
        replaced += len(x)
    clean, of_mean, *of_saes = (sums / n).tolist()
    gap = of_mean - clean
    return {
        "clean": clean,
        "mean": of_mean,
        "saes": of_saes,
        "recovered": [(of_mean - ce) / gap if gap else None for ce in of_saes],
        "predictions": n,
        "replaced": replaced,
    }


def rows_of(cache: ActivationCache, dataset: str, n_tokens: int, d_vocab: int) -> Iterator[Tensor]:
    """The dataset's first rows, until they hold `n_tokens` activations of the cache or it ends.

    Yields int64 [at most ROWS_AT_ONCE, seq]. Raises `UserError` where a row is not what the cache
    was made of.
    """
    make = cache.make
    source = cache_activations.Config(
        dataset=dataset,
        dataset_revision=make["dataset_revision"] if dataset == make["dataset"] else None,
        split=make["split"],
        rows_per_shard=ROWS_AT_ONCE,
    )
    done = 0
    for rows in cache_activations.read_rows(source, 0, cache.manifest.n_rows, d_vocab):
        kept = torch.from_numpy(rows[cache_activations.kept_positions(rows, make["keep_begin"])])
        cached = cache.tokens(done, done + len(kept))[0]  # fewer in the last row, perhaps
        if not torch.equal(cached, kept[: len(cached)]):
            raise UserError(
                f"{cache_activations.rows_file(source)} is not what {cache.folder} was made of: "
                f"tokens differ after the first {done}; give its --dataset"
            )
        yield torch.from_numpy(rows)
        done += len(cached)
        if done >= n_tokens:
            return
    if done < cache.n_tokens:
        raise UserError(
            f"{cache_activations.rows_file(source)} is not what {cache.folder} was made of: it "
            f"ends after {done} tokens; give its --dataset"
        )


# ---------------------------------------------------------------------------------------- the run


@dataclasses.dataclass(frozen=True)
class Config:
    """What is scored, and on what."""

    run: str = setting("runs/tinystories", "folder that train_tinystories.py wrote")
    cache: str = setting("cache/validation", "cache of a split that was not trained on")
    model: str | None = setting(None, "the language model; default: the one the cache was made of")
    dataset: str | None = setting(None, "its token ids; default: those the cache was made of")
    n_tokens: int = setting(100_000, "tokens that the cross-entropy is judged on, at most")
    concepts: str | None = setting(None, "sets of token ids; default: this script's concepts.json")
    min_precision: float = setting(
        0.8, "of a latent that may fire in a concept's detector's stead, see choose_detectors"
    )
    seed: int = setting(0, "which rows choose a concept's latents, and which judge them")
    out: str | None = setting(None, "folder for evaluation.json and the figures; default: --run")
    device: str = setting("auto", "torch device; auto: the GPU where there is one")


def load_saes(
    folder: Path, device: torch.device, trained: Mapping[str, Any] | None = None
) -> dict[str, SAE]:
    """The SAEs of a run, by name, in float32. `trained` is its results.json.

    A file that is not of that run, but of an older one in its folder, is left out, with a line on
    stderr. Raises `UserError` where a file is not the one that was recorded, or none is left.
    """
    paths = {name: folder / f"{name}.safetensors" for name in NAMES}
    paths = {name: path for name, path in paths.items() if path.exists()}
    if not paths:
        raise UserError(
            f"{folder} holds no {' or '.join(f'{name}.safetensors' for name in NAMES)}: run "
            f"train_tinystories.py --out {folder}, to its end"
        )
    of_run = {run["sae"]: run for run in trained["runs"]} if trained else {n: {} for n in NAMES}
    for name in NAMES:
        if (name in paths) != (name in of_run) and trained:
            why = "is not of this run (results.json)" if name in paths else "is missing"
            print(f"not scored: {folder / name}.safetensors {why}", file=sys.stderr)
    saes = {name: load_sae(paths[name], of_run[name], device) for name in paths if name in of_run}
    if not saes:
        raise UserError(f"{folder} holds no SAE of the run that its results.json is of")
    return saes


def load_sae(path: Path, recorded: Mapping[str, Any], device: torch.device) -> SAE:
    """One SAE, in float32. Raises `UserError` where `recorded` has another checksum of its file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sae = SAE.load(path, device).float()
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    if recorded.get("file_sha256", digest) != digest:
        raise UserError(
            f"{path} is not the file that results.json beside it is of: its checksum is another; "
            "train again, or move it to a folder of its own"
        )
    if sae.W_enc.dim() != 2 or sae.n_latents < 2:
        raise UserError(
            f"{path}: W_enc is {list(sae.W_enc.shape)}, not of one SAE of 2 latents or more"
        )
    return sae


def training_results(folder: Path) -> dict[str, Any]:
    """results.json of a run, {} where there is none. Raises `UserError` where it is damaged."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        # what is read of it
        float(results["config"]["target_l0"])
        str(results["config"]["cache"]), dict(results["cache"]["make"])
        {run["sae"]: run["sae"].lower() for run in results["runs"]}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, or not train_tinystories.py's ({type(error).__name__}: {error})"
        ) from None
    return results


def check_cache(
    cache: ActivationCache, saes: Mapping[str, SAE], trained: Mapping[str, Any]
) -> None:
    """Raises `UserError` where the cache is too small, or of another width, layer or model than
    the SAEs'."""
    for name, sae in saes.items():
        if sae.d_model != cache.d_model:
            raise UserError(
                f"the {name} SAE's d_model is {sae.d_model}, that of {cache.folder} {cache.d_model}"
            )
    if cache.manifest.n_rows < 2:
        raise UserError(
            f"{cache.folder} holds {cache.manifest.n_rows} rows: too few for two halves"
        )
    make = trained.get("cache", {}).get("make", {})
    cache.require(**{key: make[key] for key in ("layer", "weights_hash") if key in make})


def is_held_out(cache: ActivationCache, trained: Mapping[str, Any]) -> bool | None:
    """Whether the cache's activations were not trained on; None where that is not known.

    A shard trained on, by its checksum, settles it, and so do the same dataset and split, however
    the dataset's path is spelled. Another split of that dataset was not trained on. Another
    dataset might be a copy: that is settled only where the checksums trained on are known.
    """
    if not trained:
        return None
    make, known = trained["cache"]["make"], trained_shards(trained)
    same_dataset = _same_place(make.get("dataset"), cache.make["dataset"])
    if known & {shard.acts_sha256 for shard in cache.shards} or (
        same_dataset and make.get("split") == cache.make["split"]
    ):
        return False
    return True if same_dataset or known else None


def trained_shards(trained: Mapping[str, Any]) -> set[str]:
    """Checksums of the shards that were trained on: as results.json records them, or else of the
    training cache, if it is where it was. Empty where they are not known."""
    recorded, folder = trained["cache"], Path(trained["config"]["cache"])
    if "acts_sha256" in recorded:
        return set(recorded["acts_sha256"])
    try:
        manifest = cache_activations.read_record(folder / cache_activations.MANIFEST)
    except UserError:
        return set()
    if manifest.make != recorded["make"]:
        return set()
    return {shard.acts_sha256 for shard in manifest.shards}


def _same_place(a: str | None, b: str) -> bool:
    """Whether two names of a dataset are one folder or, if they are none, one name."""
    return a is not None and os.path.realpath(a) == os.path.realpath(b)


class Inputs(NamedTuple):
    """What a run reads, checked."""

    saes: dict[str, SAE]
    trained: dict[str, Any]  # results.json, or {}
    cache: ActivationCache
    model: TinyModel
    concepts: dict[str, list[int]]
    dataset: str


FILES = ("evaluation.json", "fvu_by_prefix.png", "density_histograms.png", "training_curves.png")


def read_inputs(config: Config, device: torch.device) -> Inputs:
    """Everything that can be wrong with the input is found here, before anything is computed.

    Raises `UserError`.
    """
    require_positive(config, "n_tokens")
    require_not_negative(config, "seed")
    if not 0 <= config.min_precision <= 1:
        raise UserError(f"--min-precision must be between 0 and 1, got {config.min_precision}")
    folder, out = Path(config.run), Path(config.out or config.run)
    concepts = load_concepts(Path(config.concepts or Path(__file__).with_name("concepts.json")))
    trained = training_results(folder)
    saes = load_saes(folder, device, trained)
    cache = ActivationCache(config.cache)
    check_cache(cache, saes, trained)
    model = TinyModel.from_pretrained(config.model or cache.make["model"], device=device)
    cache.require(weights_hash=model.weights_hash)
    membership(concepts, model.d_vocab)
    dataset = config.dataset or cache.make["dataset"]
    next(rows_of(cache, dataset, 1, model.d_vocab))
    if trained and (folder / "metrics.jsonl").exists():
        training_curves(folder / "metrics.jsonl")
    make_folder(out)
    for path in (out / name for name in FILES):
        if path.is_dir():
            raise UserError(f"--out {out}: {path} is a folder; the results need that name")
    cache.verify()
    return Inputs(saes, trained, cache, model, concepts, dataset)


@torch.inference_mode()
def run(
    config: Config, show: Callable[[dict[str, Any]], object] = lambda results: None
) -> dict[str, Any]:
    """Scores the SAEs of `config.run`; writes evaluation.json and the figures to `config.out`.

    Returns what evaluation.json holds; calls `show` with it first, so that a full disk does not
    lose it. Raises `UserError` where the input is wrong or the results cannot be written.
    """
    device = pick_device(config.device)
    inputs = read_inputs(config, device)
    results = score(config, inputs, device)
    show(results)
    folder, out = Path(config.run), Path(config.out or config.run)
    write_json(out / FILES[0], results)
    draw(results, out)
    if inputs.trained and (folder / "metrics.jsonl").exists():
        curves = training_curves(folder / "metrics.jsonl")
        draw_curves(out, curves, inputs.trained["config"]["target_l0"])
    return results


def score(config: Config, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """What evaluation.json holds. Raises `UserError` where the activations leave it undefined."""
    started, cache, saes = time.perf_counter(), inputs.cache, inputs.saes
    members = membership(inputs.concepts, inputs.model.d_vocab)
    first_half = halves(cache.manifest.n_rows, config.seed)
    statistics = [Statistics(sae, members, first_half) for sae in saes.values()]
    norms = norms_of(cache, device)
    every, inliers = reconstruct(statistics, cache, outliers_among(norms), device)
    absorbed = absorption(statistics, cache, list(inputs.concepts), config.min_precision)
    losses = cross_entropy(config, inputs, every.mean)
    return {
        "config": dataclasses.asdict(config),
        "environment": environment(device),
        "cache": {
            "make": cache.make,
            "n_tokens": cache.n_tokens,
            "held_out": is_held_out(cache, inputs.trained),
        },
        "norms": norm_spread(norms),
        "seconds": round(time.perf_counter() - started, 2),
        "cross_entropy": {key: losses[key] for key in ("clean", "mean", "predictions", "replaced")},
        "runs": [
            {
                "sae": name,
                **s.summary(every, inliers),
                "cross_entropy": losses["saes"][i],
                "loss_recovered": losses["recovered"][i],
                **cosine_summary(s.sae),
                "absorption": mean_absorption(absorbed[i]),
                "concepts": absorbed[i],
            }
            for i, (name, s) in enumerate(zip(saes, statistics, strict=True))
        ],
    }


def reconstruct(
    statistics: Sequence[Statistics],
    cache: ActivationCache,
    is_outlier: Tensor,
    device: torch.device,
) -> tuple[Moments, Moments]:
    """Adds the cache to the `statistics`; returns its moments, and those without outliers.

    is_outlier: bool [n_tokens]. Raises `UserError` where FVU is not defined: activations that are
    all the same leave no variance to explain, reconstructions that are not finite no error.
    """
    every, is_outlier = Moments(), is_outlier.to(device)
    inliers = Moments() if is_outlier.any() else every
    with tqdm(total=cache.n_tokens, unit=" tokens", desc="reconstruction") as bar:
        for batch in cache.sequential(BATCH, device):
            outlier = is_outlier[every.n : every.n + len(batch.acts)]
            every.add(batch.acts)
            if inliers is not every:
                inliers.add(batch.acts[~outlier])
            for s in statistics:
                s.add(batch, outlier)
            bar.update(len(batch.acts))
    if every.is_constant:
        raise UserError(f"{cache.folder}: its activations are all the same: FVU is not defined")
    if not all(s.errors.isfinite().all() for s in statistics):
        raise UserError(f"an SAE's reconstructions of {cache.folder} are not finite")
    return every, inliers


def cross_entropy(config: Config, inputs: Inputs, mean: Tensor) -> dict[str, Any]:
    """`splice_losses` on the first rows of the cache's dataset; `mean` is that of the cache."""
    cache = inputs.cache
    n_batches = cache.manifest.n_rows * min(1, config.n_tokens / cache.n_tokens) / ROWS_AT_ONCE
    rows = tqdm(
        rows_of(cache, inputs.dataset, config.n_tokens, inputs.model.d_vocab),
        total=math.ceil(n_batches),
        unit=" batches",
        desc="cross-entropy",
    )
    make = cache.make
    saes = list(inputs.saes.values())
    return splice_losses(inputs.model, saes, mean, rows, make["layer"], make["keep_begin"])


def cosine_summary(sae: SAE) -> dict[str, Any]:
    """The mean and the quantiles over latents of `highest_cosines`."""
    cosines = highest_cosines(sae.W_dec)
    quantiles = cosines.quantile(cosines.new_tensor(QUANTILES)).tolist()
    return {
        "mean_highest_cosine": float(cosines.mean()),
        "highest_cosine_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def mean_absorption(concepts: Sequence[Mapping[str, Any]]) -> float | None:
    """The plain mean over the concepts that have a rate."""
    rates = [c["absorption"] for c in concepts if c["absorption"] is not None]
    return float(np.mean(rates)) if rates else None


# -------------------------------------------------------------------------- figures and the report


def draw(results: Mapping[str, Any], out: Path) -> None:
    """The pair's figures: FVU by prefix, and firing densities."""
    import plots  # only here: matplotlib takes a second

    n = results["cache"]["n_tokens"]
    runs = {r["sae"]: r for r in results["runs"]}
    by_prefix = {name: r["fvu_by_prefix"] for name, r in runs.items()}
    plots.fvu_by_prefix(out / "fvu_by_prefix.png", by_prefix)
    densities = {name: np.array(r["fired"]) / n for name, r in runs.items()}
    plots.density_histograms(out / "density_histograms.png", densities)


def draw_curves(out: Path, curves: tuple[Any, Any], target_l0: float) -> None:
    """How training went: L0, FVU and sparsity weight over steps."""
    import plots

    plots.training_curves(out / "training_curves.png", *curves, target_l0)


def training_curves(path: Path) -> tuple[list[int], dict[str, dict[str, list[float]]]]:
    """metrics.jsonl as `plots.training_curves` wants it: steps, and curves of one seed.

    Raises `UserError` where it is damaged.
    """
    keys = ("l0", "fvu", "sparsity_weight")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        by_sae = {r["sae"]: [q for q in records if q["sae"] == r["sae"]] for r in records}
        steps = {name: [int(r["step"]) for r in of] for name, of in by_sae.items()}
        curves = {
            name: {key: [float(r[key]) for r in of] for key in keys} for name, of in by_sae.items()
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not steps or not set(steps) <= set(NAMES) or len(set(map(tuple, steps.values()))) > 1:
        raise UserError(
            f"{path} is damaged: it should have a line an SAE ({', '.join(NAMES)}) and step"
        )
    return next(iter(steps.values())), curves


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(results: Mapping[str, Any]) -> str:
    """The write-up's table, an SAE a row, and what it was judged on."""
    cache, ce = results["cache"], results["cross_entropy"]
    rows = [
        [
            r["sae"],
            f"{r['fvu']:.4f}",
            f"{r['l0']:.2f}",
            f"{r['dead_share']:.1%}",
            shown(r["loss_recovered"], ".1%"),
            f"{r['mean_highest_cosine']:.3f}",
            shown(r["absorption"], ".1%"),
        ]
        for r in results["runs"]
    ]
    headers = ["SAE", "FVU", "L0", "dead", "loss recovered", "highest cosine", "absorption"]
    tokens = f"{cache['n_tokens']:,} tokens of {cache['make']['split']}"
    was = {True: "not trained on", False: "TRAINED ON", None: "whether trained on is not known"}
    return (
        f"{table(headers, rows)}\n\n{tokens}, {was[cache['held_out']]}. Cross-entropy on "
        f"{ce['predictions']:,} predictions: {ce['clean']:.3f} nats clean, {ce['mean']:.3f} with "
        f"the mean, "
        + ", ".join(f"{r['cross_entropy']:.3f} {r['sae']}" for r in results["runs"])
        + f".\n{norm_line(results)}"
    )


def norm_line(results: Mapping[str, Any]) -> str:
    """How the activations' norms spread and, where outliers decide FVU, FVU without them."""
    norms = results["norms"]
    if norms["p99_9_over_median"] is None:
        return "The median of the activations' norms is 0."
    line = (
        f"Norms: the 99.9th percentile is {norms['p99_9_over_median']:.2f} times the median, the "
        f"largest {norms['max_over_median']:.2f} times."
    )
    alone = {r["sae"]: r["fvu_without_outliers"] for r in results["runs"]}
    matters = any(
        alone[r["sae"]] is None or abs(alone[r["sae"]] - r["fvu"]) > MATTERS * r["fvu"]
        for r in results["runs"]
    )
    if not (norms["outliers"] and matters):
        return line
    without = ", ".join(
        f"{'not defined' if f is None else format(f, '.4f')} {sae}" for sae, f in alone.items()
    )
    return (
        f"{line}\nFVU IS DECIDED BY {norms['outliers']:,} OF {results['cache']['n_tokens']:,} "
        f"TOKENS, of over {OUTLIER:g} times the median norm. Without them: {without}."
    )


def concept_table(results: Mapping[str, Any]) -> str:
    """A concept and SAE a row: how good its detector is, what it misses, what is absorbed."""
    rows = [
        [
            c["concept"],
            r["sae"],
            c["tokens"],
            *(shown(c[key], ".1%") for key in ("precision", "recall", "miss_rate", "absorption")),
            c["specific_latents"],
        ]
        for concepts in zip(*(r["concepts"] for r in results["runs"]), strict=True)
        for r, c in zip(results["runs"], concepts, strict=True)
    ]
    headers = ["concept", "SAE", "tokens", "precision", "recall", "missed", "absorbed", "specific"]
    return table(headers, rows)


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__, argv)
        run(config, lambda results: print(f"{concept_table(results)}\n\n{summary(results)}"))


if __name__ == "__main__":
    main()
