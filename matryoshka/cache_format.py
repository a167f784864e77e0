"""The format of a cache of activations on disk: its files, its records, and how they are checked.

A cache is a folder. Shard k holds the activations of the dataset's rows k * rows_per_shard up to
(k + 1) * rows_per_shard, no matter which process wrote it and when. It is three files:

    00000.acts     [n, d_model], flat, in the cache's dtype
    00000.tokens   [n, 3], flat int32: token id, row in the dataset, position in the row
    00000.json     the cache's recipe, the shard's rows, count and two checksums; written last

`manifest.json` is written once every shard is there, and makes the folder a finished cache. The
last row may have a few more activations than were asked for: they are at the end of the last shard,
and the reader stops before them. No time or machine is recorded, so that two caches of one recipe
are equal byte for byte. In the JSON files the recipe is called "make".
"""

import dataclasses
import json
import math
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from matryoshka.errors import UserError
from matryoshka.files import write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
READABLE_FORMATS = (1, 2, 3)  # 1 recorded only the size of the dataset's file, not its checksum
MANIFEST = "manifest.json"
SHARD_NAME = "[0-9]{5,}"  # a regular expression
TOKEN_BYTES = 3 * 4  # an activation's token id, row and position, int32 each

# RECIPE_KEYS are all keys that a recipe may have, in the order in which they are written. A recipe
# that has only the following ones is of format 2: a model's residual stream on rows of token ids.
FORMAT_2_KEYS = (
    *("format", "model", "weights_hash"),
    *("dataset", "dataset_revision", "dataset_bytes", "dataset_sha256", "split"),
    *("tokens", "layer", "dtype", "d_model", "keep_begin", "rows_per_shard"),
)
# A recipe that has any other key is of format 3.
RECIPE_KEYS = (
    *(*FORMAT_2_KEYS, "site"),
    # Of a language model that reads text; see `text_rows.TextRows`.
    *("model_revision", "model_dtype", "dataset_config", "text_column"),
    *("tokenizer", "tokenizer_hash", "context", "packing", "begin", "special_ids", "pad_id"),
    *("source", "seq", "token_ids"),  # of a cache of arrays; see `array_files.cache_arrays`
)

Recipe = dict[str, Any]  # see `make_recipe`


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard: its rows, its number of activations, its checksums."""

    name: str
    first_row: int  # in the dataset
    end_row: int  # one past the last
    n_tokens: int  # activations in it
    acts_sha256: str
    tokens_sha256: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a JSON file of a cache says: a shard's file about that shard, the manifest about all."""

    recipe: Recipe
    n_tokens: int  # activations to read: in the manifest, no more than were asked for
    n_rows: int
    shards: list[Shard]


def whole_number(name: str, value: Any, at_least: int, at_most: float = math.inf) -> int:
    """`value` as an int. Raises `ValueError` unless it is a whole number in that range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not at_least <= number <= at_most:
        span = f"of {at_least} or more"
        if at_most != math.inf:
            span = f"between {at_least} and {at_most}"
        raise ValueError(f"{name} must be a whole number {span}, got {value}")
    return number


def make_recipe(parts: dict[str, Any]) -> Recipe:
    """The recipe that has `parts`, whose keys are among RECIPE_KEYS, and its format number."""
    is_format_2 = parts.keys() <= set(FORMAT_2_KEYS)
    parts = {"format": 2 if is_format_2 else 3, **parts}
    return {key: parts[key] for key in sorted(parts, key=RECIPE_KEYS.index)}


def shard_name(first_row: int, recipe: Recipe) -> str:
    """The name of the shard that begins with dataset row `first_row`."""
    return f"{first_row // recipe['rows_per_shard']:05d}"


def shard_records(folder: Path) -> Iterator[Path]:
    """The JSON files of the shards in `folder`, sorted by name; none if there is no such folder."""
    for path in sorted(folder.glob("*.json") if os.path.isdir(folder) else ()):
        if re.fullmatch(SHARD_NAME, path.stem):
            yield path


def bytes_each(recipe: Recipe) -> dict[str, int]:
    """How many bytes one activation takes in each of a shard's files."""
    return {"acts": recipe["d_model"] * DTYPES[recipe["dtype"]].itemsize, "tokens": TOKEN_BYTES}


def wrong_size(folder: Path, shard: Shard, bytes_each: dict[str, int]) -> str | None:
    """A description of what is wrong with the sizes of the shard's files, or None."""
    for kind, n_bytes in bytes_each.items():
        path = folder / f"{shard.name}.{kind}"
        try:
            found, expected = path.stat().st_size, n_bytes * shard.n_tokens
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        if found != expected:
            return f"{path.name} has {found} bytes, expected {expected}"
    return None


def write_record(path: Path, record: Record) -> None:
    """Writes a shard's record, or the manifest, whole or not at all. Raises `CannotWrite`."""
    fields = dataclasses.asdict(record)
    write_json(path, {"make": fields.pop("recipe"), **fields})


def read_record(path: Path) -> Record:
    """A shard's record, or the manifest. Raises `UserError` if it is damaged, or of a format that
    this version does not read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["make"]["format"]
        if version in READABLE_FORMATS:
            shards = [Shard(**shard) for shard in fields.pop("shards")]
            record = Record(recipe=fields.pop("make"), shards=shards, **fields)
            check_record(record)
            return record
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, or is not part of a cache ({type(error).__name__}: {error}); "
            "cache to another folder, or delete it and cache again"
        ) from None
    readable = " and ".join(map(str, READABLE_FORMATS))
    raise UserError(f"{path} has cache format {version}: this version reads {readable}")


def check_record(record: Record) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` if a reader could not use the record."""
    for name in ("tokens", "d_model", "rows_per_shard"):
        whole_number(name, record.recipe[name], 1)
    bytes_each(record.recipe)
    whole_number("the number of shards", len(record.shards), 1)
    whole_number("n_rows", record.n_rows, 1)
    for shard in record.shards:
        if not re.fullmatch(SHARD_NAME, shard.name):
            raise ValueError(f"a shard is called {shard.name}")
        whole_number("a shard's n_tokens", shard.n_tokens, 0)
    whole_number("n_tokens", record.n_tokens, 0, sum(shard.n_tokens for shard in record.shards))
