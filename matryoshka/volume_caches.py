"""Caches in a folder that comparisons share, such as a Modal Volume: each is made once.

A cache's folder is named by what it is made of, so that the next comparison finds it.
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

# Settings that every folder's name stands for. Of others that shape activations it stands for those
# that are not at their default: so a folder keeps its name when there are more settings.
ALWAYS_NAMED = (
    *("model", "model_revision", "dataset", "dataset_revision", "split"),
    *("layer", "dtype", "keep_begin", "rows_per_shard"),
)
NOT_NAMED = ("tokens", "batch_size")  # they do not change the activations


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits of a value that JSON has."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def folder_of(config: CacheConfig, root: Path) -> Path:
    """Where the cache of `config` goes: root/caches/MODEL.DATASET.SPLIT.layerN.DTYPE.HASH.TOKENS"""
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
    """The source's rows `start` up to `end`, for the cache in `folder`; all of it where `end` is
    None."""

    config: CacheConfig
    folder: Path
    start: int = 0
    end: int | None = None

    @property
    def thing(self) -> str:
        """What no two may work on at once."""
        return f"{self.folder} {self}"

    def __str__(self) -> str:
        rows = "text" if self.end is None else f"rows {self.start} to {self.end - 1}"
        return f"caching {rows} of {self.config.split}"

    def do(self, device: torch.device) -> int:
        """Makes the shards that are missing; returns how many. Raises `UserError`."""
        source = load_source(self.config, device)
        make_folder(self.folder, "--volume")  # a Volume may not have kept an empty one
        if self.end is None:
            return cache_all(self.folder, self.config, source)
        return cache_rows(self.folder, self.config, source, self.start, self.end)


# ------------------------------------------------------------------------------ rows, fetched once


@dataclasses.dataclass(frozen=True)
class FetchedRows(TokenRows):
    """A hub dataset's rows, read from a copy of the first of them in the folder `copy`."""

    copy: str = ""

    def read(
        self, start: int, end: int | None, d_vocab: int, block_size: int = 1024
    ) -> Iterator[np.ndarray]:
        """As `TokenRows.read`."""
        return TokenRows(self.copy, self.split).read(start, end, d_vocab, block_size)


@dataclasses.dataclass(frozen=True)
class FetchedConfig(CacheConfig):
    """A `CacheConfig` whose rows are `FetchedRows`, where `copy` says where they are."""

    copy: str = setting("", is_flag=False)

    @property
    def token_rows(self) -> TokenRows:
        rows = super().token_rows
        if not self.copy:
            return rows
        return FetchedRows(rows.dataset, rows.split, rows.revision, copy=self.copy)


@dataclasses.dataclass(frozen=True)
class _Copying(TokenRows):
    """Rows that are written to a file as JSON lines as they are read."""

    to: Path = Path()

    def read(
        self, start: int, end: int | None, d_vocab: int, block_size: int = 1024
    ) -> Iterator[np.ndarray]:
        with self.to.open("w") as file:
            for block in super().read(start, end, d_vocab, block_size):
                file.writelines(json.dumps({"tok_ids": row}) + "\n" for row in block.tolist())
                yield block


def copy_of(config: CacheConfig, root: Path) -> Path:
    """The folder of the copy of a hub dataset's rows: as many as `config.tokens` need."""
    of = [config.dataset, config.dataset_revision, config.tokens, config.keep_begin]
    return root / "rows" / f"{Path(config.dataset).name}.{short_hash(of)}"


def fetched(config: CacheConfig, root: Path, d_vocab: int) -> tuple[FetchedConfig, int, int]:
    """`config` with its rows on the Volume, and what `count_rows` says of them.

    A dataset on the hub is read once, counted meanwhile, and copied. Raises `UserError` where the
    rows are not right; then nothing is left behind.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(CacheConfig)}
    copy, counts = copy_of(config, root), []
    file, rows = copy / f"{config.split}.jsonl", config.token_rows

    def count(rows: TokenRows) -> None:
        counts.append(count_rows(rows, config.tokens, config.keep_begin, d_vocab))

    made = FetchedConfig(**values, copy="" if os.path.isdir(config.dataset) else str(copy))
    if made.copy and not file.exists():
        print(f"fetching the {config.split} rows of {config.dataset}", flush=True)
        next(rows.read(0, 1, d_vocab))  # there is such a dataset: only now a folder is made
        copy.mkdir(parents=True, exist_ok=True)
        values_of = (rows.dataset, rows.split, rows.revision)
        write_atomically(file, lambda part: count(_Copying(*values_of, to=part)))
    else:
        print(f"counting the {config.split} rows", flush=True)
        count(made.token_rows)
    return made, *counts[0]


# --------------------------------------------------------------------------------------- caches


def located(config: CacheConfig, root: Path) -> tuple[Path, bool]:
    """The folder of the cache of `config`, or of one that holds it; and whether it is finished.

    Raises `UserError` where there is no such model, or a cache of that name is of another recipe.
    """
    folder = folder_of(config, root)
    source = load_source(config, torch.device("cpu"))
    found = finished_cache(config, folder, recipe_of(config, source))
    return found or folder, found is not None


def make_cache_jobs(config: CacheConfig, root: Path, n_parts: int) -> list[CacheJob]:
    """The jobs that make the cache of `config`: of token ids in at most `n_parts` parts, from
    fetched rows; of text in one, since where a part begins only tokenizing shows.

    Raises `UserError` where the rows are not right; then nothing is left behind.
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
    """Finishes the caches whose jobs, all of them, are done."""
    n_rows = {job.folder: job.end for job in jobs}  # a cache's last job has its last row
    for folder, n in n_rows.items():
        if n is not None:
            finish(folder, n)


def finished_cache(config: CacheConfig, folder: Path, recipe: Recipe) -> Path | None:
    """The cache in `folder`, or for training the smallest finished one that holds it.

    Raises `UserError` where one of that name is of another recipe: other weights, say.
    """
    if is_complete(folder, recipe):
        return folder
    if config.split != "train":  # figures on the validation split are of exactly what was asked
        return None
    for larger in larger_caches(folder):
        # One may hold no more than the dataset had.
        holds_it = read_record(larger / MANIFEST).n_tokens >= config.tokens
        if holds_it and is_complete(larger, recipe):
            return larger
    return None


def larger_caches(folder: Path) -> list[Path]:
    """Finished caches beside `folder` that differ from it in having more tokens, by how many."""
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
    """The cache's folder, or a copy on this machine's disk where it does not fit on the GPU.

    One that fits is read once, in order. One that does not would be streamed in small pieces, which
    a Volume is slow at; so it is copied, file by file, and streamed from there.
    """
    if fits_on_gpu(cache):
        return cache
    print(f"{cache.name} does not fit on the GPU: copying it to this container's disk", flush=True)
    copy = Path(tempfile.gettempdir()) / cache.name
    return Path(shutil.copytree(cache, copy, dirs_exist_ok=True))


def fits_on_gpu(cache: Path) -> bool:
    """Whether training will hold the cache on the GPU; without one there is nothing to decide."""
    if not torch.cuda.is_available():
        return True
    n_bytes = sum(path.stat().st_size for path in cache.glob("*.acts"))
    return n_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info()[0]
