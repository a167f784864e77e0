"""Writes the data of a page, in JavaScript files that hold a few latents each.

    data/run.js               the run and its cache, the text of every token, labels of latents
    data/K/list.js            for SAE number K, what the list and the tree need of every latent
    data/K/latents_C.js       LATENTS_A_FILE latents in full, from C * LATENTS_A_FILE on

Each file calls one function of page/app.js with JSON, because a page that is opened from disk may
load scripts but no other files. A token is a number, the index of its text in run.js.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from matryoshka.cache_reader import ActivationCache
from matryoshka.contexts import Text
from matryoshka.hierarchy import level_widths, levels_of
from matryoshka.latent_data import (
    N_SIMILAR,
    OneSAE,
    Outputs,
    Shown,
    characteristic_tokens,
    reach_of,
    similar_latents,
)
from matryoshka.top_examples import N_QUANTILES

LATENTS_A_FILE = 16
DIGITS = 3  # significant digits of a number on the page

Array = np.ndarray
Labels = dict[str, dict[str, str]]  # by the SAE's name, then by the latent's number


class Vocabulary:
    """Numbers token ids, from the most frequent on, and has their texts."""

    def __init__(self, token_counts: Array, text_of: Callable[[int], str]):
        self._text_of = functools.cache(text_of)
        self.ids: list[int] = []
        self._numbers: dict[int, int] = {}
        for tok_id in np.argsort(-token_counts, kind="stable"):
            if token_counts[tok_id]:
                self.number(int(tok_id))

    def number(self, tok_id: int) -> int:
        """The number of a token id; -1 for an id below 0, which a cache without token ids has."""
        if tok_id < 0:
            return -1
        if tok_id not in self._numbers:
            self._numbers[tok_id] = len(self.ids)
            self.ids.append(tok_id)
        return self._numbers[tok_id]

    def text(self, tok_id: int) -> str:
        """The text of a token id; "" for an id below 0."""
        return "" if tok_id < 0 else _encodable(self._text_of(tok_id))

    @property
    def texts(self) -> list[str]:
        """The texts of all numbered token ids, in the order of their numbers."""
        return [self.text(tok_id) for tok_id in self.ids]


class Source(NamedTuple):
    """What a page is made from."""

    saes: Sequence[OneSAE]
    text: Text
    vocabulary: Vocabulary


def _encodable(text: str) -> str:
    """The text with unpaired surrogates, which UTF-8 cannot hold, replaced by "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def number(value: float) -> float | int:
    """A value rounded to DIGITS significant digits; an int if it is whole, which is shorter."""
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded == int(rounded) else rounded


def numbers(values: Any) -> list[float | int]:
    """`number` of each value."""
    return [number(value) for value in np.asarray(values).tolist()]


# ---------------------------------------------------------------------------------------- one SAE


def list_of(one: OneSAE, text: Text, vocabulary: Vocabulary) -> dict[str, Any]:
    """What the list and the tree need: for each property, a list with the value of every latent."""
    examples, widths = one.examples, level_widths(one.sae)
    parents = one.relations.parents
    tokens = (characteristic_tokens(examples, text, j) for j in range(one.sae.n_latents))
    return {
        "fired": examples.fired.tolist(),
        "largest": numbers(examples.largest),
        "mean": numbers(examples.total / examples.fired.clip(1)),
        "level": levels_of(widths).tolist(),
        "reach": numbers(reach_of(one.sae)),
        "parent": (parents[:, 0] if parents.shape[1] else np.full(len(parents), -1)).tolist(),
        "given": numbers(one.relations.parent_measures[:, :1, 0].ravel()),  # P(parent | child)
        "tokens": [[vocabulary.number(tok_id) for tok_id in ids] for ids in tokens],
    }


def latent_of(
    one: OneSAE, shown: Shown, text: Text, vocabulary: Vocabulary, latent: int
) -> dict[str, Any]:
    """The examples and relations of a latent, for its page.

    An example is [row, position, index of its token in the window, tokens, pairs], where pairs are
    the indices and the activations of the tokens on which the latent fires, in turn.
    """
    by_kind: dict[str, list[Any]] = {"top": [], "random": []}
    by_kind |= {f"q{k}": [] for k in range(N_QUANTILES)}
    windows = shown.windows
    for i in range(shown.first[latent], shown.first[latent + 1]):
        start, stop = int(windows.starts[i]), int(windows.stops[i])
        values = windows.values[windows.places[i] : windows.places[i + 1]]
        fires = np.flatnonzero(values > 0)
        pairs = [x for k in fires.tolist() for x in (k, number(float(values[k])))]
        tokens = [vocabulary.number(tok_id) for tok_id in text.tok_ids[start:stop].tolist()]
        place = [int(text.rows[start]), int(text.positions[start]), int(windows.tokens[i]) - start]
        by_kind[shown.kinds[i]].append([*place, tokens, pairs])
    return {
        "top": by_kind["top"],
        "quantiles": [by_kind[f"q{k}"] for k in range(N_QUANTILES)],
        "random": by_kind["random"],
        "histogram": [
            number(float(one.examples.bin_width[latent])),
            one.examples.histogram[latent].tolist(),
        ],
        **_relations_of(one, latent),
    }


