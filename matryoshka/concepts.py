"""Concepts: named sets of words, such as the names of girls, and the token ids that these are.

A tokenizer turns the words of concepts.json into ids, so that absorption is measured on any model.
Beside them the file has the ids of TinyModel's vocabulary, which comes without a tokenizer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.errors import UserError

CONCEPTS = Path(__file__).with_name("concepts.json")

Tokenize = Callable[[str], list[int]]  # a text to its token ids, with none added to them


class Concept(NamedTuple):
    """One of a file: its words, or its token ids, or both."""

    words: list[str]
    ids: list[int]


class Resolved(NamedTuple):
    """Concepts as token ids of one vocabulary."""

    ids: dict[str, list[int]]  # of each concept; those without an id are not among them
    n_words: int  # that a tokenizer was asked for
    left_out: list[str]  # those that are no single token

    @property
    def n_left_out(self) -> int:
        return len(self.left_out)


def load_concepts(path: Path = CONCEPTS) -> dict[str, Concept]:
    """The concepts in a file. Raises `UserError` where it is not as concepts.json is."""
    try:
        content = json.loads(path.read_text())["concepts"]
        concepts = {
            name: Concept(list(of.get("words", ())), list(of.get("ids", ())))
            for name, of in content.items()
        }
    except OSError as error:
        raise UserError(f"--concepts {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'--concepts {path}: expected {{"concepts": {{NAME: {{"words": [...]}}}}}}, or "ids" '
            f"instead ({type(error).__name__}: {error})"
        ) from None
    for name, (words, ids) in concepts.items():
        if not words + ids or not all(type(i) is int for i in ids):
            raise UserError(f"--concepts {path}: {name!r} needs words or token ids, found {ids}")
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise UserError(f"--concepts {path}: {name!r} needs words, found {words}")
    if not concepts:
        raise UserError(f"--concepts {path} holds no concepts")
    return concepts


def resolve(concepts: Mapping[str, Concept], tokenize: Tokenize | None) -> Resolved:
    """The token ids of each concept: of its words where there is a tokenizer, else those given.

    Raises `UserError` where a concept has words only, and there is no tokenizer.
    """
    ids: dict[str, list[int]] = {}
    n_words, left_out = 0, []
    for name, concept in concepts.items():
        found = set(concept.ids)
        if tokenize is not None and concept.words:
            of_words = {word: ids_of_word(word, tokenize) for word in concept.words}
            found = set().union(*of_words.values())
            n_words += len(of_words)
            left_out += [word for word, its_ids in of_words.items() if not its_ids]
        elif not found:
            raise UserError(f"concept {name!r} has words and no ids: they need a --tokenizer")
        if found:
            ids[name] = sorted(found)
    return Resolved(ids, n_words, left_out)


def ids_of_word(word: str, tokenize: Tokenize) -> set[int]:
    """Ids of the single tokens that are this word: after a space, as it is and capitalised, and
    capitalised where a text begins. What is no letter, such as ".", may follow without a space.

    "word" without a space before it would be the end of other words, too.
    """
    capital = word[:1].upper() + word[1:]
    before = tokenize("a")
    texts = [f"a {word}", f"a {capital}", *([] if word[:1].isalnum() else [f"a{word}"])]
    found = set()
    for ids in map(tokenize, texts):
        if len(ids) == len(before) + 1 and ids[:-1] == before:
            found.add(ids[-1])
    alone = tokenize(capital)
    return found | set(alone if len(alone) == 1 else ())


def membership(concepts: Mapping[str, Sequence[int]], d_vocab: int) -> Tensor:
    """Which token ids are in which concept: bool [n_concepts, d_vocab].

    Raises `UserError` where a token id is not in the vocabulary.
    """
    members = torch.zeros(len(concepts), d_vocab, dtype=torch.bool)
    for row, (name, ids) in zip(members, concepts.items(), strict=True):
        for i in ids:
            if not 0 <= i < d_vocab:
                raise UserError(
                    f"concept {name!r}: token id {i} is out of the vocabulary, 0 to {d_vocab - 1}"
                )
        row[list(ids)] = True
    return members
