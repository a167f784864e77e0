"""Caches in a folder that several comparisons share, such as a Modal Volume: each is made once.

The name of a cache's folder contains its settings, so the next comparison finds it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_format import MANIFEST, Recipe, read_record
from matryoshka.cache_reader import RESIDENT_SHARE
from matryoshka.cache_writer import (
    cache_all,
    cache_rows,
    finish,
    is_complete,
    recipe_of,
    split_rows,
)
from matryoshka.command_line import setting
from matryoshka.files import make_folder, write_atomically
from matryoshka.sources import IdRows
from matryoshka.token_rows import TokenRows, count_rows

# Settings that are always a part of a folder's hash. Other settings that change activations are a
# part of it if they differ from their defaults. So a new setting does not change existing names.
ALWAYS_NAMED = (
    *("model", "model_revision", "dataset", "dataset_revision", "split"),
    *("layer", "dtype", "keep_begin", "rows_per_shard"),
)
NOT_NAMED = ("tokens", "batch_size")  # they do not change the activations


def short_hash(value: Any) -> str:
    """The first eight hexadecimal digits of the SHA-256 of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def folder_of(config: CacheConfig, root: Path) -> Path:
    """The cache's folder: root/caches/MODEL.DATASET.SPLIT.layerN.DTYPE.HASH.TOKENS"""
    shaping = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(CacheConfig)
        if field.name in ALWAYS_NAMED
        or (field.name not in NOT_NAMED and getattr(config, field.name) != field.default)
    }
    parts = [Path(config.model).name, Path(config.dataset).name, config.split]
    words = [re.sub(r"[^\w-]+", "_", part) for part in parts]
    stem = ".".join([*words, f"layer{config.layer}", config.dtype, short_hash(shaping)])
    return root / "caches" / f"{stem}.{config.tokens}"


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """A part of making the cache in `folder`: the source's rows `start` to `end` - 1.

    If `end` is None, it is the whole cache.
    """

    config: CacheConfig
    folder: Path
    start: int = 0
    end: int | None = None

    @property
    def thing(self) -> str:
        """What only one call may work on at a time; see matryoshka/leases.py."""
        return f"{self.folder} {self}"

    def __str__(self) -> str:
        rows = "text" if self.end is None else f"rows {self.start} to {self.end - 1}"
        return f"caching {rows} of {self.config.split}"

    def do(self, device: torch.device) -> int:
        """Makes the shards that are missing; returns how many. Raises `UserError`."""
        source = load_source(self.config, device)
        make_folder(self.folder, "--volume")  # a Volume may not have kept an empty folder
        if self.end is None:
            return cache_all(self.folder, self.config, source)
        return cache_rows(self.folder, self.config, source, self.start, self.end)


# ------------------------------------------------------------------------------ rows, fetched once


@dataclasses.dataclass(frozen=True)
class FetchedRows(TokenRows):
    """The first rows of a hub dataset, read from a copy of them in the folder `copy`."""

    copy: str = ""

    def read(
        self, start: int, end: int | None, d_vocab: int, block_size: int = 1024
    ) -> Iterator[np.ndarray]:
        """As `TokenRows.read`."""
        return TokenRows(self.copy, self.split).read(start, end, d_vocab, block_size)


@dataclasses.dataclass(frozen=True)
class FetchedConfig(CacheConfig):
    """A `CacheConfig` whose rows are read from the folder `copy`, if that is not empty."""

    copy: str = setting("", is_flag=False)

    @property
    def token_rows(self) -> TokenRows:
        rows = super().token_rows
        if not self.copy:
            return rows
        return FetchedRows(rows.dataset, rows.split, rows.revision, copy=self.copy)


@dataclasses.dataclass(frozen=True)
class _Copying(TokenRows):
    """Rows that are written to the file `to`, as JSON lines, while they are read."""

    to: Path = Path()

    def read(
        self, start: int, end: int | None, d_vocab: int, block_size: int = 1024
    ) -> Iterator[np.ndarray]:
        with self.to.open("w", encoding="utf-8") as file:
            for block in super().read(start, end, d_vocab, block_size):
                file.writelines(json.dumps({"tok_ids": row}) + "\n" for row in block.tolist())
                yield block


def copy_of(config: CacheConfig, root: Path) -> Path:
    """The folder for a copy of as many of a hub dataset's rows as `config.tokens` need."""
    of = [config.dataset, config.dataset_revision, config.tokens, config.keep_begin]
    return root / "rows" / f"{Path(config.dataset).name}.{short_hash(of)}"


