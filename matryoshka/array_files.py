"""Your own activations -> a cache: arrays in memory, or .npy, .pt and .safetensors files.

    from matryoshka.array_files import cache_arrays
    cache = cache_arrays("cache/mine", [acts])

Arrays are [n, d_model], or [n_rows, seq, d_model] where activations belong to rows of tokens. They
are taken one after another, a piece at a time; files are memory-mapped and never held whole. Every
value is looked at before the cache is finished. Whatever is interrupted, the same call goes on
after the last finished shard and ends with the same bytes.
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
ALL = 10**12  # activations: more than any cache has
SHARD_BYTES = 2**28  # of activations, that are held in memory


def cache_arrays(
    folder: str | Path,
    arrays: Iterable[Array | Tensor | np.ndarray],
    token_ids: Iterable[Array | Tensor | np.ndarray] | None = None,
    *,
    dtype: str = "float16",
    n_tokens: int | None = None,
    rows_per_shard: int | None = None,
) -> ActivationCache:
    """Caches the `arrays`, or goes on with that, or finds it done; returns the cache.

    arrays: [n, d_model] each, or [n_rows, seq, d_model] each, of one dtype, one seq and one
    d_model: float16, bfloat16, float32 or float64. An iterator is good, too; to go on after an
    interruption, give one that begins anew. `token_ids`: integers, [n] or [n_rows, seq] in all,
    cut into arrays like `arrays` or in another way. `dtype`: what the cache stores, float16,
    bfloat16 or float32. `n_tokens`: of the first so many activations, or all. `rows_per_shard`:
    how many rows are held in memory; by default, 256 MiB of them.

    Raises `UserError` where an array is not like that, a value is not finite or too large for
    `dtype`, or the folder holds another cache.
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
    """Raises `UserError` naming a setting that is impossible for any array."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    for name, value, most in (("n_tokens", n_tokens, ALL), ("rows_per_shard", rows_per_shard, ALL)):
        try:
            whole_number(name, 1 if value is None else value, 1, most)
        except ValueError as error:
            raise UserError(str(error)) from None


def default_rows_per_shard(seq: int, d_model: int, dtype: str) -> int:
    """Rows of about SHARD_BYTES in a cache of that dtype."""
    return max(1, SHARD_BYTES // (seq * d_model * DTYPES[dtype].itemsize))


# ----------------------------------------------------------------------------------------- files


def open_files(
    paths: Sequence[str | Path], id_paths: Sequence[str | Path] | None
) -> tuple[list[Array], list[Array] | None]:
    """The arrays of --activations and of --token-ids; what their headers say is checked.

    Raises `UserError` naming the first file that is not right, or where one set has more rows.
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
    """How many activations these have."""
    return sum(math.prod(array.shape[:-1]) for array in arrays)


def open_arrays(paths: Sequence[str | Path], flag: str = "--activations") -> list[Array]:
    """The arrays in files, or in a folder's files by name. Raises `UserError` naming the file."""
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
    """The one array in a file, of which only a header is read. Raises `UserError`."""
    openers = {".npy": _open_npy, ".pt": _open_pt, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        return openers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # of many classes, torch.load's among them
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
        raise UserError(f"{path}: values of {values.get_dtype()}, which are not read here")
    return Array(str(path), tuple(values.get_shape()), dtype, lambda a, b: values[a:b])


# -------------------------------------------------------------------------------------- the shards


def write_blocks(
    folder: Path, recipe: Recipe, acts: Iterable[Array], ids: Iterable[Array] | None
) -> None:
    """Writes the cache of that recipe in `folder`, but for the shards that are there already.

    Raises `UserError` where these are of other arrays, and see the functions above.
    """
    is_done = is_complete(folder, recipe)
    if is_done:
        recipe = read_record(folder / MANIFEST).recipe  # perhaps of more activations
    else:
        clear_leftovers(folder)
    seq, per_shard = recipe["seq"], recipe["rows_per_shard"]
    limit = min(math.ceil(recipe["tokens"] / seq), MAX_INT32)  # rows: int32 in the cache
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
    """Whether the shard of these rows is in `folder`: acts [n, d_model], int32 tokens [n, 3].

    Raises `UserError` where the shard in its place is of other arrays, or of another recipe.
    """
    shard = finished_shard(folder, rows, recipe)
    path = folder / f"{shard_name(rows[0], recipe)}.json"
    if shard is None:
        there = read_record(path).shards[0] if os.path.exists(path) else None
        if there and (there.first_row, there.end_row) != rows:
            raise other_arrays(folder, f"shard {there.name} ends before row {there.end_row}")
        return False
    found = sha256_of(acts.view(torch.uint8).numpy()), sha256_of(tokens)
    if found != (shard.acts_sha256, shard.tokens_sha256):
        raise other_arrays(folder, f"rows {rows[0]} to {rows[1] - 1} differ")
    return True


def sha256_of(values: np.ndarray) -> str:
    """Of an array's bytes, in hexadecimal."""
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()


def other_arrays(folder: Path, how: str) -> UserError:
    return UserError(
        f"{folder} holds a cache of other arrays: {how}; give another folder, or delete that one"
    )
