"""Where a cache's activations come from: a language model that reads rows of token ids.

The writer of caches knows a `Source` and nothing more of it. A source has rows, counted from 0; a
row is a sequence with one activation at each position that is kept. The writer asks for blocks of
`rows_per_shard` rows in order, compares the tokens of a block whose shard is finished, and runs
the block's activations where it is not.

Arrays are no source here: nothing but their values tells them from others, so that
`array_files.cache_arrays` compares the values of finished shards as well.
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
        """Rows."""

    @property
    def tokens(self) -> np.ndarray:
        """Token id, row in the source and position in the row of each activation: int32 [n, 3]."""

    def activations(self) -> Iterator[Tensor]:
        """The activations in the order of `tokens`, in parts [m, d_model] of any float dtype."""


class Source(Protocol):
    """Rows of activations. Everything that is wrong with it raises `UserError`."""

    @property
    def d_model(self) -> int:
        """Width of an activation."""

    @property
    def name(self) -> str:
        """What messages call its rows: a file, a dataset."""

    def identity(self) -> Identity:
        """What tells it from other sources. Equal identities stand for equal activations."""

    def count(self, n_tokens: int) -> int | None:
        """How many of the first rows hold `n_tokens` activations, or all rows where they hold
        fewer. None where the rows are not counted beforehand: then `blocks` ends by itself with
        the row that completes `n_tokens`, which the source was made with."""

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[Block]:
        """Rows `start` up to `end` (None: to the end), `size` at a time; the last may be fewer."""


# ------------------------------------------------------------------- a language model reads rows


class TokenBlock(NamedTuple):
    """Consecutive rows of token ids."""

    first_row: int
    tok_ids: np.ndarray  # int64 [n, seq]
    is_kept: np.ndarray  # bool [n, seq]: whose activations are cached
    is_real: np.ndarray | None = None  # bool [n, seq], False where padded; None: see LanguageModel

    @property
    def tokens(self) -> np.ndarray:
        """Token id, row and position of what is kept: int32 [n, 3]."""
        row, position = np.nonzero(self.is_kept)
        kept = [self.tok_ids[self.is_kept], row + self.first_row, position]
        return np.stack(kept, axis=1).astype("<i4")


class Rows(Protocol):
    """Rows of token ids that a language model reads. `name`, `identity` and `count` are those of a
    `Source`."""

    @property
    def name(self) -> str: ...
    def identity(self) -> Identity: ...
    def count(self, n_tokens: int) -> int | None: ...
    def blocks(self, start: int, end: int | None, size: int) -> Iterator[TokenBlock]:
        """Rows `start` up to `end` (None: to the end), `size` at a time."""


@dataclasses.dataclass(frozen=True)
class IdRows:
    """`TokenRows` for a model of `d_vocab` ids, as `Rows`: TinyModel's way, token ids as they are.

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
        """As `TokenRows.read`, with its errors."""
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
        """Those of `batch_size` rows at a time, on the model's device, in the model's dtype."""
        model, size = self.source.model, self.source.batch_size
        for i in range(0, self.n_rows, size):
            part = slice(i, i + size)
            index = torch.from_numpy(np.flatnonzero(self.rows.is_kept[part])).to(model.device)
            if len(index) == 0:
                continue
            tok_ids = torch.from_numpy(self.rows.tok_ids[part]).to(model.device)
            mask = None  # of padding, where there is some
            if self.rows.is_real is not None and not self.rows.is_real[part].all():
                mask = torch.from_numpy(self.rows.is_real[part]).to(model.device)
            acts = model.activations(tok_ids, self.source.layer, self.source.site, mask)
            yield acts.flatten(0, 1).index_select(0, index)  # [n, d_model]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The activations of a language model at a site of a layer, where it reads rows of token ids.

    `model_name`: what the recipe calls it; `about`: what else the recipe says of it. `batch_size`:
    rows a forward pass.
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
        # Format 2, which knows one site, does not name it.
        is_format_2 = self.site == "resid_pre" and not self.about
        of_site = {"layer": self.layer} | ({} if is_format_2 else {"site": self.site})
        return {**of_model, **self.about, **self.rows.identity(), **of_site}

    def count(self, n_tokens: int) -> int | None:
        return self.rows.count(n_tokens)

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[ModelBlock]:
        return (ModelBlock(self, rows) for rows in self.rows.blocks(start, end, size))
