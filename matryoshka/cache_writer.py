"""The writer of a cache: a source of activations -> shards of them on disk.

Whatever is interrupted, the same settings go on after the last finished shard and end with the
same bytes. Several machines can share the work: `source.count` once, `cache_rows` for each of
`split_rows`, `finish` once; `cache_all` is those three in a row.
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
    """What a cache is made of: two caches whose recipes agree hold the same activations.

    Batch size and device are not in it: they move activations by float32's rounding only. Of a
    dataset on the hub there is the revision only; the tokens of finished shards say whether its
    rows have changed.
    """
    settings = {name: getattr(config, name) for name in ("tokens", "dtype", "rows_per_shard")}
    return make_recipe({**source.identity(), **settings, "d_model": source.d_model})


def require_same_recipe(found: Recipe, wanted: Recipe, folder: Path) -> None:
    """Raises `UserError` naming the first item in which the cache in `folder` differs.

    Names of the model and its tokenizer may differ: their hashes say whether they are the same.
    """
    for key in wanted:
        if key not in ("model", "model_revision", "tokenizer") and found.get(key) != wanted[key]:
            raise UserError(
                f"{folder} holds another cache: its {key} is {found.get(key)}, asked for is "
                f"{wanted[key]}; give another --out, or delete that folder"
            )


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` already holds the cache of this recipe, or one of more tokens.

    Raises `UserError` if what it holds, finished or not, is of another recipe. A finished cache of
    an earlier format is compared in what it recorded.
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
    """The shard of dataset rows `rows` if it is in `folder`, and its files have their lengths.

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
    """Raises `UserError` where a finished shard was not made of the rows in `block`."""
    if hashlib.sha256(block.tokens.data).hexdigest() != shard.tokens_sha256:
        raise UserError(
            f"{folder}: shard {shard.name} was made of other rows {shard.first_row} to "
            f"{shard.end_row - 1} than {source.name} has now; give another --out, or "
            "delete that folder"
        )


def compute_shard(block: Block, d_model: int, dtype: torch.dtype, where: str) -> Tensor:
    """The activations of `block`, [n, d_model] in `dtype`, on the device that they come from.

    `where`: which these are, in messages. Raises `UserError` if one does not fit the dtype.
    """
    n_tokens, n_done = len(block.tokens), 0
    acts = torch.empty(n_tokens, d_model, dtype=dtype)
    peak = torch.zeros(())  # largest activation, kept on the device: no sync
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
    """Raises `UserError` unless activations of up to `peak`, [], are numbers in the dtype."""
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
    """A `UserError` where memory ends: there is too little for `what`."""
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

    `acts` [n, d_model] in the cache's dtype, `tokens` int32 [n, 3]. Raises `UserError` where it
    cannot be written, a full disk among others.
    """
    name = shard_name(rows[0], recipe)
    # numpy has no bfloat16: as bytes, every dtype is alike
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
            f"shard {name}: {error}; finished shards are kept, and the same command goes on from "
            "there"
        ) from error


# ------------------------------------------------------------------------------------ all shards


def shard_ranges(start: int, end: int, rows_per_shard: int) -> list[tuple[int, int]]:
    """Rows `start` up to `end`, shard by shard. Raises `ValueError` unless a shard begins there."""
    if start % rows_per_shard:
        raise ValueError(
            f"start must be a multiple of rows_per_shard, {rows_per_shard}, got {start}"
        )
    firsts = range(start, end, rows_per_shard)
    return [(first, min(first + rows_per_shard, end)) for first in firsts]


def split_rows(n_rows: int, rows_per_shard: int, n_parts: int) -> list[tuple[int, int]]:
    """Rows 0 up to `n_rows` as at most `n_parts` ranges of whole shards, as even as can be.

    Raises `ValueError` where `n_parts` is not 1 or more.
    """
    whole_number("n_parts", n_parts, 1)
    n_shards = math.ceil(n_rows / rows_per_shard)
    cuts = [n_shards * i // n_parts * rows_per_shard for i in range(n_parts + 1)]
    ranges = [(start, min(end, n_rows)) for start, end in itertools.pairwise(cuts)]
    return [(start, end) for start, end in ranges if start < end]


class _BackgroundWriter:
    """Writes a shard while the next one is computed: one shard ahead, never two."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder, self._pool = folder, pool
        self._writing: Future[None] | None = None

    def write(self, *shard: Any) -> None:
        """`write_shard(folder, *shard)`, once the last one is written."""
        self.wait()
        self._writing = self._pool.submit(write_shard, self._folder, *shard)

    def wait(self) -> None:
        """Waits for what is being written. Raises what `write_shard` did."""
        if self._writing is not None:
            self._writing.result()


def _read_ahead(blocks: Iterator[Block], pool: ThreadPoolExecutor) -> Iterator[Block]:
    """The blocks; the next one is being read while one is computed."""
    ahead = pool.submit(next, blocks, None)
    while (block := ahead.result()) is not None:
        ahead = pool.submit(next, blocks, None)
        yield block


def cache_all(folder: Path, config: CacheConfig, source: Source) -> int:
    """Caches the first `config.tokens` activations of `source`, and finishes the cache.

    Returns how many shards it wrote; finished ones are kept. Raises `UserError` where there is
    nothing to cache, and see `cache_rows` and `finish`.
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

    `start` is a multiple of `rows_per_shard`, and so is `end`, unless it is the end of all rows.
    Returns how many shards it wrote. Ranges that do not overlap can be cached at once by separate
    processes. Raises `UserError` where the rows of a finished shard have changed, and see the
    functions above.
    """
    recipe = recipe_of(config, source)
    ranges = shard_ranges(start, end, config.rows_per_shard)
    if all(finished_shard(folder, rows, recipe) for rows in ranges):
        return 0
    n_written, n_rows = _cache_blocks(folder, config, source, recipe, start, end)
    if n_rows != end - start:
        raise UserError(f"{source.name} ended before row {end}: it has changed, or was cut")
    return n_written


def _cache_blocks(
    folder: Path, config: CacheConfig, source: Source, recipe: Recipe, start: int, end: int | None
) -> tuple[int, int]:
    """`cache_rows`, up to where the rows end if `end` is None: how many shards it wrote, and of
    how many rows there are shards now."""
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
            # The rows may end early. A shard cut short would be taken for one of other rows.
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
    """A bar of rows, of which there are `n_rows` or nobody knows how many, with the speed."""

    def __init__(self, n_rows: int | None) -> None:
        super().__init__(total=n_rows, unit=" rows", desc="caching", mininterval=1)
        self._n_tokens, self._began = 0, time.monotonic()

    def add(self, n_rows: int, n_tokens: int) -> None:
        """`n_rows` are done, and `n_tokens` activations of them were computed."""
        self._n_tokens += n_tokens
        rate = self._n_tokens / (time.monotonic() - self._began)
        self.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.update(n_rows)


def finish(folder: Path, n_rows: int) -> Record:
    """Writes the manifest of a cache whose `n_rows` rows are all in finished shards; returns it.

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
    """Removes half-written files that a killed writer left behind. Nobody else may be writing.

    What cannot be removed stays, and does no harm.
    """
    for path in folder.iterdir():
        if re.fullmatch(rf"\.({SHARD_NAME}|manifest)\.(acts|tokens|json)\..*", path.name):
            with contextlib.suppress(OSError):
                path.unlink()
