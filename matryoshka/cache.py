"""Token ids -> TinyModel -> a cache of activations on disk, and the reader of that cache.

    python cache_activations.py --tokens 30000000 --layer 3 --out cache

A cache is a folder. Shard k holds the activations of the dataset's rows k * rows_per_shard up to
(k + 1) * rows_per_shard, whoever wrote it and in whatever order, in three files:

    00000.acts     [n, d_model], flat, in the cache's dtype
    00000.tokens   [n, 3], flat int32: token id, row in the dataset, position in the row
    00000.json     what the shard is made of, its rows, its count, its two checksums; written last

and `manifest.json`, written once every shard is there, makes the folder a cache. Whatever is
interrupted, the same command goes on after the last finished shard and ends with the same bytes.
The last row may bring a few activations more than were asked for: they lie at the end of the last
shard, and the reader stops before them.

Several machines can share the work: `count_rows` once, `cache_rows` for each of `split_rows`,
`finish` once. `run` is those three in a row. No run's times are written beside the shards, so
that two caches of one make are equal byte for byte; `run` returns them.

A dataset in a folder is read by this module alone: its name is no pattern, and nothing is written
elsewhere. Rows are counted from 0, and blank lines are no rows.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.command_line import main_guard, parse, pick_device, setting, table
from matryoshka.errors import UserError
from matryoshka.files import make_folder, one_writer, write_atomically, write_json
from matryoshka.tiny_model import TinyModel

# The last four of TinyModel's 10,000 token ids.
BEGIN, END, PAD, UNK = 9996, 9997, 9998, 9999

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FORMAT = 2  # of the folder
READABLE = (1, 2)  # in 1, only the size of the dataset's file was recorded, not what was in it
MANIFEST = "manifest.json"
SHARD_NAME = "[0-9]{5,}"
TOKEN_BYTES = 3 * 4  # an activation's token id, row and position, int32 each

# The reader's shuffle: chunks are read whole, and mixed within a buffer. A chunk of 256 is 2 to 3
# stories and 0.4 MB at d_model 768 in float16; a buffer is over 1,000 stories and 200 MB.
CHUNK = 256  # consecutive activations
CHUNKS_PER_BUFFER = 512
RESIDENT_SHARE = 0.7  # of a GPU's free memory, that a cache may take to be held there


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = setting("noanabeshima/tiny_model", "weights: a hub repo, a file or a folder")
    model_revision: str | None = setting(None, "the hub model's branch, tag or commit")
    dataset: str = setting(
        "noanabeshima/TinyModelTokIds", "token ids: a hub dataset, or a folder of SPLIT.jsonl"
    )
    dataset_revision: str | None = setting(None, "the hub dataset's branch, tag or commit")
    split: str = setting("train", "which SPLIT.jsonl of the dataset")
    tokens: int = setting(30_000_000, "activations to cache")
    layer: int = setting(3, "residual stream at the input of this block, blocks counted from 0")
    dtype: str = setting("float16", "what activations are stored in", choices=list(DTYPES))
    keep_begin: bool = setting(False, "cache [BEGIN] positions too")
    batch_size: int = setting(64, "rows a forward pass")
    rows_per_shard: int = setting(1024, "dataset rows a shard; held in memory while it is made")
    out: str = setting("cache", "folder that the cache goes to")
    device: str = setting("auto", "auto, cpu, cuda, ...")


LIMITS = {"tokens": 10**12, "batch_size": 10**6, "rows_per_shard": 10**6}


def whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """`value` as an int. Raises `ValueError` where it is no whole number from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        span = f"of {least} or more" if most == math.inf else f"between {least} and {most}"
        raise ValueError(f"{name} must be a whole number {span}, got {value}")
    return number


def check(config: Config) -> None:
    """Raises `UserError` naming a setting of which no model and no dataset could make a cache."""
    for name, most in LIMITS.items():
        try:
            whole(f"--{name.replace('_', '-')}", getattr(config, name), 1, most)
        except ValueError as error:
            raise UserError(str(error)) from None
    if config.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {config.dtype}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard: its rows, its count, its checksums."""

    name: str
    first_row: int  # in the dataset
    end_row: int  # one past the last
    n_tokens: int  # activations in it
    acts_sha256: str
    tokens_sha256: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a sidecar says of one shard, and the manifest of all of them."""

    make: dict[str, Any]  # see `describe`
    n_tokens: int  # activations to read: in the manifest, no more than were asked for
    n_rows: int
    shards: list[Shard]


# -------------------------------------------------------------------------------------- the rows


def rows_file(config: Config) -> Path:
    """Where the split's rows are, below the dataset's folder or the hub's name."""
    return Path(config.dataset) / f"{config.split}.jsonl"


