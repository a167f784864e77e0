"""Concepts: named sets of words, such as female names, and the token ids of these words.

A tokenizer turns the words of concepts.json into ids, so that absorption can be measured on any
model. The file also has the ids in TinyModel's vocabulary, which comes without a tokenizer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.errors import UserError

CONCEPTS = Path(__file__).with_name("concepts.json")
MAX_ID = 10**7  # above every vocabulary; `membership` has room for all ids up to the largest

Tokenize = Callable[[str], list[int]]  # a text -> its token ids, without special tokens


class Concept(NamedTuple):
    """A concept as its file has it: its words, or its token ids, or both."""

    words: list[str]
    ids: list[int]


class Resolved(NamedTuple):
    """Concepts as token ids of one vocabulary."""

    ids: dict[str, list[int]]  # the ids of each concept that has any
    n_words: int  # words that were looked up with a tokenizer
    left_out: list[str]  # the words among them that are not a single token

    @property
    def n_left_out(self) -> int:
        return len(self.left_out)


def load_concepts(path: Path = CONCEPTS) -> dict[str, Concept]:
    """The concepts in a file. Raises `UserError` if it is not in the format of concepts.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["concepts"]
        concepts = {name: _concept(entry) for name, entry in content.items()}
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
        wrong = [i for i in ids if not 0 <= i <= MAX_ID]
        if wrong:
            raise UserError(
                f"--concepts {path}: {name!r} has the token id {wrong[0]}, which must be between 0 "
                f"and {MAX_ID}"
            )
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise UserError(f"--concepts {path}: {name!r} needs words, found {words}")
    if not concepts:
        raise UserError(f"--concepts {path} holds no concepts")
    return concepts


def _concept(entry: Mapping[str, Any]) -> Concept:
    """A concept of the file. Raises TypeError if its words or ids are not in a list."""
    words, ids = entry.get("words", []), entry.get("ids", [])
    if not (isinstance(words, list) and isinstance(ids, list)):  # list("dog") would be 3 words
        raise TypeError('"words" and "ids" must be lists')
    return Concept(words, ids)


def resolve(concepts: Mapping[str, Concept], tokenize: Tokenize | None) -> Resolved:
    """The token ids of each concept: those of its words if there is a tokenizer, else its own.

    Raises `UserError` if there is no tokenizer and a concept has no ids of its own.
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
            raise UserError(f"concept {name!r} has words and no ids, which needs a --tokenizer")
        if found:
            ids[name] = sorted(found)
    return Resolved(ids, n_words, left_out)


def ids_of_word(word: str, tokenize: Tokenize) -> set[int]:
    """Ids of the single tokens that are this word.

    These are the word after a space, as it is and capitalised, and the capitalised word at the
    beginning of a text. A token without a space before it may also be the end of a longer word, so
    only marks such as "." are looked up without one.
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

    Raises `UserError` if a token id is not in the vocabulary.
    """
    members = torch.zeros(len(concepts), d_vocab, dtype=torch.bool)
    for row, (name, ids) in zip(members, concepts.items(), strict=True):
        for i in ids:
            if not 0 <= i < d_vocab:
                raise UserError(
                    f"concept {name!r}: token id {i} is not in the vocabulary, 0 to {d_vocab - 1}"
                )
        row[list(ids)] = True
    return members
