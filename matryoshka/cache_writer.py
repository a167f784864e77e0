"""The writer of a cache: rows of token ids -> language model -> shards of activations on disk.

Whatever is interrupted, the same settings go on after the last finished shard and end with the
same bytes. Several machines can share the work: `count_rows` once, `cache_rows` for each of
`split_rows`, `finish` once; `cache_activations.run` is those three in a row.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_format import (
    DTYPES,
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    Recipe,
    Record,
    Shard,
    bytes_each,
    read_record,
    shard_name,
    shard_records,
    whole_number,
    write_record,
    wrong_size,
)
from matryoshka.command_line import setting
from matryoshka.errors import UserError
from matryoshka.files import write_atomically
from matryoshka.tiny_model import TinyModel
from matryoshka.token_rows import TokenRows, kept_positions

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a cache is made of."""

    model: str = setting("noanabeshima/tiny_model", "weights: a hub repo, a file or a folder")
    model_revision: str | None = setting(None, "the hub model's branch, tag or commit")
    dataset: str = setting(
        "noanabeshima/TinyModelTokIds", "token ids: a hub dataset, or a folder of SPLIT.jsonl"
    )
    dataset_revision: str | None = setting(None, "the hub dataset's branch, tag or commit")
    split: str = setting("train", "which SPLIT.jsonl of the dataset")
    tokens: int = setting(30_000_000, "activations to cache")
    layer: int = setting(3, "residual stream at the input of this block, blocks counted from 0")
    dtype: Dtype = setting("float16", "what activations are stored in")
    keep_begin: bool = setting(False, "cache [BEGIN] positions too")
    batch_size: int = setting(64, "rows a forward pass")
    rows_per_shard: int = setting(1024, "dataset rows a shard; held in memory while it is computed")

    @property
    def token_rows(self) -> TokenRows:
        """The dataset's rows."""
        return TokenRows(self.dataset, self.split, self.dataset_revision)

    def check(self) -> None:
        """Raises `UserError` naming a setting that is impossible for every model and dataset."""
        limits = {"tokens": 10**12, "batch_size": 10**6, "rows_per_shard": 10**6}
        for name, most in limits.items():
            try:
                whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
            except ValueError as error:
                raise UserError(str(error)) from None
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")


def load_model(config: CacheConfig, device: torch.device) -> TinyModel:
    """The language model, on `device`. Raises `UserError` if it has no such layer."""
    model = TinyModel.from_pretrained(config.model, config.model_revision, device)
    model.check_layer(config.layer)
    return model


# ------------------------------------------------------------------------ what a cache is made of


def recipe_of(config: CacheConfig, model: TinyModel) -> Recipe:
    """What a cache is made of: two caches whose recipes agree hold the same activations.

    Batch size and device are not in it: they move activations by float32's rounding only. Of a
    dataset on the hub there is the revision only; `cache_rows` looks whether its rows have changed.
    """
    return {
        "format": FORMAT,
        "model": config.model,
        "weights_hash": model.weights_hash,
        **config.token_rows.identity(),
        "tokens": config.tokens,
        "layer": config.layer,
        "dtype": config.dtype,
        "d_model": model.d_model,
        "keep_begin": config.keep_begin,
        "rows_per_shard": config.rows_per_shard,
    }


def require_same_recipe(found: Recipe, wanted: Recipe, folder: Path) -> None:
    """Raises `UserError` naming the first item in which the cache in `folder` differs.

    The model's name may differ: its weights' hash says whether it is the same.
    """
    for key in wanted:
        if key != "model" and found.get(key) != wanted[key]:
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
    if found["format"] != FORMAT:
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


def kept_tokens(rows: np.ndarray, first_row: int, keep_begin: bool) -> np.ndarray:
    """Token id, row and position of what is cached of `rows` [n_rows, seq]: int32 [n, 3]."""
    kept = kept_positions(rows, keep_begin)
    row, position = np.nonzero(kept)
    return np.stack([rows[kept], row + first_row, position], axis=1).astype("<i4")


def require_same_rows(folder: Path, shard: Shard, rows: np.ndarray, config: CacheConfig) -> None:
    """Raises `UserError` where a finished shard was not made of these rows, [n_rows, seq]."""
    tokens = kept_tokens(rows, shard.first_row, config.keep_begin)
    if hashlib.sha256(tokens.data).hexdigest() != shard.tokens_sha256:
        raise UserError(
            f"{folder}: shard {shard.name} was made of other rows {shard.first_row} to "
            f"{shard.end_row - 1} than {config.token_rows.file} has now; give another --out, or "
            "delete that folder"
        )


