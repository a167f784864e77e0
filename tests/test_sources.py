"""The writer knows no more of a source than its five names: one that is no language model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka.cache_config import CacheConfig
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import cache_all
from matryoshka.errors import UserError
from matryoshka.sources import Block, Source


@dataclasses.dataclass
class Numbers:
    """Activation i is [i, -i]; row i holds it alone, for i below `n`."""

    n: int
    is_counted: bool = True
    asked: list[int] = dataclasses.field(default_factory=list)

    d_model = 2
    name = "numbers"

    def identity(self) -> dict[str, Any]:
        return {}

    def count(self, n_tokens: int) -> int | None:
        return min(n_tokens, self.n) if self.is_counted else None

    def blocks(self, start: int, end: int | None, size: int) -> Iterator[Block]:
        for first in range(start, end or self.n, size):
            yield NumberBlock(np.arange(first, min(first + size, end or self.n)), self.asked)


@dataclasses.dataclass
class NumberBlock:
    which: np.ndarray
    asked: list[int]

    @property
    def n_rows(self) -> int:
        return len(self.which)

    @property
    def tokens(self) -> np.ndarray:
        ids, positions = np.full_like(self.which, -1), np.zeros_like(self.which)
        return np.stack([ids, self.which, positions], axis=1).astype("<i4")

    def activations(self) -> Iterator[Tensor]:
        self.asked += self.which.tolist()
        both = torch.from_numpy(np.stack([self.which, -self.which], axis=1)).double()
        yield from both.split(3)


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_source_that_is_no_model_is_cached(tmp_path: Path, is_counted: bool) -> None:
    source: Source = Numbers(25, is_counted)
    config = CacheConfig(tokens=25, rows_per_shard=10, dtype="float32")
    assert cache_all(tmp_path, config, source) == 3
    cache = ActivationCache(tmp_path)
    cache.verify()
    batch = next(cache.sequential(100))
    assert batch.acts.tolist() == [[i, -i] for i in range(25)]
    assert (batch.tok_ids.tolist(), batch.rows.tolist()) == ([-1] * 25, list(range(25)))


@pytest.mark.parametrize("is_counted", [True, False])
def test_finished_shards_are_not_computed_again(tmp_path: Path, is_counted: bool) -> None:
    source = Numbers(25, is_counted)
    config = CacheConfig(tokens=25, rows_per_shard=10, dtype="float32")
    cache_all(tmp_path, config, source)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "00001.json").unlink()
    source.asked.clear()
    assert cache_all(tmp_path, config, source) == 1
    assert source.asked == list(range(10, 20))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_source_that_holds_nothing_is_refused(tmp_path: Path, is_counted: bool) -> None:
    with pytest.raises(UserError, match="numbers holds nothing to cache"):
        cache_all(tmp_path, CacheConfig(tokens=5), Numbers(0, is_counted))
