"""Concepts: named sets of token ids, such as the names of girls. concepts.json has TinyModel's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matryoshka.errors import UserError

TINY_MODEL_CONCEPTS = Path(__file__).with_name("concepts.json")


def load_concepts(path: Path = TINY_MODEL_CONCEPTS) -> dict[str, list[int]]:
    """Each concept's token ids. Raises `UserError` where the file is not as concepts.json is."""
    try:
        concepts = json.loads(path.read_text())["concepts"]
        ids_of = {name: list(concept["ids"]) for name, concept in concepts.items()}
    except OSError as error:
        raise UserError(f"--concepts {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'--concepts {path}: expected {{"concepts": {{NAME: {{"ids": [...]}}}}}} '
            f"({type(error).__name__}: {error})"
        ) from None
    for name, ids in ids_of.items():
        if not ids or not all(type(i) is int for i in ids):
            raise UserError(f"--concepts {path}: {name!r} needs a list of token ids, found {ids}")
    if not ids_of:
        raise UserError(f"--concepts {path} holds no concepts")
    return ids_of


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