def raw_rows(config: Config, start: int) -> Iterator[Any]:
    """The dataset's rows from `start` on, unchecked. Raises `UserError` where it has none."""
    if os.path.isdir(config.dataset):
        if not os.path.isfile(rows_file(config)):
            raise UserError(f"dataset folder {config.dataset} holds no {config.split}.jsonl")
        return local_rows(rows_file(config), start)
    if config.dataset.count("/") == 1 and config.dataset[0] not in "./~":
        return hub_rows(config, start)
    raise UserError(f"--dataset {config.dataset} is no folder here, and no hub dataset's name")


def local_rows(file: Path, start: int) -> Iterator[Any]:
    """What the lines of `file` hold that are not blank, from the `start`-th on."""
    row = 0
    try:
        with file.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                if row >= start:
                    yield json.loads(line)
                row += 1
    except OSError as error:
        raise UserError(f"cannot read {file} from row {row} on ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f'{file} row {row} is not JSON: expected {{"tok_ids": [...]}}') from None


def hub_rows(config: Config, start: int) -> Iterator[Any]:
    """The rows of a dataset on the hub from `start` on, as they come from there."""
    import datasets  # only here: it takes a second or two, and wants a home that it can write to

    try:
        stream = datasets.load_dataset(
            config.dataset,
            data_files={config.split: f"{config.split}.jsonl"},
            split=config.split,
            streaming=True,
            revision=config.dataset_revision,
        ).skip(start)
        for block in stream.with_format("arrow").iter(batch_size=config.rows_per_shard):
            yield from block.to_pylist()
    # Its errors come from a dozen libraries and share no class.
    except Exception as error:
        cause = error.__cause__ or error  # it wraps what went wrong in "an error occurred"
        reason = f"{type(cause).__name__}: {cause}"[:200]
        raise UserError(
            f"cannot get {rows_file(config)} from the Hugging Face hub ({reason}); to use a local "
            f"copy, give --dataset the folder that holds its {config.split}.jsonl"
        ) from error


def read_rows(config: Config, start: int, end: int | None, d_vocab: int) -> Iterator[np.ndarray]:
    """Token ids of rows `start` up to `end` (None: all), `rows_per_shard` at a time.

    Yields int64 [n, seq]. Raises `UserError` naming the file and the row, counted from 0, where
    there is no `tok_ids`, a row is not as long as the first, or an id is not below `d_vocab`.
    """
    whole("start", start, 0)
    rows = raw_rows(config, start)
    if end is not None:
        rows = itertools.islice(rows, whole("end", end, start) - start)
    seq = None
    while True:
        block: list[np.ndarray] = []
        for row in itertools.islice(rows, config.rows_per_shard):
            block.append(token_ids(row, f"{rows_file(config)} row {start + len(block)}", d_vocab))
            seq = seq or len(block[0])
            if len(block[-1]) != seq:
                raise UserError(
                    f"{rows_file(config)} row {start + len(block) - 1}: {len(block[-1])} tokens, "
                    f"expected {seq} as in the rows before"
                )
        if not block:
            return
        start += len(block)
        yield np.stack(block)


def token_ids(row: Any, where: str, d_vocab: int) -> np.ndarray:
    """The token ids of one row, int64 [seq]. Raises `UserError` naming `where` it is."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}, expected {{"tok_ids": [...]}}')
    ids = row.get("tok_ids")
    if ids is None:
        raise UserError(
            f"{where}: no tok_ids, only {', '.join(k for k in row if k != 'tok_ids') or 'null'}"
        )
    if not isinstance(ids, list):
        raise UserError(f"{where}: tok_ids is {ids!r:.40}, expected a list of integers")
    if not ids:
        raise UserError(f"{where}: tok_ids is empty")
    if set(map(type, ids)) != {int}:
        wrong = json.dumps(next(i for i in ids if type(i) is not int))
        raise UserError(f"{where}: tok_ids holds {wrong:.40}, expected integers")
    if min(ids) < 0 or max(ids) >= d_vocab:
        bad = next(i for i in ids if not 0 <= i < d_vocab)
        raise UserError(f"{where}: token id {bad} is out of the vocabulary, 0 to {d_vocab - 1}")
    return np.array(ids, dtype=np.int64)


def kept_positions(rows: np.ndarray, keep_begin: bool) -> np.ndarray:
    """Which positions of `rows` are cached: bool, of the same shape."""
    kept = rows != PAD
    return kept if keep_begin else kept & (rows != BEGIN)


def count_rows(config: Config, d_vocab: int) -> tuple[int, int]:
    """How many of the first rows make `config.tokens` activations, and how many they make.

    The second is below `config.tokens` where the dataset ends before. Reads those rows, so that
    a bad one is found before a model has run. Raises `UserError` if there is nothing to cache.
    """
    n_rows = n_tokens = 0
    for rows in read_rows(config, 0, None, d_vocab):
        total = n_tokens + kept_positions(rows, config.keep_begin).sum(axis=1).cumsum()
        enough = int(np.searchsorted(total, config.tokens))  # the row that completes the count
        if enough < len(rows):
            return n_rows + enough + 1, int(total[enough])
        n_rows, n_tokens = n_rows + len(rows), int(total[-1])
    if n_tokens == 0:
        raise UserError(f"{rows_file(config)} holds no tokens to cache in {n_rows} rows")
    return n_rows, n_tokens


def split_rows(config: Config, n_rows: int, n_parts: int) -> list[tuple[int, int]]:
    """Rows 0 up to `n_rows` as at most `n_parts` ranges of whole shards, as even as can be.

    Raises `ValueError` where `n_parts` is not 1 or more.
    """
    whole("n_parts", n_parts, 1)
    n_shards = math.ceil(n_rows / config.rows_per_shard)
    cuts = [n_shards * i // n_parts * config.rows_per_shard for i in range(n_parts + 1)]
    ranges = [(start, min(end, n_rows)) for start, end in itertools.pairwise(cuts)]
    return [(start, end) for start, end in ranges if start < end]


# ------------------------------------------------------------------------------------ the writer


def load_model(config: Config) -> TinyModel:
    """The language model, on its device. Raises `UserError` if it has no such layer."""
    device = pick_device(config.device)
    model = TinyModel.from_pretrained(config.model, config.model_revision, device)
    model.check_layer(config.layer)
    return model


def describe(config: Config, model: TinyModel) -> dict[str, Any]:
    """What a cache is made of: two caches that agree on this hold the same activations.

    Batch size and device are not in it: they move activations by float32's rounding only. Of a
    dataset on the hub there is the revision only; `cache_rows` looks whether its rows have changed.
    """
    file = rows_file(config)
    return {
        "format": FORMAT,
        "model": config.model,
        "weights_hash": model.weights_hash,
        "dataset": config.dataset,
        "dataset_revision": config.dataset_revision,
        "dataset_bytes": os.path.getsize(file) if os.path.isfile(file) else None,
        "dataset_sha256": file_sha256(file) if os.path.isfile(file) else None,
        "split": config.split,
        "tokens": config.tokens,
        "layer": config.layer,
        "dtype": config.dtype,
        "d_model": model.d_model,
        "keep_begin": config.keep_begin,
        "rows_per_shard": config.rows_per_shard,
    }


def file_sha256(file: Path) -> str:
    """SHA-256 of the bytes of a local dataset. Raises `UserError` where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from None


def require_same_make(found: dict[str, Any], asked: dict[str, Any], where: Path) -> None:
    """Raises `UserError` naming the first thing in which the cache at `where` is another.

    The model's name may differ: its weights' hash says whether it is the same.
    """
    for key in asked:
        if key != "model" and found.get(key) != asked[key]:
            raise UserError(
                f"{where} holds another cache: its {key} is {found.get(key)}, asked for is "
                f"{asked[key]}; give another --out, or delete that folder"
            )


def is_complete(folder: Path, make: dict[str, Any]) -> bool:
    """Whether `folder` already holds the cache of this make, or one of more tokens.

    Raises `UserError` if what it holds, finished or not, is of another make. A finished cache of
    an earlier format is compared in what it recorded.
    """
    if not os.path.exists(folder / MANIFEST):
        for path in sorted(folder.glob("*.json") if os.path.isdir(folder) else ()):
            if re.fullmatch(SHARD_NAME, path.stem):
                require_same_make(read_record(path).make, make, folder)
        return False
    manifest = read_record(folder / MANIFEST)
    found = manifest.make
    if found["format"] != FORMAT:
        make = {key: value for key, value in make.items() if key in found and key != "format"}
    if manifest.n_tokens >= make["tokens"]:
        found = {**found, "tokens": make["tokens"]}
    require_same_make(found, make, folder)
    return not any(wrong_size(folder, shard, bytes_each(found)) for shard in manifest.shards)


def kept_tokens(rows: np.ndarray, first_row: int, config: Config) -> np.ndarray:
    """Token id, row and position of what is cached of `rows` [n_rows, seq]: int32 [n, 3]."""
    kept = kept_positions(rows, config.keep_begin)
    row, position = np.nonzero(kept)
    return np.stack([rows[kept], row + first_row, position], axis=1).astype("<i4")


def require_same_rows(shard: Shard, rows: np.ndarray, config: Config) -> None:
    """Raises `UserError` where a finished shard was not made of these rows, [n_rows, seq]."""
    tokens = kept_tokens(rows, shard.first_row, config)
    if hashlib.sha256(tokens.data).hexdigest() != shard.tokens_sha256:
        raise UserError(
            f"{config.out}: shard {shard.name} was made of other rows {shard.first_row} to "
            f"{shard.end_row - 1} than {rows_file(config)} has now; give another --out, or delete "
            "that folder"
        )


def compute_shard(
    model: TinyModel, rows: np.ndarray, first_row: int, config: Config
) -> tuple[Tensor, np.ndarray]:
    """The activations of `rows` [n_rows, seq] that are kept, and where each comes from.

    Returns acts [n, d_model] in the cache's dtype on the model's device, and int32 [n, 3] of
    token id, row and position. Raises `UserError` if an activation does not fit the dtype.
    """
    kept = kept_positions(rows, config.keep_begin)  # [n_rows, seq]
    tokens = kept_tokens(rows, first_row, config)
    device = model.pos_embed.device
    acts = torch.empty(len(tokens), model.d_model, dtype=DTYPES[config.dtype], device=device)
    peak = torch.zeros((), device=device)  # largest activation, kept on the device: no sync
    done = 0
    for i in range(0, len(rows), config.batch_size):
        part = slice(i, i + config.batch_size)
        index = torch.from_numpy(np.flatnonzero(kept[part])).to(device)
        if len(index) == 0:
            continue
        residual = model.residual(torch.from_numpy(rows[part]).to(device), config.layer)
        batch = residual.flatten(0, 1).index_select(0, index)  # [n, d_model], float32
        peak = torch.maximum(peak, batch.abs().amax())
        acts[done : done + len(index)] = batch
        done += len(index)
    where = f"rows {first_row} to {first_row + len(rows) - 1}"
    if not peak.isfinite():
        raise UserError(
            f"the model's activations at layer {config.layer} are not finite in {where}"
        )
    if peak.to(acts.dtype).isinf():
        wider = "float32" if config.dtype == "bfloat16" else "bfloat16 or float32"
        raise UserError(
            f"activations reach {peak.item():.6g} in {where}: --dtype {config.dtype} holds "
            f"{torch.finfo(acts.dtype).max:.6g} at most; use {wider}"
        )
    return acts, tokens


@contextlib.contextmanager
def naming_memory(config: Config) -> Iterator[None]:
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
    folder: Path, acts: Tensor, tokens: np.ndarray, rows: tuple[int, int], make: dict[str, Any]
) -> None:
    """Writes the shard of dataset rows `rows`, its sidecar last. Raises `UserError` on no room."""
    name = shard_name(rows[0], make)
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
        record = Record(make, len(tokens), rows[1] - rows[0], [shard])
        write_json(folder / f"{name}.json", dataclasses.asdict(record))
    except OSError as error:
        raise UserError(
            f"shard {name}: {error}; finished shards are kept, and the same command goes on from "
            "there"
        ) from error


