"""Where a cache's activations come from: a language model that reads rows of token ids.

The writer of caches uses only the interface `Source`. A source has rows, counted from 0. A row is a
sequence of tokens; some of its positions are kept, and each of these has an activation. The writer
reads blocks of `rows_per_shard` rows in order. If a block's shard is finished, it compares their
tokens; if not, it computes the block's activations.

Arrays of activations are not a source: only their values distinguish them from other arrays, so
`array_files.cache_arrays` compares the values of finished shards, too.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from matryoshka.language_models import LanguageModel
from matryoshka.sites import Site
from matryoshka.token_rows import TokenRows, count_rows, kept_positions

Identity = dict[str, Any]  # a part of a cache's recipe, see `cache_format.RECIPE_KEYS`


class Block(Protocol):
    """Consecutive rows of a source."""

    @property
    def n_rows(self) -> int:
        """The number of rows."""

    @property
    def tokens(self) -> np.ndarray:
        """Token id, row in the source and position in the row of each activation: int32 [n, 3]."""

    def activations(self) -> Iterator[Tensor]:
        """The activations in the order of `tokens`, in parts [m, d_model] of any float dtype."""


class Source(Protocol):
    """Rows of activations. Whatever is wrong with them raises `UserError`."""

    @property
    def d_model(self) -> int:
        """The width of an activation."""

    @property
    def name(self) -> str:
        """The name of its rows in messages: a file or a dataset."""

    def identity(self) -> Identity:
        """What distinguishes it from other sources. Equal identities mean equal activations."""

    def count(self, n_tokens: int) -> int | None:
        """How many rows it takes, from the first on, to get `n_tokens` activations; at most all.

        None if the rows are not counted in advance. Then `blocks` ends with the row that completes
        `n_tokens`, a number that the source was made with.
        """

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[Block]:
        """Yields rows `start` to `end` - 1 (None: to the end) in blocks of `size` rows.

        The last block may be smaller.
        """


# ------------------------------------------------------------------- a language model reads rows


class TokenBlock(NamedTuple):
    """Consecutive rows of token ids."""

    first_row: int
    tok_ids: np.ndarray  # int64 [n, seq]
    is_kept: np.ndarray  # bool [n, seq], True where the activation is kept
    is_real: np.ndarray | None = None  # bool [n, seq], False at padding; None if there is none

    @property
    def tokens(self) -> np.ndarray:
        """Token id, row and position of each kept activation: int32 [n, 3]."""
        row, position = np.nonzero(self.is_kept)
        kept = [self.tok_ids[self.is_kept], row + self.first_row, position]
        return np.stack(kept, axis=1).astype("<i4")


class Rows(Protocol):
    """Rows of token ids that a language model reads.

    `name`, `identity` and `count` are those of a `Source`.
    """

    @property
    def name(self) -> str: ...
    def identity(self) -> Identity: ...
    def count(self, n_tokens: int) -> int | None: ...
    def blocks(self, start: int, end: int | None, size: int) -> Iterator[TokenBlock]:
        """Yields rows `start` to `end` - 1 (None: to the end) in blocks of `size` rows."""


@dataclasses.dataclass(frozen=True)
class IdRows:
    """`Rows` from a dataset that has token ids, as TinyModel's has, for a model of `d_vocab` ids.

    `keep_begin`: whether the positions of [BEGIN] are kept.
    """

    token_rows: TokenRows
    d_vocab: int
    keep_begin: bool = False

    @property
    def name(self) -> str:
        return str(self.token_rows.file)

    def identity(self) -> Identity:
        return {**self.token_rows.identity(), "keep_begin": self.keep_begin}

    def count(self, n_tokens: int) -> int:
        return count_rows(self.token_rows, n_tokens, self.keep_begin, self.d_vocab)[0]

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[TokenBlock]:
        """As in `Rows`; raises what `TokenRows.read` does."""
        for tok_ids in self.token_rows.read(start, end, self.d_vocab, size):
            yield TokenBlock(start, tok_ids, kept_positions(tok_ids, self.keep_begin))
            start += len(tok_ids)


@dataclasses.dataclass(frozen=True)
class ModelBlock:
    """A `Block` of a `ModelSource`."""

    source: "ModelSource"
    rows: TokenBlock

    @property
    def n_rows(self) -> int:
        return len(self.rows.tok_ids)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return self.rows.tokens

    def activations(self) -> Iterator[Tensor]:
        """As in `Block`: runs `batch_size` rows at a time, on the model's device, in its dtype."""
        model, size = self.source.model, self.source.batch_size
        for i in range(0, self.n_rows, size):
            part = slice(i, i + size)
            index = torch.from_numpy(np.flatnonzero(self.rows.is_kept[part])).to(model.device)
            if len(index) == 0:
                continue
            tok_ids = torch.from_numpy(self.rows.tok_ids[part]).to(model.device)
            mask = None  # None if no row of the part has padding
            if self.rows.is_real is not None and not self.rows.is_real[part].all():
                mask = torch.from_numpy(self.rows.is_real[part]).to(model.device)
            acts = model.activations(tok_ids, self.source.layer, self.source.site, mask)
            yield acts.flatten(0, 1).index_select(0, index)  # [n, d_model]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A `Source`: the activations of a language model at a site of a layer, on rows of token ids.

    `model_name`: its name in the recipe; `about`: further entries about it in the recipe.
    `batch_size`: rows in a forward pass.
    """

    model: LanguageModel
    model_name: str
    rows: Rows
    layer: int
    site: Site = "resid_pre"
    batch_size: int = 64
    about: Identity = dataclasses.field(default_factory=dict)

    @property
    def d_model(self) -> int:
        return self.model.d_model

    @property
    def name(self) -> str:
        return self.rows.name

    def identity(self) -> Identity:
        """The model, its weights, the rows, the layer and the site."""
        of_model = {"model": self.model_name, "weights_hash": self.model.weights_hash}
        # Caches of format 2 have one site, which their recipes do not name.
        is_format_2 = self.site == "resid_pre" and not self.about
        of_site = {"layer": self.layer} | ({} if is_format_2 else {"site": self.site})
        return {**of_model, **self.about, **self.rows.identity(), **of_site}

    def count(self, n_tokens: int) -> int | None:
        return self.rows.count(n_tokens)

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[ModelBlock]:
        return (ModelBlock(self, rows) for rows in self.rows.blocks(start, end, size))