def compute_shard(
    model: TinyModel, rows: np.ndarray, first_row: int, config: CacheConfig
) -> tuple[Tensor, np.ndarray]:
    """The activations of `rows` [n_rows, seq] that are kept, and where each comes from.

    Returns acts [n, d_model] in the cache's dtype on the model's device, and int32 [n, 3] of
    token id, row and position. Raises `UserError` if an activation does not fit the dtype.
    """
    kept = kept_positions(rows, config.keep_begin)  # [n_rows, seq]
    tokens = kept_tokens(rows, first_row, config.keep_begin)
    device = model.pos_embed.device
    acts = torch.empty(len(tokens), model.d_model, dtype=DTYPES[config.dtype], device=device)
    peak = torch.zeros((), device=device)  # largest activation, kept on the device: no sync
    n_done = 0
    for i in range(0, len(rows), config.batch_size):
        part = slice(i, i + config.batch_size)
        index = torch.from_numpy(np.flatnonzero(kept[part])).to(device)
        if len(index) == 0:
            continue
        residual = model.residual(torch.from_numpy(rows[part]).to(device), config.layer)
        batch = residual.flatten(0, 1).index_select(0, index)  # [n, d_model], float32
        peak = torch.maximum(peak, batch.abs().amax())
        acts[n_done : n_done + len(index)] = batch
        n_done += len(index)
    _require_representable(peak, config, f"rows {first_row} to {first_row + len(rows) - 1}")
    return acts, tokens


def _require_representable(peak: Tensor, config: CacheConfig, where: str) -> None:
    """Raises `UserError` unless activations of up to `peak`, [], are numbers in the dtype."""
    if not peak.isfinite():
        raise UserError(
            f"the model's activations at layer {config.layer} are not finite in {where}"
        )
    if peak.to(DTYPES[config.dtype]).isinf():
        wider = "float32" if config.dtype == "bfloat16" else "bfloat16 or float32"
        raise UserError(
            f"activations reach {peak.item():.6g} in {where}: --dtype {config.dtype} holds "
            f"{torch.finfo(DTYPES[config.dtype]).max:.6g} at most; use {wider}"
        )


@contextlib.contextmanager
def naming_memory(config: CacheConfig) -> Iterator[None]:
    """Turns what torch says where memory ends into a `UserError` that names what takes it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"too little memory for a shard of {config.rows_per_shard} rows in batches of "
            f"{config.batch_size}: give a smaller --batch-size or --rows-per-shard"
        ) from error


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


def cache_rows(folder: Path, config: CacheConfig, model: TinyModel, start: int, end: int) -> int:
    """Caches dataset rows `start` up to `end` in `folder`; finished shards there are kept.

    `start` is a multiple of `rows_per_shard`, and so is `end`, unless it is the end of all rows.
    Returns how many shards it wrote. Ranges that do not overlap can be cached at once by separate
    processes. Raises `UserError` where the rows of a finished shard have changed, and see the
    functions above.
    """
    recipe = recipe_of(config, model)
    ranges = shard_ranges(start, end, config.rows_per_shard)
    finished = {rows: finished_shard(folder, rows, recipe) for rows in ranges}
    n_missing = list(finished.values()).count(None)
    if n_missing == 0:
        return 0
    blocks = config.token_rows.read(start, end, model.d_vocab, config.rows_per_shard)
    n_tokens, began = 0, time.monotonic()
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(1) as pool,
        tqdm(total=end - start, unit=" rows", desc="caching", mininterval=1) as bar,
    ):
        writer = _BackgroundWriter(folder, pool)
        # The dataset may end early, so it decides when to stop; its rows are counted below.
        for rows, block in zip(ranges, blocks, strict=False):
            if len(block) != rows[1] - rows[0]:
                break
            shard = finished[rows]
            if shard is not None:
                require_same_rows(folder, shard, block, config)
            else:
                with naming_memory(config):
                    acts, tokens = compute_shard(model, block, rows[0], config)
                writer.write(acts, tokens, rows, recipe)
                n_tokens += len(tokens)
                rate = n_tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(block))
        n_rows = bar.n
        writer.wait()
    if n_rows != end - start:
        raise UserError(
            f"{config.token_rows.file} ended before row {end}: it has changed, or was cut"
        )
    return n_missing


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
