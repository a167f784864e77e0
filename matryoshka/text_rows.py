"""Makes rows of token ids from text: tokenizes documents and packs them.

A row has `context` ids. It begins and ends with the ids that the tokenizer puts before and after a
text ([BOS]; [CLS] and [SEP]), or as `--begin` says. Between these, `--packing` decides:

    packed    documents follow each other, each followed by [EOS], and are cut where a row is full.
              No position is spent on padding, except in the last row. Most language models are
              trained like this. It is the default.
    padded    a row has one document, or a part of one, with padding at its end. It is for encoders
              of sentences, and for when no token may see another document.

Activations are cached at the positions of text: never at padding, and at the tokenizer's special
ids only if that is asked for. To resume, rows are made again from the first document on, which
takes a fraction of the model's time. The same text gives the same rows, and a cache's finished
shards are compared with them.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from matryoshka.documents import Documents, batched
from matryoshka.errors import UserError
from matryoshka.sources import TokenBlock
from matryoshka.transformers_model import TransformersModel

Packing = Literal["packed", "padded"]
Begin = Literal["auto", "always", "never"]

TOKENIZED_AT_ONCE = 2**16  # characters; with more, few tokens would take longer than they need to
PROBE_TEXT = "The 2 quick-brown foxes didn't jump; caf\u00e9 \u6f22\u5b57\n\tOVER  it.\U0001f98a"


class Tokenizer:
    """A model's tokenizer, an object of `transformers`, with the methods that rows need."""

    def __init__(self, model: TransformersModel, name: str) -> None:
        if model.tokenizer is None:
            raise UserError(f"{name} has no tokenizer: give --tokenizer a hub name or a folder")
        self._tokenizer, self._model = model.tokenizer, model
        self.name, self.d_vocab = name, model.d_vocab
        self.special_ids = model.special_ids
        self.begin_id, self.end_id, self.pad_id = model.begin_id, model.end_id, model.pad_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special ids around it.

        Raises `UserError` if an id is outside of the model's vocabulary.
        """
        found: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        highest = max(map(max, filter(None, found)), default=0)
        if highest >= self.d_vocab:
            raise UserError(
                f"tokenizer {self.name} gives id {highest}, which is out of the model's "
                f"vocabulary, 0 to {self.d_vocab - 1}: it is the tokenizer of another model"
            )
        return found

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids that it puts before and after a text."""
        inner = self.encode(["a"])[0]
        whole: list[int] = self._tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of its vocabulary, its special ids, and its tokens of a text: 64 hex digits."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        parts = [vocabulary, sorted(self.special_ids), self.encode([PROBE_TEXT]), self.around]
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class TextRows:
    """`sources.Rows` made of documents, for a model with a tokenizer.

    They end with the row that completes `n_tokens` kept positions, or with the text. `context`: ids
    in a row. `keep_special`: whether positions of special ids are kept; those of padding never are.
    Raises `UserError` if the tokenizer lacks a token that the settings need, or a row has no room
    for text.
    """

    documents: Documents
    tokenizer: Tokenizer
    context: int
    n_tokens: int
    packing: Packing = "packed"
    begin: Begin = "auto"
    keep_special: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--packing", self.packing, get_args(Packing)),
            ("--begin", self.begin, get_args(Begin)),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value}")
        if self.packing == "packed" and self._separator is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name} has no token that ends or begins a text, to "
                "separate documents with: give --packing padded"
            )
        if self.n_text < 1:
            raise UserError(
                f"--context {self.context} leaves no room for text beside special tokens"
            )

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids that each row begins and ends with. Raises `UserError`."""
        before, after = self.tokenizer.around
        begin_id = self.tokenizer.begin_id
        if self.begin == "never":
            return [], after
        if self.begin == "always" and begin_id is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name} has no token that begins a text: --begin always "
                "cannot be"
            )
        is_there = self.begin == "auto" or begin_id in before
        return (before if is_there else [int(begin_id or 0), *before]), after

    @property
    def n_text(self) -> int:
        """The number of ids of text in a full row."""
        before, after = self.around
        return self.context - len(before) - len(after)

    @property
    def _separator(self) -> int | None:
        """The id between packed documents; None if the tokenizer has none."""
        end = self.tokenizer.end_id
        return self.tokenizer.begin_id if end is None else end

    @property
    def _filler(self) -> int:
        """The id of padding; the model does not see it."""
        tokens = (self.tokenizer.pad_id, self._separator, 0)
        return next(token for token in tokens if token is not None)

    @property
    def name(self) -> str:
        return self.documents.dataset

    def identity(self) -> dict[str, Any]:
        """The entries about these rows in a cache's recipe."""
        return {
            **self.documents.identity(),
            "tokenizer": self.tokenizer.name,
            "tokenizer_hash": self.tokenizer.hash,
            "context": self.context,
            "packing": self.packing,
            "begin": self.begin,
            "special_ids": sorted(self.tokenizer.special_ids),
            "pad_id": self._filler,
            "keep_begin": self.keep_special,
        }

    def count(self, n_tokens: int) -> None:
        """Returns None: to count rows in advance, the text would have to be tokenized twice."""

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[TokenBlock]:
        """Yields rows `start` to `end` - 1 (None: to the end) in blocks of `size` rows."""
        n_left, rows = self.n_tokens, self._rows()
        for first in itertools.count(0, size):
            n_here = size if end is None else max(0, min(size, end - first))
            rows_here = list(itertools.islice(rows, n_here if n_left > 0 else 0))
            if not rows_here:
                return
            block = self._block(first, rows_here)
            n_kept = block.is_kept.sum(axis=1).cumsum()
            n_used = min(len(rows_here), int(np.searchsorted(n_kept, n_left)) + 1)
            n_left -= int(n_kept[n_used - 1])
            if first >= start:
                yield block if n_used == len(rows_here) else self._block(first, rows_here[:n_used])

    def _block(self, first_row: int, rows: list[list[int]]) -> TokenBlock:
        """A block of rows of ids, each at most `context` long; its arrays are [n, context]."""
        tok_ids = np.full((len(rows), self.context), self._filler, dtype=np.int64)
        is_real = np.arange(self.context) < np.array([[len(row)] for row in rows])
        tok_ids[is_real] = list(itertools.chain.from_iterable(rows))
        is_kept = is_real
        if not self.keep_special:
            is_kept = is_real & ~np.isin(tok_ids, sorted(self.tokenizer.special_ids))
        return TokenBlock(first_row, tok_ids, is_kept, None if is_real.all() else is_real)

    def _rows(self) -> Iterator[list[int]]:
        """Yields every row, at most `context` ids long, from the first document on."""
        before, after = self.around
        texts = self._packed() if self.packing == "packed" else self._one_each()
        for text in texts:
            yield [*before, *text, *after]

    def _encoded(self) -> Iterator[list[int]]:
        """Yields the ids of each document that has any."""
        for batch in batched(self.documents.read(), TOKENIZED_AT_ONCE):
            yield from filter(None, self.tokenizer.encode(batch))

    def _packed(self) -> Iterator[list[int]]:
        """Yields the text of each row: documents one after another, each with a separator."""
        left: list[int] = []
        for ids in self._encoded():
            left += [*ids, self._separator]  # type: ignore[list-item]
            n_full = len(left) // self.n_text * self.n_text
            for start in range(0, n_full, self.n_text):
                yield left[start : start + self.n_text]
            left = left[n_full:]
        if left:
            yield left

    def _one_each(self) -> Iterator[list[int]]:
        """Yields the text of each row: a document, or the next part of one."""
        for ids in self._encoded():
            for start in range(0, len(ids), self.n_text):
                yield ids[start : start + self.n_text]