def shard_name(first_row: int, make: dict[str, Any]) -> str:
    return f"{first_row // make['rows_per_shard']:05d}"


def finished_shard(folder: Path, rows: tuple[int, int], make: dict[str, Any]) -> Shard | None:
    """The shard of dataset rows `rows` if it is there, whole by its size, and of this make.

    Raises `UserError` if it is of another make.
    """
    name = shard_name(rows[0], make)
    sidecar = folder / f"{name}.json"
    if not os.path.exists(sidecar):
        return None
    found = read_record(sidecar)
    require_same_make(found.make, make, folder)
    shard = found.shards[0]
    complete = not wrong_size(folder, shard, bytes_each(make))
    same = (shard.name, shard.first_row, shard.end_row) == (name, *rows)
    return shard if complete and same else None


def bytes_each(make: dict[str, Any]) -> dict[str, int]:
    """How many bytes one activation takes in each of a shard's files."""
    return {"acts": make["d_model"] * DTYPES[make["dtype"]].itemsize, "tokens": TOKEN_BYTES}


def wrong_size(folder: Path, shard: Shard, each: dict[str, int]) -> str | None:
    """What is wrong with the lengths of the shard's files, in words; None if nothing is."""
    for kind, n_bytes in each.items():
        path = folder / f"{shard.name}.{kind}"
        try:
            found, expected = path.stat().st_size, n_bytes * shard.n_tokens
        except OSError as error:
            return f"{path.name}: {error.strerror}"
        if found != expected:
            return f"{path.name} has {found} bytes, expected {expected}"
    return None


