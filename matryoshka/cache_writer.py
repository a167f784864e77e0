"""Writes a cache: takes activations from a source, and writes them to disk in shards.

After an interruption, the same settings continue after the last finished shard and end with the
same bytes. Several machines can share the work: call `source.count` once, `cache_rows` for each
range of `split_rows`, and `finish` once. `cache_all` does the same on one machine.
"""

import contextlib
import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_config import CacheConfig
from matryoshka.cache_format import (
    DTYPES,
    MANIFEST,
    SHARD_NAME,
    Recipe,
    Record,
    Shard,
    bytes_each,
    make_recipe,
    read_record,
    shard_name,
    shard_records,
    whole_number,
    write_record,
    wrong_size,
)
from matryoshka.errors import UserError
from matryoshka.files import write_atomically
from matryoshka.sources import Block, Source

# ------------------------------------------------------------------------ what a cache is made of


def recipe_of(config: CacheConfig, source: Source) -> Recipe:
    """What a cache is made of. Two caches with the same recipe hold the same activations.

    The batch size and the device are not in it, because they change activations only by float32's
    rounding. A dataset on the hub is identified by its revision only; whether its rows have changed
    is found by comparing them with the tokens of finished shards.
    """
    settings = {name: getattr(config, name) for name in ("tokens", "dtype", "rows_per_shard")}
    return make_recipe({**source.identity(), **settings, "d_model": source.d_model})


def require_same_recipe(found: Recipe, wanted: Recipe, folder: Path) -> None:
    """Raises `UserError` naming the first key in which the recipe of the cache in `folder` differs.

    The names of the model and its tokenizer may differ, because their hashes are compared.
    """
    for key in wanted:
        if key not in ("model", "model_revision", "tokenizer") and found.get(key) != wanted[key]:
            raise UserError(
                f"{folder} holds another cache: its {key} is {found.get(key)}, expected "
                f"{wanted[key]}; give another --out, or delete that folder"
            )


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` already holds the cache of this recipe, or one of more tokens.

    Raises `UserError` if it holds a cache of another recipe, finished or not. A finished cache of
    format 1 recorded fewer keys, and is compared in those.
    """
    if not os.path.exists(folder / MANIFEST):
        for path in shard_records(folder):
            require_same_recipe(read_record(path).recipe, recipe, folder)
        return False
    manifest = read_record(folder / MANIFEST)
    found = manifest.recipe
    if found["format"] == 1:
        recipe = {key: recipe[key] for key in recipe if key in found and key != "format"}
    if manifest.n_tokens >= recipe["tokens"]:
        found = {**found, "tokens": recipe["tokens"]}
    require_same_recipe(found, recipe, folder)
    return not any(wrong_size(folder, shard, bytes_each(found)) for shard in manifest.shards)


# ------------------------------------------------------------------------------------- one shard


def finished_shard(folder: Path, rows: tuple[int, int], recipe: Recipe) -> Shard | None:
    """The shard of dataset rows `rows`; None if `folder` lacks it or a file has a wrong size.

    Raises `UserError` if it is of another recipe.
    """
    name = shard_name(rows[0], recipe)
    if not os.path.exists(folder / f"{name}.json"):
        return None
    found = read_record(folder / f"{name}.json")
    require_same_recipe(found.recipe, recipe, folder)
    shard = found.shards[0]
    has_all_bytes = not wrong_size(folder, shard, bytes_each(recipe))
    is_of_rows = (shard.name, shard.first_row, shard.end_row) == (name, *rows)
    return shard if has_all_bytes and is_of_rows else None


def require_same_rows(folder: Path, shard: Shard, block: Block, source: Source) -> None:
    """Raises `UserError` if a finished shard was not made from the rows in `block`."""
    if hashlib.sha256(block.tokens.data).hexdigest() != shard.tokens_sha256:
        raise UserError(
            f"{folder}: rows {shard.first_row} to {shard.end_row - 1} of {source.name} have "
            f"changed since shard {shard.name} was made of them; give another --out, or delete "
            "that folder"
        )


def compute_shard(block: Block, d_model: int, dtype: torch.dtype, where: str) -> Tensor:
    """The activations of `block`, [n, d_model] in `dtype`, on the device that they come from.

    where: what error messages call them. Raises `UserError` if one is too large for the dtype.
    """
    n_tokens, n_done = len(block.tokens), 0
    acts = torch.empty(n_tokens, d_model, dtype=dtype)
    peak = torch.zeros(())  # the largest activation, on the device, so that nothing waits for it
    for part in block.activations():
        if n_done == 0:
            acts, peak = acts.to(part.device), peak.to(part.device)
        lowest, highest = part.aminmax()
        peak = torch.maximum(peak, torch.maximum(highest, -lowest))
        acts[n_done : n_done + len(part)] = part
        n_done += len(part)
    if n_done != n_tokens:
        raise ValueError(f"{where}: {n_tokens} tokens, and {n_done} activations")
    _require_representable(peak, dtype, where)
    return acts


def _require_representable(peak: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raises `UserError` unless `peak`, [], the largest activation, is finite in the dtype."""
    if not peak.isfinite():
        raise UserError(f"activations are not finite in {where}")
    if peak.to(dtype).isinf():
        name = str(dtype).removeprefix("torch.")
        wider = "float32" if name == "bfloat16" else "bfloat16 or float32"
        raise UserError(
            f"activations reach {peak.item():.6g} in {where}: --dtype {name} holds "
            f"{torch.finfo(dtype).max:.6g} at most; use {wider}"
        )


@contextlib.contextmanager
def refusing_too_large(what: str) -> Iterator[None]:
    """Turns an error of too little memory into a `UserError` that says it was for `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"too little memory for {what}") from error