def _relations_of(one: OneSAE, latent: int) -> dict[str, Any]:
    """The latents that fire with this one, and its parents.

    A parent comes with its measures, and with the cosine of the two decoder rows as the last one.
    """
    relations, W_dec = one.relations, one.sae.W_dec
    coactive = relations.coactive[latent].tolist()
    overlaps = numbers(relations.coactive_overlap[latent])
    parents = relations.parents[latent].tolist()
    measures = [numbers(row) for row in relations.parent_measures[latent]]
    for j, row in zip(parents, measures, strict=True):
        row.append(number(float(torch.cosine_similarity(W_dec[latent], W_dec[j], dim=0))))
    return {
        "coactive": [pair for pair in zip(coactive, overlaps, strict=True) if pair[0] >= 0],
        "parents": [[j, *row] for j, row in zip(parents, measures, strict=True) if j >= 0],
    }


def outputs_of(outputs: Outputs, vocabulary: Vocabulary, latent: int) -> dict[str, Any]:
    """The effects of a latent on the model's output tokens."""

    def side(ids: Array, effects: Array) -> list[list[float]]:
        tokens = [vocabulary.number(tok_id) for tok_id in ids[latent].tolist()]
        return [list(pair) for pair in zip(tokens, numbers(effects[latent]), strict=True)]

    histogram = [number(float(outputs.low[latent])), number(float(outputs.width[latent]))]
    return {
        "promoted": side(outputs.promoted, outputs.promoted_by),
        "suppressed": side(outputs.suppressed, outputs.suppressed_by),
        "effects": [*histogram, outputs.counts[latent].tolist()],
    }


def neighbours(saes: Sequence[OneSAE], k: int) -> Callable[[int], dict[str, Any]]:
    """A function that returns the latents most similar to a latent of SAE k.

    These have the highest cosines of decoder rows: several in the same SAE ("similar"), and one in
    each other SAE ("nearest").
    """
    of_same = similar_latents(saes[k].sae.W_dec, saes[k].sae.W_dec, N_SIMILAR, True)
    of_others = {
        i: similar_latents(saes[k].sae.W_dec, other.sae.W_dec, 1, False)
        for i, other in enumerate(saes)
        if i != k
    }

    def of(latent: int) -> dict[str, Any]:
        similar = zip(of_same[0][latent].tolist(), numbers(of_same[1][latent]), strict=True)
        nearest = [
            [i, int(found[latent, 0]), number(float(cosines[latent, 0]))]
            for i, (found, cosines) in of_others.items()
        ]
        return {"similar": list(similar), "nearest": nearest}

    return of


# ------------------------------------------------------------------------------------------- files


def write_script(path: Path, function: str, *arguments: Any) -> None:
    """Writes a script that calls `browse.FUNCTION` with JSON arguments."""
    parts = [json.dumps(a, ensure_ascii=False, separators=(",", ":")) for a in arguments]
    path.write_text(f"browse.{function}({','.join(parts)});\n", encoding="utf-8")


def write_sae(folder: Path, source: Source, k: int, shown: Shown, outputs: Outputs | None) -> None:
    """Writes the data of SAE number k to `folder`/k."""
    one, text, vocabulary = source.saes[k], source.text, source.vocabulary
    near = neighbours(source.saes, k)
    (folder / str(k)).mkdir(parents=True)
    write_script(folder / str(k) / "list.js", "list", k, list_of(one, text, vocabulary))
    for begin in range(0, one.sae.n_latents, LATENTS_A_FILE):
        latents = [
            latent_of(one, shown, text, vocabulary, j)
            | near(j)
            | (outputs_of(outputs, vocabulary, j) if outputs else {})
            for j in range(begin, min(begin + LATENTS_A_FILE, one.sae.n_latents))
        ]
        number_of_file = begin // LATENTS_A_FILE
        path = folder / str(k) / f"latents_{number_of_file}.js"
        write_script(path, "latents", k, number_of_file, latents)


def write_run(
    folder: Path, title: str, source: Source, cache: ActivationCache, labels: Labels
) -> None:
    """Writes run.js. Call it last: it has the text of every token that the other files use."""
    recipe = cache.recipe
    of_text = {
        key: Path(str(recipe[key])).name if key in ("model", "dataset") else recipe[key]
        for key in ("model", "dataset", "split", "layer", "site")
        if recipe.get(key) is not None
    }
    run = {
        "title": title,
        "of": of_text,
        "n_tokens": cache.n_tokens,
        "latents_a_file": LATENTS_A_FILE,
        "saes": [
            {
                "name": one.name,
                "sha256": one.sha256,
                "n_latents": one.sae.n_latents,
                "widths": level_widths(one.sae),
                "has_pairs": bool(one.relations.parents.shape[1]),
            }
            for one in source.saes
        ],
        "labels": labels,
        "texts": source.vocabulary.texts,
    }
    write_script(folder / "run.js", "run", run)