def cache_rows(config: Config, model: TinyModel, start: int, end: int) -> int:
    """Caches dataset rows `start` up to `end` in `config.out`; shards already there are kept.

    `start` is a multiple of `rows_per_shard`, and so is `end`, or else it is the last row's.
    Returns how many shards it made. Ranges that do not overlap can be cached at once by separate
    processes. A shard is written in the background while the next one is computed. Raises
    `UserError` where the rows of a finished shard have changed, and see the functions above.
    """
    folder, make = Path(config.out), describe(config, model)
    size = config.rows_per_shard
    if start % size:
        raise ValueError(f"start must be a multiple of rows_per_shard, {size}, got {start}")
    ranges = [(first, min(first + size, end)) for first in range(start, end, size)]
    finished = {rows: finished_shard(folder, rows, make) for rows in ranges}
    n_todo = list(finished.values()).count(None)
    if n_todo == 0:
        return 0
    n_tokens, began = 0, time.monotonic()
    writing: Future[None] | None = None
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(1) as pool,
        tqdm(total=end - start, unit=" rows", desc="caching", mininterval=1) as bar,
    ):
        # The stream may end early, so it decides when to stop; what it brought is counted below.
        for rows, block in zip(ranges, read_rows(config, start, end, model.d_vocab), strict=False):
            if len(block) != rows[1] - rows[0]:
                break
            shard = finished[rows]
            if shard is not None:
                require_same_rows(shard, block, config)
            else:
                with naming_memory(config):
                    acts, tokens = compute_shard(model, block, rows[0], config)
                if writing is not None:
                    writing.result()  # raises what the writer did, and keeps to one shard ahead
                writing = pool.submit(write_shard, folder, acts, tokens, rows, make)
                n_tokens += len(tokens)
                rate = n_tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(block))
        n_rows = bar.n
        if writing is not None:
            writing.result()
    if n_rows != end - start:
        raise UserError(f"{rows_file(config)} ended before row {end}: it has changed, or was cut")
    return n_todo


