"""Caches your own activations: arrays in memory, or .npy, .pt and .safetensors files.

    from matryoshka.array_files import cache_arrays
    cache = cache_arrays("cache/mine", [acts])

Arrays are [n, d_model], or [n_rows, seq, d_model] if activations belong to rows of tokens. They are
read one after another, a piece at a time; files are memory-mapped and never held whole. Every value
is checked before the cache is finished. After an interruption, the same call continues after the
last finished shard and ends with the same bytes.
"""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.arrays import (
    MAX_INT32,
    Array,
    blocks,
    check_acts,
    check_ids,
    checked,
    named,
    named_array,
    require_finite,
    require_token_ids,
    sizes,
    with_ids,
)
from matryoshka.cache_format import (
    DTYPES,
    MANIFEST,
    Recipe,
    make_recipe,
    read_record,
    shard_name,
    shard_records,
    whole_number,
)
from matryoshka.cache_reader import ActivationCache
from matryoshka.cache_writer import (
    clear_leftovers,
    finish,
    finished_shard,
    is_complete,
    write_shard,
)
from matryoshka.errors import UserError
from matryoshka.files import make_folder, one_writer

ST_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ST_DTYPES |= {"F64": torch.float64, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16}
ST_DTYPES |= {"I32": torch.int32, "I64": torch.int64}
SUFFIXES = (".npy", ".pt", ".safetensors")
ALL = 10**12  # activations; more than any cache has
SHARD_BYTES = 2**28  # of a shard's activations, which are held in memory


def cache_arrays(
    folder: str | Path,
    arrays: Iterable[Array | Tensor | np.ndarray],
    token_ids: Iterable[Array | Tensor | np.ndarray] | None = None,
    *,
    dtype: str = "float16",
    n_tokens: int | None = None,
    rows_per_shard: int | None = None,
) -> ActivationCache:
    """Caches the `arrays`, or continues an interrupted cache of them; returns the cache.

    arrays: a list or an iterator of arrays [n, d_model], or of arrays [n_rows, seq, d_model]. All
    have the same seq, d_model and dtype (float16, bfloat16, float32 or float64). To continue after
    an interruption, give an iterator that starts from the beginning.
    token_ids: integers, [n] or [n_rows, seq] in total; they may be split differently from `arrays`.
    dtype: what the cache stores, float16, bfloat16 or float32.
    n_tokens: how many activations to cache, from the first on; None: all.
    rows_per_shard: how many rows a shard has, which is held in memory; None: 256 MiB of them.

    Raises `UserError` if an array has another shape or dtype, a value is not finite or too large
    for `dtype`, or the folder holds another cache.
    """
    check_settings(dtype, n_tokens, rows_per_shard)
    acts = checked(named(arrays, "array"), check_acts)
    first = next(acts, None)
    if first is None:
        raise UserError("no arrays of activations were given")
    seq, d_model = sizes(first)
    settings = {
        "source": "arrays",
        "tokens": ALL if n_tokens is None else n_tokens,
        "dtype": dtype,
        "d_model": d_model,
        "rows_per_shard": rows_per_shard or default_rows_per_shard(seq, d_model, dtype),
        "seq": seq,
        "token_ids": token_ids is not None,
    }
    ids = None
    if token_ids is not None:
        ids = checked(named(token_ids, "token id array"), functools.partial(check_ids, first))
    path = Path(folder)
    make_folder(path)
    with one_writer(path):
        write_blocks(path, make_recipe(settings), itertools.chain([first], acts), ids)
    return ActivationCache(path)


def check_settings(dtype: str, n_tokens: int | None, rows_per_shard: int | None) -> None:
    """Raises `UserError` if a setting is impossible, whatever the arrays are."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    for name, value, most in (("n_tokens", n_tokens, ALL), ("rows_per_shard", rows_per_shard, ALL)):
        try:
            whole_number(name, 1 if value is None else value, 1, most)
        except ValueError as error:
            raise UserError(str(error)) from None


def default_rows_per_shard(seq: int, d_model: int, dtype: str) -> int:
    """How many rows take about SHARD_BYTES in a cache of that dtype."""
    return max(1, SHARD_BYTES // (seq * d_model * DTYPES[dtype].itemsize))


# ----------------------------------------------------------------------------------------- files


def open_files(
    paths: Sequence[str | Path], id_paths: Sequence[str | Path] | None
) -> tuple[list[Array], list[Array] | None]:
    """Opens the files of --activations and of --token-ids, and checks their shapes and dtypes.

    Raises `UserError` naming the first file that is wrong, or if the numbers of rows differ.
    """
    acts = list(checked(open_arrays(paths), check_acts))
    if not id_paths:
        return acts, None
    check = functools.partial(check_ids, acts[0])
    ids = list(checked(open_arrays(id_paths, "--token-ids"), check))
    n_acts, n_ids = (sum(array.shape[0] for array in arrays) for arrays in (acts, ids))
    if n_acts != n_ids:
        raise UserError(f"--token-ids have {n_ids} rows, and --activations {n_acts}")
    return acts, ids


def count_activations(arrays: Iterable[Array]) -> int:
    """The number of activations in all arrays."""
    return sum(math.prod(array.shape[:-1]) for array in arrays)


def open_arrays(paths: Sequence[str | Path], flag: str = "--activations") -> list[Array]:
    """The arrays in files, or in the files of folders, sorted by name.

    Raises `UserError` naming the file that cannot be read.
    """
    found: list[Array] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise UserError(f"{flag} {path} is not there")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not files:
                raise UserError(f"{flag} {path} is a folder without {', '.join(SUFFIXES)} files")
        found += map(open_array, files)
    return found


def open_array(path: Path) -> Array:
    """The one array in a file. Reads only the file's header. Raises `UserError`."""
    openers = {".npy": _open_npy, ".pt": _open_pt, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        return openers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many classes, torch.load most of them
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {reason})") from None


