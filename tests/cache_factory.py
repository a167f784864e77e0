"""Small caches for tests, of a generated model or made up without one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tiny_factory import write_dataset, write_model

from cache_activations import Config
from matryoshka.cache_writer import finish, write_shard
from matryoshka.tiny_model import BEGIN, PAD

D_MODEL = 16
CPU = torch.device("cpu")


def write_sources(folder: Path) -> Path:
    """Writes model.pt and train.jsonl, 100 rows of 32 ids, and returns the folder."""
    write_model(folder / "model.pt", d_model=D_MODEL, d_mlp=24)
    return write_dataset(folder, 100, seq=32)


def config_for(sources: Path, out: Path, **settings: Any) -> Config:
    small: dict[str, Any] = {
        "model": str(sources / "model.pt"),
        "dataset": str(sources),
        "tokens": 10**6,
        "layer": 1,
        "batch_size": 7,
        "rows_per_shard": 30,
        "device": "cpu",
        "out": str(out),
    }
    return Config(**{**small, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kept_tokens(rows: list[list[int]], keep_begin: bool = False) -> list[tuple[int, int, int]]:
    """(token id, row, position) of what is to be cached, in order."""
    drop = {PAD} if keep_begin else {PAD, BEGIN}
    return [
        (tok, r, p) for r, row in enumerate(rows) for p, tok in enumerate(row) if tok not in drop
    ]


def write_cache(
    folder: Path, n_tokens: int, *, d_model: int = 4, row_length: int = 100, n_shards: int = 3
) -> Path:
    """A cache made up without a model: activation i is [i // 65536, i % 65536, 0, ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    n_rows = -(-n_tokens // row_length)
    per_shard = -(-n_rows // n_shards)
    recipe = {
        "format": 1,
        "tokens": n_tokens,
        "dtype": "float32",
        "d_model": d_model,
        "rows_per_shard": per_shard,
    }
    for first in range(0, n_rows, per_shard):
        end = min(first + per_shard, n_rows)
        i = np.arange(first * row_length, min(end * row_length, n_tokens))
        acts = torch.zeros(len(i), d_model)
        acts[:, 0] = torch.from_numpy(i // 65536)
        acts[:, 1] = torch.from_numpy(i % 65536)
        tokens = np.stack([i % 9000, i // row_length, i % row_length], axis=1).astype("<i4")
        write_shard(folder, acts, tokens, (first, end), recipe)
    finish(folder, n_rows)
    return folder


def numbers(batch: torch.Tensor) -> np.ndarray:
    """Which of `write_cache`'s activations these are."""
    return (batch[:, 0].long() * 65536 + batch[:, 1].long()).numpy()


def reorder(file: Path) -> None:
    """The same rows in another order: the file's size does not change."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::-1]))


def hub_of(folder: Path, asked: list[Any]) -> Callable[..., Any]:
    """`datasets.load_dataset` with a hub that has the files of `folder` in every repo."""
    load = datasets.load_dataset

    def load_dataset(name: str, data_files: dict[str, str], split: str, **settings: Any) -> Any:
        asked.append((name, data_files, split, settings.pop("revision")))
        return load(
            "json", data_files={split: str(folder / data_files[split])}, split=split, **settings
        )

    return load_dataset


def as_format_1(folder: Path) -> None:
    """What the version before wrote: without a hash of the dataset."""
    for path in folder.glob("*.json"):
        value = json.loads(path.read_text())
        del value["make"]["dataset_sha256"]
        value["make"]["format"] = 1
        path.write_text(json.dumps(value))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