def finish(folder: Path, n_rows: int) -> Record:
    """Writes the manifest of a cache whose `n_rows` rows are all in finished shards; returns it.

    Raises `UserError` naming the first shard that is not.
    """
    first = folder / f"{0:05d}.json"
    if not os.path.exists(first):
        raise UserError(f"{folder} holds no finished shard 00000")
    make = read_record(first).make
    shards, size = [], make["rows_per_shard"]
    for start in range(0, n_rows, size):
        rows = (start, min(start + size, n_rows))
        shard = finished_shard(folder, rows, make)
        if shard is None:
            raise UserError(
                f"{folder}: shard {shard_name(start, make)}, rows {rows[0]} to {rows[1] - 1}, is "
                "not finished; run its part again"
            )
        shards.append(shard)
    clear_leftovers(folder)
    n_tokens = min(make["tokens"], sum(shard.n_tokens for shard in shards))
    manifest = Record(make, n_tokens, n_rows, shards)
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def clear_leftovers(folder: Path) -> None:
    """Removes half-written files that a killed writer left behind. Nobody else may be writing.

    What cannot be removed stays: it is in nobody's way.
    """
    for path in folder.iterdir():
        if re.fullmatch(rf"\.({SHARD_NAME}|manifest)\.(acts|tokens|json)\..*", path.name):
            with contextlib.suppress(OSError):
                path.unlink()


writer_lock = one_writer  # the name by which modal_tinystories knows it


def read_record(path: Path) -> Record:
    """A sidecar or the manifest. Raises `UserError` if it is damaged or of another format."""
    try:
        value = json.loads(path.read_text())
        version = value["make"]["format"]
        if version in READABLE:
            shards = [Shard(**shard) for shard in value.pop("shards")]
            record = Record(**value, shards=shards)
            check_record(record)
            return record
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, or no cache's ({type(error).__name__}: {error}); cache to another "
            "folder, or delete it and cache again"
        ) from None
    readable = " and ".join(map(str, READABLE))
    raise UserError(f"{path} is of cache format {version}: this version reads {readable}")


