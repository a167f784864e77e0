"""Fills in the token ids of the words in concepts.json. With them, scoring needs no tokenizer.

    python -m studies.concept_ids --vocabulary encoder.json --tiny-to-gpt2 ts_tok_ids_to_neo.pt

The first file is GPT-2's vocabulary (vocab.json on the hub): a dict from token text to id, in which
"\\u0120" stands for a space. The second has the GPT-2 id of each of TinyModel's tokens; it is part
of the PyPI package tinymodel.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.command_line import main_guard, parse, setting
from matryoshka.concepts import CONCEPTS
from matryoshka.errors import UserError
from matryoshka.files import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The file of words, and the vocabularies that give their ids."""

    concepts: str = setting(str(CONCEPTS), "the file whose ids are filled in")
    vocabulary: str = setting(help="GPT-2's vocabulary, a JSON file")
    tiny_to_gpt2: str = setting(help="GPT-2 ids of TinyModel's tokens, a .pt file of a tensor")


def ids_of_word(word: str, ids_by_text: Mapping[str, int]) -> set[int]:
    """Ids of the tokens " word", " Word" and "Word"; "word" may also be the end of another word.

    Raises `UserError` if none of these is a token.
    """
    capital = word[:1].upper() + word[1:]
    found = {
        ids_by_text[text] for text in (f" {word}", f" {capital}", capital) if text in ids_by_text
    }
    if not found:
        raise UserError(f"{word!r} is not one token of TinyModel's")
    return found


def fill_in(content: dict[str, Any], gpt2_ids: Mapping[str, int], gpt2_of: Sequence[int]) -> None:
    """Sets the "ids" of each concept from its "words". `content` is what concepts.json holds."""
    texts = {i: text.replace("\u0120", " ") for text, i in gpt2_ids.items()}
    ids_by_text = {texts[g]: i for i, g in enumerate(gpt2_of) if g in texts}
    for concept in content["concepts"].values():
        words = (ids_of_word(word, ids_by_text) for word in concept["words"])
        concept["ids"] = sorted(set().union(*words))


def as_text(content: Mapping[str, Any]) -> str:
    """JSON with a concept's words on one line and its ids on another."""
    concepts = ",\n".join(
        f'  {json.dumps(name)}: {{\n   "words": {json.dumps(concept["words"])},\n'
        f'   "ids": {json.dumps(concept["ids"])}\n  }}'
        for name, concept in content["concepts"].items()
    )
    return f'{{\n "note": {json.dumps(content["note"])},\n "concepts": {{\n{concepts}\n }}\n}}\n'


def run(config: Config) -> None:
    """Writes the file of concepts anew. Raises `UserError` where a file is not as described."""
    path = Path(config.concepts)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        gpt2_ids = json.loads(Path(config.vocabulary).read_text(encoding="utf-8"))
        gpt2_of = torch.load(config.tiny_to_gpt2, weights_only=True).tolist()
        fill_in(content, gpt2_ids, gpt2_of)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch.load raises errors of many classes
        raise UserError(f"cannot read the three files ({type(error).__name__}: {error})") from None
    write_atomically(path, lambda part: part.write_text(as_text(content), encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with main_guard():
        run(parse(Config, __doc__, argv))


if __name__ == "__main__":
    main()