def write_shard(
    folder: Path, acts: Tensor, tokens: np.ndarray, rows: tuple[int, int], recipe: Recipe
) -> None:
    """Writes the shard of dataset rows `rows`, its record last.

    acts: [n, d_model] in the cache's dtype; tokens: int32 [n, 3]. Raises `UserError` if it cannot
    be written, for example because the disk is full.
    """
    name = shard_name(rows[0], recipe)
    # As bytes, because numpy has no bfloat16.
    acts_bytes = acts.cpu().view(torch.uint8).numpy().reshape(-1).data
    tokens_bytes = tokens.reshape(-1).view(np.uint8).data
    shard = Shard(
        name,
        *rows,
        n_tokens=len(tokens),
        acts_sha256=hashlib.sha256(acts_bytes).hexdigest(),
        tokens_sha256=hashlib.sha256(tokens_bytes).hexdigest(),
    )
    try:
        write_atomically(folder / f"{name}.acts", lambda part: part.write_bytes(acts_bytes))
        write_atomically(folder / f"{name}.tokens", lambda part: part.write_bytes(tokens_bytes))
        record = Record(recipe, len(tokens), rows[1] - rows[0], [shard])
        write_record(folder / f"{name}.json", record)
    except OSError as error:
        raise UserError(
            f"shard {name}: {error}; finished shards are kept, and the same command continues "
            "after them"
        ) from error


# ------------------------------------------------------------------------------------ all shards


def shard_ranges(start: int, end: int, rows_per_shard: int) -> list[tuple[int, int]]:
    """The rows of each shard from row `start` up to row `end`.

    Raises `ValueError` unless a shard begins at `start`.
    """
    if start % rows_per_shard:
        raise ValueError(
            f"start must be a multiple of rows_per_shard, {rows_per_shard}, got {start}"
        )
    firsts = range(start, end, rows_per_shard)
    return [(first, min(first + rows_per_shard, end)) for first in firsts]