def check_record(record: Record) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` where a reader could not do with it."""
    for name in ("tokens", "d_model", "rows_per_shard"):
        whole(name, record.make[name], 1)
    bytes_each(record.make)
    whole("the number of shards", len(record.shards), 1)
    whole("n_rows", record.n_rows, 1)
    for shard in record.shards:
        if not re.fullmatch(SHARD_NAME, shard.name):
            raise ValueError(f"a shard called {shard.name}")
        whole("a shard's n_tokens", shard.n_tokens, 0)
    whole("n_tokens", record.n_tokens, 0, sum(shard.n_tokens for shard in record.shards))


# ------------------------------------------------------------------------------------ the reader


class Batch(NamedTuple):
    """Consecutive activations, and where they come from."""

    acts: Tensor  # [n, d_model], float32
    tok_ids: Tensor  # [n], int64
    rows: Tensor  # [n], int64, in the dataset
    positions: Tensor  # [n], int64, in the row


# A buffer's chunks and the order in it -> activations, and which of them to take in turn.
Loader = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]


class ActivationCache:
    """A finished cache. Reads what it is asked for: it never holds more than `batches` says.

    Raises `UserError` if `folder` holds no finished cache or a shard is missing or cut short;
    `verify` looks at every byte. `n_tokens`: use only the first so many activations.
    """

    def __init__(self, folder: str | Path, n_tokens: int | None = None) -> None:
        self.folder = Path(folder)
        if not os.path.exists(self.folder / MANIFEST):
            raise UserError(
                f"{folder} holds no finished cache: run cache_activations.py --out {folder}"
            )
        self.manifest = read_record(self.folder / MANIFEST)
        self.make, self.shards = self.manifest.make, self.manifest.shards
        self.dtype = DTYPES[self.make["dtype"]]
        self.d_model: int = self.make["d_model"]
        self.n_tokens = self.manifest.n_tokens
        if n_tokens is not None:
            if not 0 < n_tokens <= self.n_tokens:
                raise UserError(f"{folder} holds {self.n_tokens} activations, not {n_tokens}")
            self.n_tokens = whole("n_tokens", n_tokens, 1)
        self._each = bytes_each(self.make)
        self._ends = np.cumsum([shard.n_tokens for shard in self.shards])
        for shard in self.shards:
            wrong = wrong_size(self.folder, shard, self._each)
            if wrong:
                raise self._damaged(shard, wrong)

    @property
    def content_hash(self) -> str:
        """SHA-256 over `n_tokens` and the shards' checksums of activations: 64 hex digits.

        The same wherever the folder lies, and however it is spelled. Nothing is read for it.
        """
        parts = [str(self.n_tokens), *(shard.acts_sha256 for shard in self.shards)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _damaged(self, shard: Shard, what: str) -> UserError:
        return UserError(
            f"{self.folder}: shard {shard.name} is damaged ({what}); delete {shard.name}.* there "
            "and cache again: only that shard is made anew"
        )

    def verify(self) -> None:
        """Reads everything. Raises `UserError` naming the first shard whose bytes are not right."""
        for shard in self.shards:
            for kind in self._each:
                path = self.folder / f"{shard.name}.{kind}"
                try:
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise self._damaged(shard, f"{path.name}: {error.strerror}") from None
                if digest != getattr(shard, f"{kind}_sha256"):
                    raise self._damaged(shard, f"the checksum of {path.name} is not the recorded")

    def require(self, **expected: Any) -> None:
        """Raises `UserError` unless the cache was made so: `require(layer=3, d_model=768)`.

        Names are those of `describe`, `weights_hash` and `split` among them.
        """
        for key, value in expected.items():
            found = self.make.get(key)
            if found != value:
                raise UserError(f"{self.folder}: its {key} is {found}, expected {value}")

    def _n_between(self, start: int, stop: int) -> int:
        """How many activations lie there. Raises `ValueError` where start and stop are no range."""
        whole("start", start, 0, self.n_tokens)
        return min(whole("stop", stop, start), self.n_tokens) - start

    def tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, dataset rows and positions of activations `start` up to `stop`, int64 [n].

        A `stop` past the end stands for the end. Raises `ValueError` unless 0 <= start <= stop and
        start <= n_tokens, all whole numbers.
        """
        raw = np.empty((self._n_between(start, stop), 3), dtype="<i4")
        self._read("tokens", start, raw.view(np.uint8))
        tok_ids, rows, positions = torch.from_numpy(raw).long().unbind(1)
        return tok_ids, rows, positions

    def tok_ids(self, i: int) -> int:
        """The token id of activation `i`. Raises `ValueError` unless 0 <= i < n_tokens."""
        whole("i", i, 0, self.n_tokens - 1)
        return int(self.tokens(i, i + 1)[0])

    def acts(self, start: int, stop: int) -> Tensor:
        """Activations `start` up to `stop`, [n, d_model] in the cache's dtype, on the CPU.

        `start` and `stop` as in `tokens`.
        """
        out = torch.empty(self._n_between(start, stop), self.d_model, dtype=self.dtype)
        self._read("acts", start, out.view(torch.uint8).numpy())
        return out

    def _read(self, kind: str, start: int, out: np.ndarray) -> None:
        """Fills bytes `out` [n, ...] with what the cache holds of activations from `start` on."""
        # Plain reads into memory of our own: mapped pages would count as resident memory.
        n_done, each = 0, self._each[kind]
        while n_done < len(out):
            i = int(np.searchsorted(self._ends, start + n_done, side="right"))
            n_here = min(len(out) - n_done, int(self._ends[i]) - start - n_done)
            offset = start + n_done - (int(self._ends[i - 1]) if i else 0)
            view = out[n_done : n_done + n_here].reshape(-1).data
            path = self.folder / f"{self.shards[i].name}.{kind}"
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek(offset * each)
                    while view:
                        n_bytes = file.readinto(view)
                        if not n_bytes:
                            raise self._damaged(self.shards[i], f"{path.name} is cut short")
                        view = view[n_bytes:]
            except OSError as error:
                raise self._damaged(self.shards[i], f"{path.name}: {error.strerror}") from None
            n_done += n_here

    def sequential(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Every activation once, in the dataset's order; the last batch may be smaller.

        Raises `ValueError` where `batch_size` is no whole number of 1 or more.
        """
        whole("batch_size", batch_size, 1)
        starts = range(0, self.n_tokens, batch_size)
        return (self._batch(start, start + batch_size, device) for start in starts)

    def _batch(self, start: int, stop: int, device: str | torch.device) -> Batch:
        acts = self.acts(start, stop).to(device).float()
        return Batch(acts, *(t.to(device) for t in self.tokens(start, stop)))

    def steps_per_pass(self, batch_size: int) -> int:
        """Batches in one pass over the cache. Raises `ValueError` for a batch of less than one."""
        return self.n_tokens // whole("batch_size", batch_size, 1)

    def batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        device: str | torch.device = "cpu",
        max_resident: int | None = None,
    ) -> Iterator[Tensor]:
        """Training batches from step `start_step` on, without end: [batch_size, d_model], float32.

        A pass is `steps_per_pass` batches, and takes no activation twice; the remainder, fewer
        than one batch, is left out, and is another one in each pass. The order is a function of
        the seed alone: chunks of 256 consecutive activations in random order, mixed within
        buffers of about 512 chunks. So a step is found by arithmetic, whichever it is.

        A cache of up to `max_resident` bytes is read once and held on `device`; otherwise two
        buffers are held, one of them being read ahead. The batches are the same. Default: 1 GiB
        on the CPU, 0.7 of the free memory on a GPU. Raises `UserError` where there is not one
        batch in the cache, and `ValueError` where `batch_size` is not a whole number of 1 or more,
        `seed` or `start_step` not one of 0 or more, or `max_resident` is negative.
        """
        device = torch.device(device)
        whole("seed", seed, 0)
        whole("start_step", start_step, 0)
        if self.steps_per_pass(batch_size) == 0:
            raise UserError(
                f"{self.folder} holds {self.n_tokens} activations: too few for one batch of "
                f"{batch_size}"
            )
        if max_resident is None:
            on_gpu = device.type == "cuda"
            free = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
            max_resident = int(RESIDENT_SHARE * free) if on_gpu else 2**30
        if not max_resident >= 0:
            raise ValueError(f"max_resident must be bytes, 0 or more, got {max_resident}")
        fits = self.n_tokens * self._each["acts"] <= max_resident
        return self._batches(batch_size, seed, start_step, device, fits)

    def _batches(
        self, batch_size: int, seed: int, start_step: int, device: torch.device, resident: bool
    ) -> Iterator[Tensor]:
        """`batches`, with the whole cache held on `device` or a buffer at a time."""
        load = self._resident_loader(device) if resident else self._streaming_loader(device)
        schedule = self._schedule(batch_size, seed, start_step)
        parts: list[Tensor] = []  # of the batch being put together: it may span two buffers
        room = batch_size
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, *next(schedule))
            while True:
                acts, index = ahead.result()
                ahead = pool.submit(load, *next(schedule))
                while len(index):
                    parts.append(acts.index_select(0, index[:room]))
                    index = index[room:]
                    room -= len(parts[-1])
                    if room == 0:
                        batch = parts[0] if len(parts) == 1 else torch.cat(parts)
                        parts, room = [], batch_size
                        yield batch.float()

    def _schedule(
        self, batch_size: int, seed: int, start_step: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From `start_step` on, without end: a buffer's chunks, and the order of what is in them.

        Yields the chunks' activation numbers, [n], and the order in which to take them: indices
        into those, without the ones that steps before `start_step` took and, in a pass's last
        buffer, the ones that are left over.
        """
        steps = self.steps_per_pass(batch_size)
        skip = start_step % steps * batch_size
        n_chunks = math.ceil(self.n_tokens / CHUNK)
        n_buffers = max(1, round(n_chunks / CHUNKS_PER_BUFFER))  # of one size, give or take one
        for n_pass in itertools.count(start_step // steps):
            left = steps * batch_size
            chunks = _shuffle(seed, n_pass, 0).permutation(n_chunks)
            for b, buffer in enumerate(np.array_split(chunks, n_buffers), start=1):
                n_used = min(left, self._buffer_size(buffer))
                if skip < n_used:
                    order = _shuffle(seed, n_pass, b).permutation(self._buffer_size(buffer))
                    yield buffer, order[skip:n_used]
                skip, left = max(0, skip - n_used), left - n_used

    def _buffer_size(self, chunks: np.ndarray) -> int:
        """Activations in these chunks: only the cache's last chunk may be a short one."""
        return int(np.minimum(CHUNK, self.n_tokens - chunks * CHUNK).sum())

    def _streaming_loader(self, device: torch.device) -> Loader:
        """Reads a buffer's chunks from disk: (the buffer on `device`, the order given)."""

        def load(chunks: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
            size = self._buffer_size(chunks)
            pinned = device.type == "cuda"
            acts = torch.empty(size, self.d_model, dtype=self.dtype, pin_memory=pinned)
            raw, done = acts.view(torch.uint8).numpy(), 0
            for start in (chunks * CHUNK).tolist():
                n_here = min(CHUNK, self.n_tokens - start)
                self._read("acts", start, raw[done : done + n_here])
                done += n_here
            return acts.to(device), torch.from_numpy(order).to(device)

        return load

    def _resident_loader(self, device: torch.device) -> Loader:
        """Reads the whole cache once; then (all of it, where in it a buffer's order leads)."""
        resident = torch.empty(self.n_tokens, self.d_model, dtype=self.dtype, device=device)
        at_once = CHUNK * CHUNKS_PER_BUFFER
        for start in range(0, self.n_tokens, at_once):
            resident[start : start + at_once] = self.acts(start, start + at_once)

        def load(chunks: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
            index = (chunks[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1)
            index = index[index < self.n_tokens]
            return resident, torch.from_numpy(index[order]).to(device)

        return load


def _shuffle(seed: int, n_pass: int, part: int) -> np.random.Generator:
    """The generator of one part of a pass: 0 for its chunks, b for what is in its b-th buffer."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n_pass, part)))


# ------------------------------------------------------------------------------------ the script


def run(config: Config) -> dict[str, Any]:
    """Caches what `config` says, or goes on with it, or finds it done; returns the figures.

    Raises `UserError`: see the module's functions.
    """
    check(config)
    began, folder = time.monotonic(), Path(config.out)
    model = load_model(config)
    make = describe(config, model)
    n_made = 0
    if not is_complete(folder, make):
        make_folder(folder)
        with one_writer(folder):
            clear_leftovers(folder)
            n_rows, _ = count_rows(config, model.d_vocab)
            n_made = cache_rows(config, model, 0, n_rows)
            finish(folder, n_rows)
    cache = ActivationCache(folder)
    return {
        "out": str(folder),
        "tokens_asked": config.tokens,
        "tokens": cache.n_tokens,
        "rows": cache.manifest.n_rows,
        "shards": len(cache.shards),
        "shards_made": n_made,
        "bytes": sum(s.n_tokens for s in cache.shards) * sum(bytes_each(make).values()),
        "layer": config.layer,
        "d_model": cache.d_model,
        "dtype": config.dtype,
        "weights_hash": model.weights_hash,
        "seconds": time.monotonic() - began,
    }


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        result = run(parse(Config, "Cache a language model's activations.", argv))
        if result["tokens"] < result["tokens_asked"]:
            print(
                f"the dataset ends after {result['tokens']:,} activations: "
                f"{result['tokens_asked']:,} were asked for"
            )
        if result["shards_made"] == 0:
            print(f"{result['out']} held this cache already: nothing was computed")
        print(
            table(
                ["cache", "tokens", "rows", "shards", "made now", "layer", "d_model", "MB", "s"],
                [
                    [
                        result["out"],
                        f"{result['tokens']:,}",
                        f"{result['rows']:,}",
                        result["shards"],
                        result["shards_made"],
                        result["layer"],
                        result["d_model"],
                        f"{result['bytes'] / 1e6:,.1f}",
                        f"{result['seconds']:.1f}",
                    ]
                ],
            )
        )


if __name__ == "__main__":
    main()