def _open_npy(path: Path) -> Array:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    return named_array(str(path), values)


def _open_pt(path: Path) -> Array:
    value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(value, Tensor):
        raise UserError(f"{path} holds a {type(value).__name__}, expected one tensor")
    return named_array(str(path), value)


def _open_safetensors(path: Path) -> Array:
    file: Any = safetensors.safe_open(path, framework="pt")
    names = list(file.keys())
    if len(names) != 1:
        some = ", ".join(names[:5])
        raise UserError(f"{path} holds {len(names)} tensors ({some}), expected one")
    values = file.get_slice(names[0])
    dtype = ST_DTYPES.get(values.get_dtype())
    if dtype is None:
        raise UserError(f"{path} has dtype {values.get_dtype()}, which cannot be read")
    return Array(str(path), tuple(values.get_shape()), dtype, lambda a, b: values[a:b])


# -------------------------------------------------------------------------------------- the shards


def write_blocks(
    folder: Path, recipe: Recipe, acts: Iterable[Array], ids: Iterable[Array] | None
) -> None:
    """Writes the cache in `folder`, but for the shards that are already there.

    Raises `UserError` if those shards are of other arrays, and what the functions above raise.
    """
    is_done = is_complete(folder, recipe)
    if is_done:
        recipe = read_record(folder / MANIFEST).recipe  # which may have more activations
    else:
        clear_leftovers(folder)
    seq, per_shard = recipe["seq"], recipe["rows_per_shard"]
    limit = min(math.ceil(recipe["tokens"] / seq), MAX_INT32)  # the cache has rows as int32
    acts_blocks = blocks(acts, per_shard, DTYPES[recipe["dtype"]], require_finite, limit)
    id_blocks = None
    if ids is not None:
        id_blocks = blocks(ids, per_shard, torch.int64, require_token_ids, limit)
    n_rows = 0
    with tqdm(unit=" activations", desc="caching", mininterval=1) as bar:
        for first_row, flat, tokens in with_ids(acts_blocks, id_blocks, seq):
            n_rows = first_row + len(flat) // seq
            if not is_finished(folder, (first_row, n_rows), recipe, flat, tokens):
                write_shard(folder, flat, tokens, (first_row, n_rows), recipe)
            bar.update(len(flat))
    if n_rows == 0:
        raise UserError("the arrays hold no activations")
    if any(int(path.stem) * per_shard >= n_rows for path in shard_records(folder)):
        raise other_arrays(folder, f"they have more than {n_rows} rows")
    if not is_done:
        finish(folder, n_rows)


def is_finished(
    folder: Path, rows: tuple[int, int], recipe: Recipe, acts: Tensor, tokens: np.ndarray
) -> bool:
    """Whether `folder` already holds the shard of these rows, with these values.

    acts: [n, d_model]; tokens: int32 [n, 3]. Raises `UserError` if the shard in its place is of
    other arrays or another recipe.
    """
    shard = finished_shard(folder, rows, recipe)
    path = folder / f"{shard_name(rows[0], recipe)}.json"
    if shard is None:
        found = read_record(path).shards[0] if os.path.exists(path) else None
        if found and (found.first_row, found.end_row) != rows:
            raise other_arrays(folder, f"shard {found.name} ends before row {found.end_row}")
        return False
    checksums = sha256_of(acts.view(torch.uint8).numpy()), sha256_of(tokens)
    if checksums != (shard.acts_sha256, shard.tokens_sha256):
        raise other_arrays(folder, f"rows {rows[0]} to {rows[1] - 1} differ")
    return True


def sha256_of(values: np.ndarray) -> str:
    """The SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()


def other_arrays(folder: Path, how: str) -> UserError:
    return UserError(
        f"{folder} holds a cache of other arrays: {how}; give another folder, or delete that one"
    )
