"""Caches in a folder that comparisons share, such as a Modal Volume: each is made once.

A cache's folder is named by what it is made of, so that the next comparison finds it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka.cache_config import CacheConfig, load_source
from matryoshka.cache_format import MANIFEST, Recipe, read_record
from matryoshka.cache_writer import finish, is_complete, recipe_of, split_rows
from matryoshka.files import make_folder
from matryoshka.token_rows import count_rows

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
    """Dataset rows `start` up to `end`, for the cache in `folder`."""

    config: CacheConfig
    folder: Path
    start: int
    end: int

    def __str__(self) -> str:
        return f"caching rows {self.start} to {self.end - 1} of {self.config.split}"


def make_caches(
    wanted: Sequence[tuple[CacheConfig, int]],
    root: Path,
    run_all: Callable[[Sequence[CacheJob]], object],
    commit: Callable[[], object],
) -> list[Path]:
    """The folders of finished caches, made where missing.

    wanted: how each is made, and in how many parts at once. `run_all` caches what the jobs say and
    returns when all are done; `commit` makes what was written visible to others. Raises
    `UserError` where a setting, the model or the rows are not right.
    """
    folders: list[Path] = []
    jobs: list[CacheJob] = []
    n_rows_of: dict[Path, int] = {}
    for config, n_parts in wanted:
        folder, source = folder_of(config, root), load_source(config, torch.device("cpu"))
        found = finished_cache(config, folder, recipe_of(config, source))
        folders.append(found or folder)
        if found:
            print(f"{found} is complete: no token is read, no language model run", flush=True)
            continue
        make_folder(folder, "--volume")
        print(f"counting rows for {folder}", flush=True)
        d_vocab = source.model.d_vocab
        counted = count_rows(config.token_rows, config.tokens, config.keep_begin, d_vocab)
        n_rows_of[folder], n_tokens = counted
        if n_tokens < config.tokens:
            print(f"the {config.split} split ends after {n_tokens:,} activations", flush=True)
        ranges = split_rows(n_rows_of[folder], config.rows_per_shard, n_parts)
        jobs += [CacheJob(config, folder, start, end) for start, end in ranges]
    if jobs:
        commit()
        run_all(jobs)
        for folder, n_rows in n_rows_of.items():
            finish(folder, n_rows)
        commit()
    return folders


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