def fetched(config: CacheConfig, root: Path, d_vocab: int) -> tuple[FetchedConfig, int, int]:
    """Returns `config` with its rows on the Volume, the number of rows, and of activations.

    A dataset of the hub is downloaded once; its rows are counted and copied as they are read.
    Raises `UserError` if rows are malformed; then no copy is left behind.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(CacheConfig)}
    copy, counts = copy_of(config, root), []
    file, rows = copy / f"{config.split}.jsonl", config.token_rows

    def count(rows: TokenRows) -> None:
        counts.append(count_rows(rows, config.tokens, config.keep_begin, d_vocab))

    made = FetchedConfig(**values, copy="" if os.path.isdir(config.dataset) else str(copy))
    if made.copy and not file.exists():
        print(f"fetching the {config.split} rows of {config.dataset}", flush=True)
        next(rows.read(0, 1, d_vocab))  # raises before a folder is made if there is no such dataset
        copy.mkdir(parents=True, exist_ok=True)
        values_of = (rows.dataset, rows.split, rows.revision)
        write_atomically(file, lambda part: count(_Copying(*values_of, to=part)))
    else:
        print(f"counting the {config.split} rows", flush=True)
        count(made.token_rows)
    return made, *counts[0]


# --------------------------------------------------------------------------------------- caches


def located(config: CacheConfig, root: Path) -> tuple[Path, bool]:
    """The folder of the cache of `config`, or of a larger one to use; and whether it is finished.

    Raises `UserError` if there is no such model, or the folder has a cache of another recipe.
    """
    folder = folder_of(config, root)
    source = load_source(config, torch.device("cpu"))
    found = finished_cache(config, folder, recipe_of(config, source))
    return found or folder, found is not None


def make_cache_jobs(config: CacheConfig, root: Path, n_parts: int) -> list[CacheJob]:
    """The jobs that make the cache of `config`.

    For token ids, these are at most `n_parts` ranges of rows, which are fetched here. For text it
    is one job, because only tokenizing shows where a later part would begin. Raises `UserError` if
    rows are malformed; then no copy is left behind.
    """
    source = load_source(config, torch.device("cpu"))
    if not isinstance(source.rows, IdRows):
        return [CacheJob(config, folder_of(config, root))]
    config, n_rows, n_tokens = fetched(config, root, source.model.d_vocab)
    if n_tokens < config.tokens:
        print(f"the {config.split} split ends after {n_tokens:,} activations", flush=True)
    folder = folder_of(config, root)
    ranges = split_rows(n_rows, config.rows_per_shard, n_parts)
    return [CacheJob(config, folder, start, end) for start, end in ranges]


def finish_caches(jobs: Sequence[CacheJob]) -> None:
    """Writes the manifests of caches, all of whose jobs are done."""
    n_rows = {job.folder: job.end for job in jobs}  # a cache's last job has its last row
    for folder, n in n_rows.items():
        if n is not None:
            finish(folder, n)


def finished_cache(config: CacheConfig, folder: Path, recipe: Recipe) -> Path | None:
    """The folder of a finished cache to use for `config`; None if there is none.

    It is `folder`, or, for the train split, the smallest larger cache. Raises `UserError` if one of
    these names has another recipe, such as other weights.
    """
    if is_complete(folder, recipe):
        return folder
    if config.split != "train":  # an evaluation is on exactly the tokens that were asked for
        return None
    for larger in larger_caches(folder):
        # It may hold fewer tokens than its name says, if the dataset has no more.
        holds_it = read_record(larger / MANIFEST).n_tokens >= config.tokens
        if holds_it and is_complete(larger, recipe):
            return larger
    return None


def larger_caches(folder: Path) -> list[Path]:
    """Finished caches beside `folder` that differ from it only in more tokens, smallest first."""
    if not folder.parent.is_dir():
        return []
    sizes = {}
    for other in folder.parent.iterdir():
        n_tokens = other.suffix[1:]
        if other.stem == folder.stem and n_tokens.isdecimal() and (other / MANIFEST).exists():
            sizes[other] = int(n_tokens)
    own_size = int(folder.suffix[1:])
    return sorted((f for f, n in sizes.items() if n > own_size), key=sizes.__getitem__)


def copied_near(cache: Path) -> Path:
    """The cache's folder if it fits on the GPU; otherwise a copy of it on this machine's disk.

    A cache that fits is read once, in order. One that does not fit is read in small pieces during
    training, which is slow from a Volume, so it is copied first.
    """
    if fits_on_gpu(cache):
        return cache
    print(f"{cache.name} does not fit on the GPU: copying it to this container's disk", flush=True)
    copy = Path(tempfile.gettempdir()) / cache.name
    return Path(shutil.copytree(cache, copy, dirs_exist_ok=True))


def fits_on_gpu(cache: Path) -> bool:
    """Whether training will hold the cache on the GPU; True if there is no GPU."""
    if not torch.cuda.is_available():
        return True
    n_bytes = sum(path.stat().st_size for path in cache.glob("*.acts"))
    return n_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info()[0]