def split_rows(n_rows: int, rows_per_shard: int, n_parts: int) -> list[tuple[int, int]]:
    """Rows 0 up to `n_rows` as at most `n_parts` ranges of whole shards, as equal as possible.

    Raises `ValueError` unless `n_parts` is 1 or more.
    """
    whole_number("n_parts", n_parts, 1)
    n_shards = math.ceil(n_rows / rows_per_shard)
    cuts = [n_shards * i // n_parts * rows_per_shard for i in range(n_parts + 1)]
    ranges = [(start, min(end, n_rows)) for start, end in itertools.pairwise(cuts)]
    return [(start, end) for start, end in ranges if start < end]


class _BackgroundWriter:
    """Writes a shard while the next one is computed; never more than one at a time."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder, self._pool = folder, pool
        self._writing: Future[None] | None = None

    def write(self, *shard: Any) -> None:
        """Starts `write_shard(folder, *shard)`, once the shard before it is written."""
        self.wait()
        self._writing = self._pool.submit(write_shard, self._folder, *shard)

    def wait(self) -> None:
        """Waits for the shard that is being written. Raises what `write_shard` raised."""
        if self._writing is not None:
            self._writing.result()


def _read_ahead(blocks: Iterator[Block], pool: ThreadPoolExecutor) -> Iterator[Block]:
    """The blocks; the next one is read in `pool` while the caller works on one."""
    ahead = pool.submit(next, blocks, None)
    while (block := ahead.result()) is not None:
        ahead = pool.submit(next, blocks, None)
        yield block


def cache_all(folder: Path, config: CacheConfig, source: Source) -> int:
    """Caches the first `config.tokens` activations of `source`, and writes the manifest.

    Returns how many shards it wrote; shards that are finished already are kept. Raises `UserError`
    if there is nothing to cache, and what `cache_rows` and `finish` raise.
    """
    n_rows = source.count(config.tokens)
    if n_rows is not None:
        n_written = cache_rows(folder, config, source, 0, n_rows)
    else:
        recipe = recipe_of(config, source)
        n_written, n_rows = _cache_blocks(folder, config, source, recipe, 0, None)
    if n_rows == 0:
        raise UserError(f"{source.name} holds nothing to cache")
    finish(folder, n_rows)
    return n_written


def cache_rows(folder: Path, config: CacheConfig, source: Source, start: int, end: int) -> int:
    """Caches the source's rows `start` up to `end` in `folder`; finished shards there are kept.

    `start` must be a multiple of `rows_per_shard`, and so must `end`, unless it is the number of
    rows. Returns how many shards it wrote. Separate processes can cache ranges that do not overlap
    at the same time. Raises `UserError` if the rows of a finished shard have changed, and what the
    functions above raise.
    """
    recipe = recipe_of(config, source)
    ranges = shard_ranges(start, end, config.rows_per_shard)
    if all(finished_shard(folder, rows, recipe) for rows in ranges):
        return 0
    n_written, n_rows = _cache_blocks(folder, config, source, recipe, start, end)
    if n_rows != end - start:
        raise UserError(f"{source.name} ended before row {end}: it has changed, or was cut off")
    return n_written


def _cache_blocks(
    folder: Path, config: CacheConfig, source: Source, recipe: Recipe, start: int, end: int | None
) -> tuple[int, int]:
    """Like `cache_rows`, but caches all rows from `start` on if `end` is None.

    Returns how many shards it wrote, and how many rows from `start` on are in finished shards.
    """
    first, n_written = start, 0
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(1) as writing,
        ThreadPoolExecutor(1) as reading,
        _Progress(None if end is None else end - start) as progress,
    ):
        writer = _BackgroundWriter(folder, writing)
        for block in _read_ahead(source.blocks(start, end, config.rows_per_shard), reading):
            rows = (first, first + block.n_rows)
            # The rows ended early. A shorter shard would later be taken for one of other rows.
            if end is not None and rows[1] < min(end, first + config.rows_per_shard):
                break
            shard = finished_shard(folder, rows, recipe)
            if shard is not None:
                require_same_rows(folder, shard, block, source)
            else:
                where = f"rows {rows[0]} to {rows[1] - 1} of {source.name}"
                with refusing_too_large(
                    f"a shard of {config.rows_per_shard} rows in batches of {config.batch_size}: "
                    "give a smaller --batch-size or --rows-per-shard"
                ):
                    acts = compute_shard(block, source.d_model, DTYPES[config.dtype], where)
                writer.write(acts, block.tokens, rows, recipe)
                n_written += 1
            progress.add(block.n_rows, 0 if shard else len(block.tokens))
            first = rows[1]
        writer.wait()
    return n_written, first - start


class _Progress(tqdm):  # type: ignore[misc]
    """A progress bar of rows and tokens/s. n_rows: how many rows there are, None if unknown."""

    def __init__(self, n_rows: int | None) -> None:
        super().__init__(total=n_rows, unit=" rows", desc="caching", mininterval=1)
        self._n_tokens, self._began = 0, time.monotonic()

    def add(self, n_rows: int, n_tokens: int) -> None:
        """Adds `n_rows` finished rows, for which `n_tokens` activations were computed now."""
        self._n_tokens += n_tokens
        rate = self._n_tokens / (time.monotonic() - self._began)
        self.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.update(n_rows)


def finish(folder: Path, n_rows: int) -> Record:
    """Writes and returns the manifest of a cache whose `n_rows` rows are all in finished shards.

    Raises `UserError` naming the first shard that is not finished.
    """
    first = folder / f"{0:05d}.json"
    if not os.path.exists(first):
        raise UserError(f"{folder} holds no finished shard 00000")
    recipe = read_record(first).recipe
    shards = []
    for rows in shard_ranges(0, n_rows, recipe["rows_per_shard"]):
        shard = finished_shard(folder, rows, recipe)
        if shard is None:
            raise UserError(
                f"{folder}: shard {shard_name(rows[0], recipe)}, rows {rows[0]} to "
                f"{rows[1] - 1}, is not finished; cache those rows again"
            )
        shards.append(shard)
    clear_leftovers(folder)
    n_tokens = min(recipe["tokens"], sum(shard.n_tokens for shard in shards))
    manifest = Record(recipe, n_tokens, n_rows, shards)
    write_record(folder / MANIFEST, manifest)
    return manifest


def clear_leftovers(folder: Path) -> None:
    """Removes half-written files that a killed writer left behind.

    No other process may be writing. Files that cannot be removed stay, and do no harm.
    """
    for path in folder.iterdir():
        if re.fullmatch(rf"\.({SHARD_NAME}|manifest)\.(acts|tokens|json)\..*", path.name):
            with contextlib.suppress(OSError):
                path.unlink()
